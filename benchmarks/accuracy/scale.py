"""How large a reproduction is: sets, networks, and settings in place of the paper's; and what of it is reduced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from atom_fast.distillation.config import affects_result, preset
from atom_fast.evaluation.comparison import default_protocol
from atom_fast.evaluation.coresets import EPOCHS
from atom_fast.evaluation.protocols import Protocol, get_protocol

SEEDS, NETWORKS = 5, 20  # paper section 4.1
_OF_DM = ("iterations", "real_batch")  # settings of which DM has values of its own
_OF_THE_CELL = {"seed": "--seeds", "ipc": "--cells"}  # settings that each cell has its own of, and what says which
SEEDS_NAME, NETWORKS_NAME = "sets per cell", "networks per set"

# Digits stand in for the paper's data where there is neither a GPU nor a download: small enough for minutes on a CPU.
# There are about 140 real images a class, and a mirrored digit is no digit.
_DIGITS = {
    "iterations": 200,
    "real_batch": 64,
    "width": 32,
    "augmentation": "color_crop_cutout_scale_rotate",
}
_DIGITS_SIZES = {"digits": (3, 2), "digits32": (1, 1)}  # sets and networks
_DIGITS32 = {**_DIGITS, "iterations": 100, "real_batch": 32}
_DIGITS32_EPOCHS = 100


@dataclasses.dataclass(frozen=True)
class Scale:
    """Size of a reproduction on one data set.

    Attributes:
        seeds: synthetic sets a cell, each from a seed of its own.
        networks: networks that are trained on each set.
        settings: distillation settings in place of the methods' own.
        protocol: how the networks are trained; a name in ``PROTOCOLS``.
        epochs: of that protocol, in place of its own; other protocols change in proportion. None leaves them.
        selection_epochs: of the network that herding, k-center and forgetting look at.
    """

    seeds: int = SEEDS
    networks: int = NETWORKS
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    protocol: str = "paper"
    epochs: int | None = None
    selection_epochs: int = EPOCHS

    def __post_init__(self) -> None:
        for name in ("seeds", "networks", "epochs", "selection_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        for name, option in _OF_THE_CELL.items():
            if name in self.settings:
                raise ValueError(f"{name} is chosen by the cell; give {option} instead of --set {name}=")
        if self.settings.get("image_init") == "given":
            raise ValueError(
                "image_init must be real, noise or herding: a cell cannot start from a given set; got 'given'"
            )
        preset("paper", **self.settings)  # refuses what is no setting's value

    def training(self, protocol: str | None = None) -> Protocol:
        """The protocol of that name, or the scale's own, with its epochs changed as the scale says."""
        own, wanted = get_protocol(self.protocol), get_protocol(protocol or self.protocol)
        if self.epochs is None:
            return wanted
        epochs = max(1, round(wanted.epochs * self.epochs / own.epochs))
        return get_protocol(wanted.name, epochs=epochs)

    def reductions(self, *, evaluated: bool = True) -> list[str]:
        """What is not as in the paper, in words; without settings that no image depends on.

        Args:
            evaluated: sets are tested; otherwise nothing is said of how many, nor of how.
        """
        found = self._settings_changed()
        return [*self._fewer(), *found, *self._evaluation_changed()] if evaluated else found

    def _fewer(self) -> list[str]:
        sizes = ((SEEDS_NAME, self.seeds, SEEDS), (NETWORKS_NAME, self.networks, NETWORKS))
        return [f"{title} {value} instead of {full}" for title, value, full in sizes if value != full]

    def _settings_changed(self) -> list[str]:
        paper, dm, found = preset("paper"), preset("dm"), []
        for name, value in self.settings.items():
            differs = value != getattr(paper, name) or (name in _OF_DM and value != getattr(dm, name))
            if differs and affects_result(name):
                shown = f"{value:,}" if name in _OF_DM else value
                found.append(f"{name} {shown} instead of {_replaced(name, value)}")
        return found

    def _evaluation_changed(self) -> list[str]:
        found, epochs = [], get_protocol(self.protocol).epochs
        if self.protocol != "paper":
            found.append(f"evaluation protocol {self.protocol}")
        if self.epochs not in (None, epochs):
            found.append(f"evaluation epochs {self.epochs} instead of {epochs}")
        if self.selection_epochs != EPOCHS:
            found.append(f"epochs before images are chosen {self.selection_epochs} instead of {EPOCHS}")
        return found


def _replaced(name: str, value: object) -> str:
    """The paper's values that ``value`` takes the place of."""
    paper, dm = getattr(preset("paper"), name), getattr(preset("dm"), name)
    if name not in _OF_DM:
        return "the preset's" if paper is None else str(paper)  # None follows from the data
    replaced = [] if value == paper else [f"{paper:,}"]
    replaced += [] if value == dm else [f"{dm:,} for DM"]
    return ", and ".join(replaced)


def scale_for(
    dataset: str,
    *,
    seeds: int | None = None,
    networks: int | None = None,
    settings: Mapping[str, object] | None = None,
    protocol: str | None = None,
    epochs: int | None = None,
    selection_epochs: int | None = None,
) -> Scale:
    """The paper's size, or for digits a small one, with what is given in its place.

    Raises:
        ValueError: a number is below 1.
    """
    own_seeds, own_networks = _DIGITS_SIZES.get(dataset, (SEEDS, NETWORKS))
    reduced = {"digits": _DIGITS, "digits32": _DIGITS32}.get(dataset, {})
    return Scale(
        seeds=own_seeds if seeds is None else seeds,
        networks=own_networks if networks is None else networks,
        settings={**reduced, **(settings or {})},
        protocol=protocol or ("digits" if reduced else default_protocol(dataset)),
        epochs=_DIGITS32_EPOCHS if epochs is None and dataset == "digits32" else epochs,
        selection_epochs=EPOCHS if selection_epochs is None else selection_epochs,
    )
