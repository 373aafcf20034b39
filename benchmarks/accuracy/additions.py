"""What known additions give to DM, DAM and ATOM, and if attention still helps on top of them.

All rows of a cell have the settings of the preset ``best`` but for its additions, which come one after the other: the
same networks, preprocessing, batches and number of steps. Every method is compared with DM of the same additions, and
ATOM with additions also with ATOM alone. ATOM as in the preset ``paper`` stands beside them, on its own networks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from atom_fast.distillation.config import SETTINGS, preset, preset_settings
from benchmarks.accuracy.entries import Entry, Job, Row, Section, jobs_for, make_cell
from benchmarks.accuracy.size import RunSize
from benchmarks.methods import METHODS
from benchmarks.paper import TABLE1, TABLE1_NAME

COLUMN = "accuracy"
SELECTED, DISTILLED = ("random", "herding"), ("dm", "dam", "atom")
EASY_FRACTION = 0.5  # of PAD (Li et al. 2024), at one image per class

# Additions in their order, and the settings that each consists of; at the default of the first one it is off.
ADDITIONS: Mapping[str, tuple[str, ...]] = {
    "partition": ("partition", "synthetic_batch"),
    "pool": ("pool_networks", "pool_epochs"),
    "cross-entropy": ("calibration_weight",),
    "characteristic function": ("characteristic_weight",),
    "easy": ("easy_fraction",),
}
_ADDED = {name for names in ADDITIONS.values() for name in names}


def sections(dataset: str, ipc: int, size: RunSize, methods: Sequence[str] | None = None) -> Iterator[Section]:
    """Yield the tables of one cell: every method beside DM, and ATOM with additions beside ATOM alone.

    Args:
        dataset, ipc: the cell.
        size: its settings replace those of ``best``; what an addition consists of counts only in rows that have it.
        methods: of ``SELECTED`` and ``DISTILLED``; None: all.
    """
    chosen = (*SELECTED, *DISTILLED) if methods is None else methods
    best = {"iterations": preset("best").iterations, **preset_settings("best", ipc), **size.settings}
    values = {"easy_fraction": EASY_FRACTION, **best}
    common = {name: value for name, value in values.items() if name not in _ADDED}
    rows, ladder = [], []

    def entry(method: str, settings: Mapping[str, object], **paper: object) -> Entry:
        return Entry(jobs=_jobs(size, dataset, ipc, method, settings), **paper)

    if "atom" in chosen:
        own = {name: value for name, value in size.settings.items() if name not in _ADDED}
        found, title = TABLE1["ATOM"].get((dataset, ipc)), f"{METHODS['atom'].title}, preset paper"
        rows.append(Row(title, {COLUMN: entry("atom", own, paper=found, source=TABLE1_NAME)}, base=title))
    for names, added in _levels(values):
        suffix = "".join(f", {name}" for name in names)
        selected = SELECTED if set(added) & _ADDED and set(added) <= set(ADDITIONS["partition"]) else ()
        for method in (*selected, *DISTILLED):
            if method in chosen:
                found = {COLUMN: entry(method, {**common, **added})}
                rows.append(Row(METHODS[method].title + suffix, found, base=METHODS["dm"].title + suffix))
                if method == "atom":
                    ladder.append(Row(f"+ {names[-1]}" if names else METHODS["atom"].title, found))
    if "atom" in chosen:
        ladder.append(Row("preset best", {COLUMN: entry("atom", best)}))
    place = f"{dataset}:{ipc}"
    yield Section(place, "method", (COLUMN,), tuple(rows), METHODS["dm"].title)
    if ladder:
        yield Section(place, "one addition after the other", (COLUMN,), tuple(ladder), METHODS["atom"].title)


def _levels(values: Mapping[str, object]) -> Iterator[tuple[tuple[str, ...], dict[str, object]]]:
    """Yield the names and the settings of no addition, then of the first, of the first two, and so on."""
    titles: tuple[str, ...] = ()
    added: dict[str, object] = {}
    yield titles, added
    for addition, names in ADDITIONS.items():
        value = values.get(names[0])
        if value in (None, SETTINGS[names[0]]["default"]):
            continue
        title = {"partition": f"partition {value}", "easy": f"easiest {value:.0%}"}.get(addition, addition)
        titles, added = (*titles, title), added | {name: values[name] for name in names if name in values}
        yield titles, added


def _jobs(size: RunSize, dataset: str, ipc: int, method: str, settings: Mapping[str, object]) -> tuple[Job, ...]:
    """Return the jobs of an entry; DM's loss keeps its scale; what is added to it has the same rate as in ATOM's."""

    def sized(settings: Mapping[str, object]) -> RunSize:
        return dataclasses.replace(size, settings=dict(sorted(settings.items())))  # equal cells are one

    if method == "dm":
        own = {name: value for name, value in settings.items() if name != "loss_scale" or name in size.settings}
        atom, dm = (
            make_cell(sized(given), dataset, ipc, name, 0).resolved_config.loss_scale
            for name, given in (("atom", settings), ("dm", own))
        )
        for weight in ("calibration_weight", "characteristic_weight"):
            if weight in own:
                own[weight] *= atom / dm
        settings = own
    return jobs_for(sized(settings), dataset, ipc, method)
