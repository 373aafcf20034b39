"""What a search is: its grid, its proxies, and how candidates are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from atom_fast.names import suggestion
from atom_fast.training.protocols import Protocol, check_count, default_protocol, get_protocol
from benchmarks.accuracy.datasets import DATASETS
from benchmarks.accuracy.size import RunSize, size_for
from benchmarks.methods import METHODS
from benchmarks.search.grid import WIDTHS, Candidate, candidates

EARLY, REFERENCE = "early", "reference"
TITLES = {EARLY: "early stopping", REFERENCE: "whole data"}
MADE = ("random", "herding", "k-center", "forgetting", "dm", "dam", "atom-channel", "atom")  # made here, if asked for
PROXIES = ("random", "dm", "dam", "atom", "early")
# Images per class, epochs on a proxy, epochs on the whole data. DM's supplement trains for 200 and 100. On digits
# 720 candidates with three seeds of two proxies and the whole data are to take half an hour on two cores.
USUAL = {"digits": (10, 30, 10)}
_USUAL = (50, 200, 100)


@dataclasses.dataclass(frozen=True)
class Search:
    """What to search, and how candidates are trained.

    Attributes:
        dataset: key of `benchmarks.accuracy.datasets.DATASETS`.
        proxies: from `check_names`.
        ipc: images per class of sets that are made here.
        seeds: number of seeds, of sets and of networks.
        grid: the candidates.
        widths, sample: how the grid was chosen.
        protocol, reference: training on a proxy, and on the whole data; None leaves that out.
        settings: of distillations, that replace the methods' own.
    """

    dataset: str
    proxies: Mapping[str, Path | None]
    ipc: int
    seeds: int
    grid: tuple[Candidate, ...]
    widths: tuple[int, ...]
    sample: int | None
    protocol: Protocol
    reference: Protocol | None
    settings: Mapping[str, object]

    @property
    def size(self) -> RunSize:
        """The settings of sets that are made here."""
        return size_for(self.dataset, settings=self.settings)


def plan(
    dataset: str = "digits",
    *,
    proxies: Sequence[str] | None = None,
    ipc: int | None = None,
    seeds: int = 1,
    widths: Sequence[int] | None = None,
    sample: int | None = None,
    epochs: int | None = None,
    reference_epochs: int | None = None,
    iterations: int | None = None,
) -> Search:
    """Return a search; what is None has the data set's usual value.

    Args:
        dataset: "digits", or one of the paper's data sets.
        proxies: names in `MADE`, "early", and ``NAME=FILE`` for a set of any kind.
        ipc: stored images per class.
        seeds: number of seeds.
        widths, sample: of the grid, as in `benchmarks.search.grid.candidates`.
        epochs: passes over a proxy.
        reference_epochs: passes over the whole data; 0 leaves that out.
        iterations: of the distillations.

    Raises:
        ValueError: a value that is not accepted.
        FileNotFoundError: a file of a proxy is missing.
    """
    if dataset not in DATASETS:
        raise ValueError(f"data set must be one of {', '.join(DATASETS)}; got {dataset!r}")
    usual_ipc, usual_epochs, usual_reference = USUAL.get(dataset, _USUAL)
    ipc = usual_ipc if ipc is None else ipc
    epochs = usual_epochs if epochs is None else epochs
    reference_epochs = usual_reference if reference_epochs is None else reference_epochs
    for name, value, least in (("ipc", ipc, 1), ("seeds", seeds, 1), ("reference_epochs", reference_epochs, 0)):
        check_count(name, value, least)
    widths = tuple((8, 16, 32, 64) if dataset == "digits" else WIDTHS) if widths is None else tuple(widths)
    protocol = "digits" if dataset.startswith("digits") else default_protocol(dataset)
    settings = size_for(dataset, settings={} if iterations is None else {"iterations": iterations}).settings
    return Search(
        dataset, check_names(PROXIES if proxies is None else proxies), ipc, seeds,
        tuple(candidates(widths, sample)), widths, sample,
        get_protocol(protocol, epochs=epochs),
        get_protocol(protocol, epochs=reference_epochs) if reference_epochs else None,
        settings,
    )  # fmt: skip


def check_names(names: Sequence[str]) -> dict[str, Path | None]:
    """Return proxies by name, with the file of each that is given as ``NAME=FILE``; None for one that is made here.

    Raises:
        ValueError: an unknown name, or one given twice.
        FileNotFoundError: there is no such file or folder.
    """
    found: dict[str, Path | None] = {}
    for text in names:
        name, given, file = text.partition("=")
        name = name.strip()
        if name in found:
            raise ValueError(f"proxy {name!r} is given twice")
        if given:
            if name in (*MADE, EARLY, REFERENCE) or not name.replace("-", "").isalnum():
                raise ValueError(
                    f"the name of a file's proxy must be of letters, digits and hyphens, and none of "
                    f"{', '.join((*MADE, EARLY, REFERENCE))}; got {name!r}"
                )
            if not Path(file).exists():
                raise FileNotFoundError(f"no set at {file} for the proxy {name!r}")
        elif name not in (*MADE, EARLY):
            raise ValueError(
                f"a proxy must be one of {', '.join((*MADE, EARLY))}, or NAME=FILE; got {name!r}"
                f"{suggestion(name, (*MADE, EARLY))}"
            )
        found[name] = Path(file) if given else None
    return found


def title(name: str) -> str:
    """Return the name of a proxy in tables."""
    return METHODS[name].title if name in METHODS else TITLES.get(name, name)
