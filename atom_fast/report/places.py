"""Where the parts of the runs lie that a report is about."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from atom_fast.names import CONFIG_FILE, EVALUATION_FILE, SYNTHETIC_FILE

CELL_FILE = "cell.json"  # of a cell of `python -m benchmarks`
CORESET_FILE = "herding.safetensors"


@dataclasses.dataclass(frozen=True)
class Place:
    """The files of one run, or of a set's file alone.

    Attributes:
        name: of the run in the report.
        source: what the report's command was given, or found.
        set_file: the synthetic set; None: the run has not finished.
        folder: where the distillation left its log, settings and environment; None for a file alone.
        records: files of evaluations.
        coreset_file: the real images that the set is compared with.
        cell: True for a cell of a benchmark, which has its own evaluations.
    """

    name: str
    source: Path
    set_file: Path | None
    folder: Path | None
    records: tuple[Path, ...]
    coreset_file: Path | None
    cell: bool = False


def find_places(source: Path) -> tuple[list[Place], bool]:
    """Return the runs that a path names, and True if they are a collection rather than one run.

    Args:
        source: a set's file, a run's folder, a folder of runs and files, or a benchmark's output folder.

    Raises:
        FileNotFoundError: there is no such path, or no run in the folder.
    """
    if source.is_file():
        return [_run(source.parent) if source.name == SYNTHETIC_FILE else _file(source)], False
    if not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist")
    if _is_run(source):
        return [_run(source)], False
    if (source / CELL_FILE).is_file():
        return [_cell(source)], False
    cells = sorted((path for path in (source / "cells").glob("*") if path.is_dir()), key=_natural)
    inside = sorted(source.iterdir(), key=_natural)
    runs = [_run(path) for path in inside if path.is_dir() and _is_run(path)]
    files = [_file(path) for path in inside if path.is_file() and _is_set(path)]
    places = [*map(_cell, cells), *runs, *files]
    if not places:
        raise FileNotFoundError(
            f"{source} holds no run: neither {SYNTHETIC_FILE} nor {CONFIG_FILE}, in it or in a folder in it, nor "
            "cells/ of a benchmark"
        )
    return places, True


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort ipc10 behind ipc2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _is_run(folder: Path) -> bool:
    return (folder / SYNTHETIC_FILE).is_file() or (folder / CONFIG_FILE).is_file()


def _is_set(path: Path) -> bool:
    return path.suffix == ".safetensors" and not path.name.endswith(CORESET_FILE)


def _run(folder: Path) -> Place:
    file = folder / SYNTHETIC_FILE
    records, coreset = (folder / EVALUATION_FILE,), folder / CORESET_FILE
    return Place(folder.resolve().name, folder, file if file.is_file() else None, folder, records, coreset)


def _file(path: Path) -> Place:
    record, coreset = (path.with_name(f"{path.stem}.{name}") for name in (EVALUATION_FILE, CORESET_FILE))
    return Place(path.name, path, path, None, (record,), coreset)


def _cell(folder: Path) -> Place:
    """A distilled set is the one of the last milestone, a chosen one ``set.safetensors``."""
    sets = [folder / "set.safetensors", *sorted((folder / "sets").glob("iteration-*.safetensors"))]
    finished = [path for path in sets if path.is_file()]
    run = folder / "run"
    return Place(
        name=folder.name,
        source=folder,
        set_file=finished[-1] if finished else None,
        folder=run if run.is_dir() else None,
        records=tuple(sorted(folder.glob("evaluation-*.json"))),
        coreset_file=None,
        cell=True,
    )
