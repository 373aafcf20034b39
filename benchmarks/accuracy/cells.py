"""A cell: one synthetic set and its evaluations, in its own folder, never computed twice.

The folder's name ends in a hash of everything that the set depends on, so that cells of different settings stand beside
each other. It holds ``cell.json`` (the cell's identity), ``run/`` (the distillation, which is resumed) or
``set.safetensors`` (chosen images), ``sets/`` (finished sets, also of milestones) and one file per evaluation. A lock
keeps two processes from working on one cell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from atom_fast._files import lock, write_atomically
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.logs import log
from atom_fast.evaluation.results import is_curve
from atom_fast.training.protocols import Protocol
from benchmarks.accuracy.datasets import DATASETS
from benchmarks.methods import configuration, get_method

CELL_FILE = "cell.json"
LOCK_FILE = ".lock"
_FORMAT, _EARLIER_FORMAT = "benchmarks.accuracy.cell", "atom_fast.reproduce.cell"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One synthetic set.

    Attributes:
        dataset, ipc, method, seed: data set, images per class (0: all images), method, and seed of the set.
        settings: (name, value) pairs that replace the method's distillation settings.
        selection_epochs, selection_protocol: training of the network that images are chosen with.
        milestones: iterations after which the set is kept too; the last one ends the distillation.
        tested: settings of the networks that test its sets; None: ``settings``.
    """

    dataset: str
    ipc: int
    method: str
    seed: int = 0
    settings: tuple[tuple[str, object], ...] = ()
    selection_epochs: int = 0
    selection_protocol: str = ""
    milestones: tuple[int, ...] = ()
    tested: tuple[tuple[str, object], ...] | None = None

    @property
    def config(self) -> DistillConfig:
        """Settings of the distillation; for chosen images, of the tested networks."""
        return configuration(self.method, self.ipc, self.seed, dict(self.settings))

    @property
    def resolved_config(self) -> DistillConfig:
        """The settings with everything that follows from the data set resolved; only the precision may stay open."""
        return self.config.for_data(DATASETS[self.dataset][2], self.dataset)

    @property
    def partition(self) -> int:
        """Rows and columns of images on a stored one; the full data set has none."""
        return 1 if self.method == "full" else self.config.partition

    @property
    def folder_name(self) -> str:
        """A readable name that differs whenever anything that the set depends on differs."""
        size = f"ipc{self.ipc}" if self.ipc else "all"
        return f"{self.dataset}-{size}-{self.method}-seed{self.seed}-{_hash(self._identity())}"

    def _identity(self) -> dict[str, object]:
        if get_method(self.method).distils:
            config = self.resolved_config.config_hash()
            return {"dataset": self.dataset, "config": config, "milestones": self.milestones}
        how = {"epochs": self.selection_epochs, "protocol": self.selection_protocol}
        own = {} if self.method in ("random", "full") else how
        if self.partition > 1:  # named only then: folders of before keep their names
            own = {**own, "partition": self.partition}
        return {
            "dataset": self.dataset,
            "method": self.method,
            "ipc": self.ipc,
            "seed": self.seed,
            "preprocessing": self.resolved_config.preprocessing,
            **own,
        }

    def to_dict(self) -> dict[str, object]:
        """Return the cell as JSON can hold it."""
        plain = {"settings": dict(self.settings), "milestones": list(self.milestones)}
        plain["tested"] = None if self.tested is None else dict(self.tested)
        return {**dataclasses.asdict(self), **plain, "config_hash": self.config.config_hash()}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Networks trained on a cell's set.

    Attributes:
        network: name of their architecture, one of `atom_fast.names.NETWORK_NAMES`.
        protocol: their training.
        networks: their number.
        iteration: milestone of the cell whose set they are trained on; None: the finished set.
        norm: norm of ConvNets; None: that of the cell's settings.
    """

    network: str
    protocol: Protocol
    networks: int
    iteration: int | None = None
    norm: str | None = None

    def file_name(self, architecture: Mapping[str, object]) -> str:
        """Return the name of the results file: one for all numbers of networks, since more of them continue fewer."""
        digest = _hash({"protocol": self.protocol.to_dict(), "architecture": dict(architecture)})
        suffix = "" if self.iteration is None else f"-iteration-{self.iteration:08d}"
        return f"evaluation-{self.network}-{digest}{suffix}.json"


def architecture(cell: Cell, network: str, norm: str | None = None) -> dict[str, object]:
    """Return the settings of the ConvNets that test a cell's set: for all methods, ATOM's at the cell's settings.

    Testing DM's sets on networks of another initialisation than ATOM's would compare networks, not sets. Methods that
    match neither attention nor embeddings learn from InstanceNorm, and their sets are tested on it.
    """
    if network != "convnet":
        return {}
    if norm is None and get_method(cell.method).loss != "matching":
        norm = "instance"
    settings = dict(cell.settings if cell.tested is None else cell.tested)
    config = configuration("atom", cell.ipc, cell.seed, settings)
    config = config.for_data(DATASETS[cell.dataset][2], cell.dataset)
    found = config.convnet_settings()
    return found if norm is None else {**found, "norm": norm}


def cell_folder(output: Path, cell: Cell) -> Path:
    """Return the folder of a cell."""
    return Path(output) / "cells" / cell.folder_name


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Lock a cell for this process; yield False if another process holds it.

    Windows and some network file systems have no locks: then nobody is kept out, and one warning says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "w") as file:
        try:
            held = lock(file, wait=False)
        except OSError as error:
            _log_once(
                f"{folder.parent} cannot be locked ({error.strerror}): make sure yourself that no other process works "
                "on its cells"
            )
            held = True
        yield held


_log_once = functools.cache(log)


def open_cell(folder: Path, cell: Cell, data_name: str, fingerprint: str) -> None:
    """Write the note of a new cell's folder; check that an existing folder belongs to this cell and these data.

    Raises:
        ValueError: the folder holds something else, its note is damaged, or it was made from other images.
    """
    note = folder / CELL_FILE
    if not note.exists():
        strange = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        if strange:
            raise ValueError(
                f"{folder} holds {', '.join(sorted(strange)[:3])} but no {CELL_FILE}: it is not a cell, or only part "
                "of one; move or remove it to run the cell again"
            )
        about = {"format": _FORMAT, "cell": cell.to_dict(), "data": data_name, "fingerprint": fingerprint}
        write_atomically(note, json.dumps(about, indent=1) + "\n")
    found = read_note(folder)
    if found["fingerprint"] != fingerprint:
        raise ValueError(
            f"{folder} was made from other images of {cell.dataset} ({found['data']}); "
            "give the same --data-dir, or another --out"
        )


def cells_of_earlier_versions(output: Path, cells: Iterable[Cell]) -> list[str]:
    """Return folders of the same data sets, methods and seeds as ``cells`` that an earlier version named otherwise.

    Its hash of the settings was another one, so that its distilled sets are not found by name.
    """
    names = {cell.folder_name for cell in cells}
    kinds = {name.rpartition("-")[0] for name in names}
    folders = sorted(path.parent for path in (output / "cells").glob(f"*/{CELL_FILE}"))
    alike = [folder for folder in folders if folder.name not in names and folder.name.rpartition("-")[0] in kinds]
    return [folder.name for folder in alike if read_note(folder)["format"] == _EARLIER_FORMAT]


def check_same_images(
    output: Path, cells: Iterable[Cell], at_hand: Mapping[str, tuple[str, str]] | None = None
) -> None:
    """Check that all cells of a data set that exist were made from the same images.

    Args:
        output: folder of the cells.
        cells: cells of one table; missing folders are passed over.
        at_hand: by data set, fingerprint and title of the images that further cells will be made from.

    Raises:
        ValueError: two cells, or a cell and the data at hand, differ; or a cell's note is damaged.
    """
    known = {
        name: (fingerprint, f"the images at hand ({title})") for name, (fingerprint, title) in (at_hand or {}).items()
    }
    for cell in cells:
        folder = cell_folder(output, cell)
        if not (folder / CELL_FILE).is_file():
            continue
        note = read_note(folder)
        fingerprint, whose = known.setdefault(cell.dataset, (note["fingerprint"], f"{folder} ({note['data']})"))
        if note["fingerprint"] != fingerprint:
            raise ValueError(
                f"{folder} was made from other images of {cell.dataset} ({note['data']}) than {whose}, but both belong "
                "in one table; give the same --data-dir, or an --out for each"
            )


def read_note(folder: Path) -> dict:
    """Read ``cell.json``.

    Raises:
        ValueError: it is damaged.
    """
    found = read_json(folder / CELL_FILE, "remove its folder to run the cell again")
    written_as = found.get("format") if isinstance(found, dict) else None
    if written_as not in (_FORMAT, _EARLIER_FORMAT) or not {"data", "fingerprint"} <= set(found):
        raise ValueError(f"{folder / CELL_FILE} is not a cell's; remove its folder to run the cell again")
    return found


def read_json(path: Path, remedy: str) -> dict | list:
    """Read a JSON file.

    Raises:
        ValueError: it is missing or not JSON; the message ends in ``remedy``.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path} is missing ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error


def evaluation_file(output: Path, cell: Cell, evaluation: Evaluation) -> Path:
    """Return the file of an evaluation's results."""
    return cell_folder(output, cell) / evaluation.file_name(architecture(cell, evaluation.network, evaluation.norm))


def read_evaluation(output: Path, cell: Cell, evaluation: Evaluation) -> dict | None:
    """Return the results of a finished evaluation, or None.

    Returns:
        ``accuracies`` (per cent, one per network, None for one that diverged), ``seconds`` of their evaluation,
        ``set_seconds``, ``data`` (title of the images), ``device``, ``versions`` of packages.

    Raises:
        ValueError: a file of the cell is damaged.
    """
    path = evaluation_file(output, cell, evaluation)
    if not path.is_file():
        return None
    found, last = _read_record(path, evaluation), str(evaluation.protocol.epochs)
    curves = [curve for curve in found["curves"][: evaluation.networks] if curve]
    if len(curves) < evaluation.networks:
        return None
    return {
        "accuracies": [curve[last] for curve in curves],
        "seconds": found["seconds"] * len(curves) / sum(map(bool, found["curves"])),
        "set_seconds": found["set_seconds"],
        "data": read_note(cell_folder(output, cell))["data"],
        "device": found["device"],
        "versions": found["versions"],
    }


def _read_record(path: Path, evaluation: Evaluation) -> dict:
    """Read the record that `evaluate` keeps in a file, or the one that the version before left there."""
    remedy = "remove it to evaluate the set again"
    content = read_json(path, remedy)
    found = content[-1] if isinstance(content, list) and content else content
    if not isinstance(found, dict) or not _is_evaluation(found, str(evaluation.protocol.epochs)):
        raise ValueError(f"{path} is damaged (it does not hold an evaluation's results); {remedy}")
    return found


def _is_evaluation(found: Mapping, last_epoch: str) -> bool:
    curves = found.get("curves")
    return (
        isinstance(curves, list)
        and all(is_curve(curve, last_epoch) for curve in curves)
        and isinstance(found.get("seconds"), (int, float))
        and isinstance(found.get("set_seconds"), (int, float, type(None)))
        and isinstance(found.get("device"), str)
        and isinstance(found.get("versions"), dict)
    )


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
