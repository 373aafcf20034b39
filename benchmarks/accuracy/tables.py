"""The paper's tables and figures as rows and columns of cells, beside the paper's figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks import paper
from benchmarks.accuracy import additions, study
from benchmarks.accuracy.cells import Cell, Evaluation
from benchmarks.accuracy.datasets import DATASETS
from benchmarks.accuracy.entries import Entry, Job, Row, Section, jobs_for, make_cell
from benchmarks.accuracy.size import RunSize, size_for
from benchmarks.methods import METHODS, get_method

_TABLE1_METHODS = (
    "random", "herding", "k-center", "forgetting", "dd", "ld", "dc", "dcc", "dsa", "dsac", "dm", "cafe", "cafe-dsa",
    "mtt", "tesla", "frepo", "dam", "atom-channel", "atom",
)  # fmt: skip
_TABLE2_METHODS = ("dc", "cafe", "dsa", "dm", "dam", "atom")
_TABLE4_ROWS = {
    "random": METHODS["random"].title,
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
    """Cells as (data set, images per class), methods (None: all of the target), factors, and a size per data set."""

    cells: tuple[tuple[str, int], ...]
    methods: tuple[str, ...] | None
    sizes: Mapping[str, RunSize]
    factors: tuple[str, ...] | None = None

    def runs(self, method: str) -> bool:
        """Return True if a method of the target is to be run."""
        return self.methods is None or method in self.methods


Unit = tuple[Cell, tuple[Evaluation, ...]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table or figure, in sections, and the size of each data set in it."""

    target: str
    title: str
    kind: str  # "table", "curves" or "grids"
    sections: tuple[Section, ...]
    sizes: Mapping[str, RunSize]

    @property
    def methods(self) -> set[str]:
        """Methods of all cells."""
        return {cell.method for cell, _ in self.units}

    @property
    def units(self) -> list[Unit]:
        """All cells with their evaluations, each once: first one set of every entry, then the second, and so on."""
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
    """A name on the command line: title, kind, default cells, a function that makes its sections, and methods."""

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
    **size,
) -> Plan:
    """Return the cells of a table or figure.

    Args:
        target: a key of ``TARGETS``.
        cells: (data set, images per class); None: the paper's.
        methods: methods to run; others show the paper's figures. None: all that this project runs.
        factors: factors of the study; None: all.
        **size: keyword arguments of `size_for`.

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
    sizes = {dataset: size_for(dataset, **size) for dataset, _ in cells}
    factors = tuple(dict.fromkeys(factors)) if factors else None
    request = Request(cells, tuple(methods) if methods else None, sizes, factors)
    return Plan(target, described.title, described.kind, tuple(described.build(request)), sizes)


def parse_cell(text: str) -> tuple[str, int]:
    """Return ``"cifar10:10"`` as ("cifar10", 10).

    Raises:
        ValueError: the text does not have that form.
    """
    dataset, _, ipc = text.strip().partition(":")
    if dataset not in DATASETS or not ipc.isdecimal() or int(ipc) < 1:
        raise ValueError(
            f"a cell is DATASET:IPC, such as cifar10:10, with a data set of {', '.join(DATASETS)}; got {text!r}"
        )
    return dataset, int(ipc)


def _table1(request: Request) -> Iterable[Section]:
    columns = {f"{dataset}:{ipc}": (dataset, ipc) for dataset, ipc in request.cells}
    by_title = {METHODS[method].title: method for method in _TABLE1_METHODS}
    titles = list(dict.fromkeys([*paper.TABLE1, *by_title]))
    for last in ("DAM", "ATOM†", "ATOM"):
        titles.append(titles.pop(titles.index(last)))
    hard, learnt = [], []
    for title in titles:
        method, entries = by_title.get(title), {}
        run = method is not None and request.runs(method)
        for column, (dataset, ipc) in columns.items():
            figure = paper.TABLE1.get(title, {}).get((dataset, ipc))
            jobs = jobs_for(request.sizes[dataset], dataset, ipc, method) if run else ()
            if figure is not None or jobs:
                entries[column] = Entry(figure, jobs)
        if entries:
            learns_labels = METHODS[method].learns_labels if method else title in paper.LEARNT_LABELS
            (learnt if learns_labels else hard).append(Row(title, entries))
    entries = {}
    for column, (dataset, _) in columns.items():
        jobs = jobs_for(request.sizes[dataset], dataset, 0, "full") if request.runs("full") else ()
        entries[column] = Entry(paper.FULL_DATA.get(dataset), jobs)
    hard.append(Row(METHODS["full"].title, entries))
    yield Section("", "method", tuple(columns), tuple(hard))
    if learnt:
        yield Section("", "method, labels learnt", tuple(columns), tuple(learnt))


def _table2(request: Request) -> Iterable[Section]:
    for dataset, ipc in request.cells:
        if dataset == "digits":
            raise ValueError("table2 needs images of 32×32 for VGG-11; use digits32, which are digits of that size")
        printed = paper.TABLE2 if (dataset, ipc) == paper.TABLE2_CELL else {}
        rows = []
        for title in ("DC", "CAFE", "DSA", "DM", "KIP", "DAM", "ATOM"):
            method = title.lower()
            run = method in _TABLE2_METHODS and request.runs(method)
            figures, entries = printed.get(title, {}), {}
            for network, column in _NETWORK_TITLES.items():
                jobs = jobs_for(request.sizes[dataset], dataset, ipc, method, network=network) if run else ()
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
            jobs = jobs_for(request.sizes[place[0]], *place, method) if request.runs(method) else ()
            entries[column] = Entry(figure, jobs, source=source)
        rows.append(Row(title, entries))
    yield Section("", "matched", tuple(columns), tuple(rows), _TABLE4_ROWS["mmd"])


def _table5(request: Request) -> Iterable[Section]:
    for dataset, ipc in request.cells:
        for name in ("spatial_power", "channel_power"):
            if name in request.sizes[dataset].settings:
                raise ValueError(f"table5 varies {name} itself; do not give --set {name}=")
        rows = []
        for channel in paper.POWERS:
            entries = {}
            for spatial in paper.POWERS:
                figure = paper.TABLE5[channel, spatial] if (dataset, ipc) == paper.TABLE5_CELL else None
                powers = {"channel_power": float(channel), "spatial_power": float(spatial)}
                jobs = jobs_for(request.sizes[dataset], dataset, ipc, "atom", changes=powers)
                entries[f"p_s = {spatial}"] = Entry(figure, jobs)
            rows.append(Row(f"p_c = {channel}", entries))
        columns = tuple(f"p_s = {spatial}" for spatial in paper.POWERS)
        yield Section(f"{dataset}:{ipc}", "", columns, tuple(rows))


def _figure3(request: Request) -> Iterable[Section]:
    for dataset, ipc in request.cells:
        size, rows, columns = request.sizes[dataset], [], {}
        for method in ("dm", "dam", "atom"):
            if not request.runs(method):
                continue
            last = make_cell(size, dataset, ipc, method, 0).config.iterations
            milestones = tuple(sorted({max(1, round(last * part / MILESTONES)) for part in range(1, MILESTONES + 1)}))
            entries = {
                str(iteration): Entry(None, jobs_for(size, dataset, ipc, method, milestones, iteration=iteration))
                for iteration in milestones
            }
            rows.append(Row(METHODS[method].title, entries))
            columns |= dict.fromkeys(entries)
        yield Section(f"{dataset}:{ipc}", "iterations", tuple(sorted(columns, key=int)), tuple(rows))


def _grids(request: Request) -> Iterable[Section]:
    for dataset, ipc in request.cells:
        jobs: tuple[Job, ...] = ((make_cell(request.sizes[dataset], dataset, ipc, "atom", 0), None),)
        yield Section(f"{dataset}:{ipc}", "", ("images",), (Row("ATOM", {"images": Entry(None, jobs)}),))


def _study(request: Request) -> Iterable[Section]:
    for dataset, ipc in request.cells:
        yield study.section(dataset, ipc, request.sizes[dataset], request.factors)


def _additions(request: Request) -> Iterable[Section]:
    for dataset, ipc in request.cells:
        yield from additions.sections(dataset, ipc, request.sizes[dataset], request.methods)


TARGETS = {
    "table1": Target(
        "Table 1: accuracy by data set and images per class", "table", paper.TABLE1_CELLS, _table1,
        (*_TABLE1_METHODS, "full"),
    ),
    "table2": Target(
        "Table 2: accuracy on other architectures", "table", (paper.TABLE2_CELL,), _table2, _TABLE2_METHODS
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
    "additions": Target(
        "What known additions give", "table", (("cifar10", 1), ("cifar10", 10), ("cifar10", 50)), _additions,
        (*additions.SELECTED, *additions.DISTILLED),
    ),
}  # fmt: skip
