"""What each table and figure consists of: rows and columns of cells, beside the paper's figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.accuracy import paper, study
from benchmarks.accuracy.cells import Cell, Evaluation
from benchmarks.accuracy.datasets import DATASETS
from benchmarks.accuracy.layout import Entry, Job, Row, Section, jobs_for, make_cell
from benchmarks.accuracy.methods import METHODS, get_method
from benchmarks.accuracy.scale import Scale, scale_for

_TABLE1_METHODS = {
    "random": "Random",
    "herding": "Herding",
    "k-center": "K-Center",
    "forgetting": "Forgetting",
    "dm": "DM",
    "dam": "DAM",
    "atom-channel": "ATOM†",
    "atom": "ATOM",
}
_TABLE4_ROWS = {
    "random": "Random (nothing is matched)",
    "mmd": "MMD",
    "feature-maps": "MMD + feature map",
    "dam": "MMD + spatial",
    "atom-channel": "MMD + channel",
    "atom": "MMD + spatial + channel",
}
_IN_TABLE1 = {"random": "Random", "mmd": "DM", "dam": "DAM", "atom": "ATOM"}
_NETWORK_TITLES = {
    "convnet": "ConvNet",
    "alexnet": "AlexNet",
    "vgg11": "VGG-11",
    "resnet18": "ResNet-18",
    "vit": "ViT",
}
MILESTONES = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for: cells as (data set, images a class), methods (None: the target's), and a scale each."""

    cells: tuple[tuple[str, int], ...]
    methods: tuple[str, ...] | None
    scales: Mapping[str, Scale]
    factors: tuple[str, ...] | None = None

    def runs(self, method: str) -> bool:
        """Whether a method of the target is to be run."""
        return self.methods is None or method in self.methods


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table or figure, in sections, and the scale of each data set in it."""

    target: str
    title: str
    kind: str  # "table", "curves" or "grids"
    sections: tuple[Section, ...]
    scales: Mapping[str, Scale]

    @property
    def units(self) -> list[tuple[Cell, tuple[Evaluation, ...]]]:
        """Cells with all that is to be evaluated of them, each once: first one set of every entry, then the second."""
        wanted: dict[Cell, dict[Evaluation, None]] = {}
        for section in self.sections:
            for row in section.rows:
                for entry in row.entries.values():
                    for cell, evaluation in entry.jobs:
                        wanted.setdefault(cell, {})
                        if evaluation is not None:
                            wanted[cell][evaluation] = None
        return sorted(((cell, tuple(found)) for cell, found in wanted.items()), key=lambda unit: unit[0].seed)


@dataclasses.dataclass(frozen=True)
class Target:
    """A name that can be asked for: its title, kind, cells where none are given, and how its sections are made."""

    title: str
    kind: str
    cells: tuple[tuple[str, int], ...]
    build: Callable[[Request], Iterable[Section]]
    methods: tuple[str, ...] = ()


def plan(
    target: str,
    cells: Sequence[tuple[str, int]] | None = None,
    methods: Sequence[str] | None = None,
    factors: Sequence[str] | None = None,
    **scale,
) -> Plan:
    """What a table or figure consists of.

    Args:
        target: a key of ``TARGETS``.
        cells: (data set, images a class); None: the paper's.
        methods: those to run; the others' figures are the paper's. None: all that this project runs.
        factors: of the study; None: all.
        **scale: of `scale_for`.

    Raises:
        ValueError: an unknown target, data set, method or factor, factors of a table, or a value that is not accepted.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}; got {target!r}")
    described = TARGETS[target]
    cells = tuple(described.cells if cells is None else dict.fromkeys(cells))
    for dataset, ipc in cells:
        if dataset not in DATASETS or ipc < 1:
            raise ValueError(
                f"a cell is DATASET:IPC with a data set of {', '.join(DATASETS)} and at least one image per class; "
                f"got {dataset}:{ipc}"
            )
    for method in methods or ():
        get_method(method)
        if described.methods and method not in described.methods:
            raise ValueError(f"{target} has the methods {', '.join(described.methods)}; got {method!r}")
    if factors and target != "study":
        raise ValueError(f"only study has factors, not {target}; got {', '.join(factors)}")
    scales = {dataset: scale_for(dataset, **scale) for dataset, _ in cells}
    factors = tuple(dict.fromkeys(factors)) if factors else None
    request = Request(cells, tuple(methods) if methods else None, scales, factors)
    return Plan(target, described.title, described.kind, tuple(described.build(request)), scales)


def parse_cell(text: str) -> tuple[str, int]:
    """``"cifar10:10"`` as ("cifar10", 10).

    Raises:
        ValueError: it is not of that form.
    """
    dataset, _, ipc = text.strip().partition(":")
    if dataset not in DATASETS or not ipc.isdecimal() or int(ipc) < 1:
        raise ValueError(
            f"a cell is DATASET:IPC, such as cifar10:10, with a data set of {', '.join(DATASETS)}; got {text!r}"
        )
    return dataset, int(ipc)


def _table1(request: Request) -> Iterable[Section]:
    columns = {f"{dataset}:{ipc}": (dataset, ipc) for dataset, ipc in request.cells}
    titles = list(dict.fromkeys([*paper.TABLE1, *_TABLE1_METHODS.values()]))
    titles.insert(titles.index("ATOM"), titles.pop(titles.index("ATOM†")))
    by_title = {title: method for method, title in _TABLE1_METHODS.items()}
    rows = []
    for title in titles:
        method, entries = by_title.get(title), {}
        run = method is not None and request.runs(method)
        for column, (dataset, ipc) in columns.items():
            figure = paper.TABLE1.get(title, {}).get((dataset, ipc))
            jobs = jobs_for(request.scales[dataset], dataset, ipc, method) if run else ()
            if figure is not None or jobs:
                entries[column] = Entry(figure, jobs)
        if entries:
            rows.append(Row(title, entries))
    entries = {}
    for column, (dataset, _) in columns.items():
        jobs = jobs_for(request.scales[dataset], dataset, 0, "full") if request.runs("full") else ()
        entries[column] = Entry(paper.FULL_DATA.get(dataset), jobs)
    rows.append(Row(METHODS["full"].title, entries))
    yield Section("", "method", tuple(columns), tuple(rows))


def _table2(request: Request) -> Iterable[Section]:
    for dataset, ipc in request.cells:
        if dataset == "digits":
            raise ValueError("table2 needs images of 32×32 for VGG-11; use digits32, which are digits of that size")
        printed = paper.TABLE2 if (dataset, ipc) == paper.TABLE2_CELL else {}
        rows = []
        for title in ("DC", "CAFE", "DSA", "DM", "KIP", "DAM", "ATOM"):
            method = title.lower()
            run = method in METHODS and request.runs(method)
            figures, entries = printed.get(title, {}), {}
            for network, column in _NETWORK_TITLES.items():
                jobs = jobs_for(request.scales[dataset], dataset, ipc, method, network=network) if run else ()
                if jobs or network in figures:
                    entries[column] = Entry(figures.get(network), jobs)
            if entries:
                entries["Avg."] = Entry(figures.get("average"), average=True)
                rows.append(Row(title, entries))
        yield Section(f"{dataset}:{ipc}", "method", (*_NETWORK_TITLES.values(), "Avg."), tuple(rows))


def _table4(request: Request) -> Iterable[Section]:
    columns = {f"{dataset}:{ipc}": (dataset, ipc) for dataset, ipc in request.cells}
    rows = []
    for method, title in _TABLE4_ROWS.items():
        entries = {}
        for column, place in columns.items():
            figure, source = paper.TABLE4.get(method) if place == paper.TABLE4_CELL else None, ""
            if figure is None:  # Table 4 has one cell, and no row for random images
                figure, source = paper.TABLE1.get(_IN_TABLE1.get(method), {}).get(place), paper.TABLE1_NAME
            jobs = jobs_for(request.scales[place[0]], *place, method) if request.runs(method) else ()
            entries[column] = Entry(figure, jobs, source=source)
        rows.append(Row(title, entries))
    yield Section("", "matched", tuple(columns), tuple(rows), _TABLE4_ROWS["mmd"])


def _table5(request: Request) -> Iterable[Section]:
    for dataset, ipc in request.cells:
        for name in ("spatial_power", "channel_power"):
            if name in request.scales[dataset].settings:
                raise ValueError(f"table5 varies {name} itself; do not give --set {name}=")
        rows = []
        for channel in paper.POWERS:
            entries = {}
            for spatial in paper.POWERS:
                figure = paper.TABLE5[channel, spatial] if (dataset, ipc) == paper.TABLE5_CELL else None
                powers = {"channel_power": float(channel), "spatial_power": float(spatial)}
                jobs = jobs_for(request.scales[dataset], dataset, ipc, "atom", changes=powers)
                entries[f"p_s = {spatial}"] = Entry(figure, jobs)
            rows.append(Row(f"p_c = {channel}", entries))
        columns = tuple(f"p_s = {spatial}" for spatial in paper.POWERS)
        yield Section(f"{dataset}:{ipc}", "", columns, tuple(rows))


def _figure3(request: Request) -> Iterable[Section]:
    for dataset, ipc in request.cells:
        scale, rows, columns = request.scales[dataset], [], {}
        for method in ("dm", "dam", "atom"):
            if not request.runs(method):
                continue
            last = make_cell(scale, dataset, ipc, method, 0).config.iterations
            milestones = tuple(sorted({max(1, round(last * part / MILESTONES)) for part in range(1, MILESTONES + 1)}))
            entries = {
                str(iteration): Entry(None, jobs_for(scale, dataset, ipc, method, milestones, iteration=iteration))
                for iteration in milestones
            }
            rows.append(Row(METHODS[method].title, entries))
            columns |= dict.fromkeys(entries)
        yield Section(f"{dataset}:{ipc}", "iterations", tuple(sorted(columns, key=int)), tuple(rows))


def _grids(request: Request) -> Iterable[Section]:
    for dataset, ipc in request.cells:
        jobs: tuple[Job, ...] = ((make_cell(request.scales[dataset], dataset, ipc, "atom", 0), None),)
        yield Section(f"{dataset}:{ipc}", "", ("images",), (Row("ATOM", {"images": Entry(None, jobs)}),))


def _study(request: Request) -> Iterable[Section]:
    for dataset, ipc in request.cells:
        yield study.section(dataset, ipc, request.scales[dataset], request.factors)


TARGETS = {
    "table1": Target(
        "Table 1: accuracy by data set and images per class", "table", paper.TABLE1_CELLS, _table1,
        (*_TABLE1_METHODS, "full"),
    ),
    "table2": Target(
        "Table 2: accuracy on other architectures", "table", (paper.TABLE2_CELL,), _table2, ("dm", "dam", "atom")
    ),
    "table4": Target("Table 4: what is matched", "table", (paper.TABLE4_CELL,), _table4, tuple(_TABLE4_ROWS)),
    "table5": Target("Table 5: the powers of attention", "table", (paper.TABLE5_CELL,), _table5, ("atom",)),
    "fig3": Target(
        "Figure 3: accuracy over iterations", "curves", (paper.FIGURE3_CELL,), _figure3, ("dm", "dam", "atom")
    ),
    "fig4": Target(
        "Figure 4: synthetic images", "grids", (("cifar10", 10), ("cifar100", 10), ("tiny", 1)), _grids, ("atom",)
    ),
    "fig5": Target("Figure 5: synthetic images", "grids", (("cifar10", 50),), _grids, ("atom",)),
    "fig6": Target("Figure 6: synthetic images", "grids", (("cifar100", 50),), _grids, ("atom",)),
    "fig7": Target("Figure 7: synthetic images", "grids", (("tiny", 10),), _grids, ("atom",)),
    "study": Target(
        "What the paper leaves open", "table", (("cifar10", 1), ("cifar10", 10)), _study, ("atom",)
    ),
}  # fmt: skip
