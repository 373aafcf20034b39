"""Pictures of measured times, memory and bandwidth; each has the digest of its results in its metadata.

All pictures are white cards 8 inches wide at 200 dots per inch: sharp at the 800 pixels of a README column, and
readable on a light and on a dark page.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from . import paper, scaling, table3
from .harness import load_results
from .methods import TIMED, Workload
from .timings import digest, in_order, merge, variant

WIDTH, DPI = 8.0, 200
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
IMPLEMENTATION_NAMES = {
    "eager": "eager, class by class",
    "eager-batched": "eager, all classes at once",
    "compile": "torch.compile",
    "compile-graph": "torch.compile, CUDA graph",
    "compile-max-autotune": "torch.compile, autotuned, CUDA graph",
    "fused": "atom_fast",
    "fused-graph": "atom_fast, CUDA graph",
}
# The baselines in greys.
COLOURS = {
    "eager": "0.78",
    "eager-batched": "0.58",
    "compile": "0.3",
    "compile-graph": "0.15",
    "compile-max-autotune": "0.15",
    "fused": "tab:orange",
    "fused-graph": "tab:red",
}
OPERATOR_NAMES = {
    "attention": "attention maps",
    "norm_block": "norm, ReLU, maps, pooling",
    "conv_block": "convolution and block",
    "instance_norm": "InstanceNorm, ReLU, pooling",
    "batch_norm": "BatchNorm, ReLU, pooling",
    "augment": "augmentation",
    "decode": "decoding and augmentation",
    "matching": "class means",
}
LAYOUT_NAMES = {"nchw": ", NCHW", "channels_last": ",\nchannels_last", "rows": ""}
# Bound by their launch on a GPU, so that their bandwidth says nothing.
LAUNCH_BOUND = ("augment", "decode", "matching")
# Real images of a CIFAR-10 step: the largest tensors.
SHAPES = ([1280, 128, 32, 32], [1280, 3, 32, 32], [1280, 1152])
BARS = {
    ("float32", "forward"): "#1f4e79",
    ("float32", "backward"): "#6fa8dc",
    ("bfloat16", "forward"): "#b45f06",
    ("bfloat16", "backward"): "#f6b26b",
}


def styled(draw: Callable) -> Callable:
    """Call a drawing function under this module's style; matplotlib's global style is unchanged."""

    @functools.wraps(draw)
    def wrapper(*arguments, **options):
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **options)

    return wrapper


def panels(rows: int, columns: int, height: float, **options) -> tuple:
    """Return a figure and its panels [rows][columns], without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, path: Path, source: str, title: str = "", columns: int = 4) -> None:
    """Add a legend below and a title, and write the picture with the digest of its results."""
    named = {
        name: handle for axis in figure.axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(len(named), columns))
    if title:
        figure.suptitle(title, fontsize=10.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Source": source})


def files_digest(paths: Sequence[Path]) -> str:
    """Return a digest of the contents of files."""
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


# Table 3


@styled
def plot_table3(path: Path, edition: str, results: Sequence[Path]) -> None:
    """Draw time and peak memory of every method that was measured, a line of dots per implementation."""
    merged = merge(results)
    measured = [ipc for ipc in table3.EDITIONS[edition].ipcs if any(workload.ipc == ipc for workload in merged)]
    chosen = {ipc: [cell for workload, cell in merged.items() if workload.ipc == ipc] for ipc in measured}
    rows = {ipc: _dot_rows(cells, ipc, table3.EDITIONS[edition].device == "cuda") for ipc, cells in chosen.items()}
    heights = [1.0 + 0.2 * len(own) for own in rows.values()]
    figure, axes = panels(len(measured), 2, 0.3 + sum(heights), sharey="row", height_ratios=heights)
    for row, ipc in zip(axes, measured, strict=True):
        for place, axis in enumerate(row):
            _draw_dots(axis, rows[ipc], place)
        images = f"{ipc} image{'s' if ipc > 1 else ''} per class"
        row[0].set_title(f"ms per step, {images}", loc="left")
        row[1].set_title("peak memory in MB", loc="left")
    where = load_results(results[0])["environment"]["device"]
    save(figure, path, digest(results), where)


# A line of the picture: name, colour, and time and memory (a status if it was not measured).
Dots = tuple[str, str, tuple[float | str | None, float | str | None]]


def _dot_rows(cells: list[dict], ipc: int, with_paper: bool) -> list[Dots]:
    rows = []
    printed = (_paper_milliseconds(ipc), _paper_megabytes(ipc)) if with_paper else ({}, {})
    for method, described in TIMED.items():
        own = _own(cells, method)
        if own and method in printed[0]:
            shown = printed[0][method], printed[1].get(method)
            rows.append((f"{described.title}: paper, {paper.TABLE3_DEVICE}", "black", shown))
        for cell in own:
            implementation = cell["workload"]["implementation"]
            name = f"{described.title}: {IMPLEMENTATION_NAMES[implementation]}{variant(Workload(**cell['workload']))}"
            ended = cell["status"] == "ok"
            shown = (_milliseconds(cell), _megabytes(cell)) if ended else (cell["status"],) * 2
            rows.append((name, COLOURS[implementation], shown))
    return rows


def _own(cells: list[dict], method: str) -> list[dict]:
    """Return a method's cells in the order of the table, without former implementations."""
    own = {Workload(**cell["workload"]): cell for cell in cells if cell["workload"]["method"] == method}
    return [own[workload] for workload in in_order(own)]


def _draw_dots(axis, rows: list[Dots], column: int) -> None:
    """Draw a dot per row on a logarithmic axis with its figure at its right; the paper's is hollow."""
    for place, (_, colour, values) in enumerate(rows):
        value = values[column]
        if isinstance(value, str):
            axis.text(0.02, place, value, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
        elif value is not None:
            face = "white" if colour == "black" else colour
            axis.plot(value, place, "o", color=colour, mfc=face, markersize=6)
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axis.annotate(text, (value, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8.5)
    names = [name for name, _, _ in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    for place in range(1, len(rows)):
        if names[place].partition(":")[0] != names[place - 1].partition(":")[0]:
            axis.axhline(place - 0.5, color="0.8", linewidth=0.8)
    _logarithmic(axis, "x")
    sizes = [values[column] for _, _, values in rows if isinstance(values[column], float | int)]
    axis.set_xlim(0.7 * min(sizes), 3 * max(sizes))  # at the right there is room for the figures


def _paper_milliseconds(ipc: int) -> dict[str, float]:
    column = paper.TABLE3_IPCS.index(ipc)
    found = {method: values[column] for method, values in paper.TABLE3_SECONDS.items()}
    return {method: value[0] * 1e3 for method, value in found.items() if not isinstance(value, str)}


def _paper_megabytes(ipc: int) -> dict[str, float]:
    column = paper.TABLE3_IPCS.index(ipc)
    found = {method: values[column] for method, values in paper.TABLE3_MEGABYTES.items()}
    return {method: value for method, value in found.items() if not isinstance(value, str)}


# Scaling


@styled
def plot_scaling(path: Path, edition: str, results: Sequence[Path]) -> None:
    """Draw time and peak memory of a step against each varied size.

    Memory on a GPU excludes what is held between steps, since the data set grows with classes and resolution too.
    """
    described = scaling.EDITIONS[edition]
    merged = merge(results)
    figure, axes = panels(2, len(described.values), 5.0, sharex="col", sharey="row")
    for column, (field, values) in enumerate(described.values.items()):
        for row, value in enumerate((_milliseconds, _megabytes_of_a_step)):
            for label, line in scaling.lines(described, field).items():
                cells = {size: merged.get(workload) for size, workload in line.items()}
                points = {size: value(cell) for size, cell in cells.items() if cell and cell["status"] == "ok"}
                implementation, _, chunk = label.partition(",")
                axes[row][column].plot(
                    points.keys(),
                    points.values(),
                    color=COLOURS[implementation],
                    linestyle="--" if chunk else "-",
                    marker="s" if chunk else "o",
                    markersize=4,
                    label=IMPLEMENTATION_NAMES[implementation] + _chunked(chunk),
                )
            _logarithmic(axes[row][column], "y")
        axes[0][column].set_xscale("log", base=2)
        axes[1][column].set_xticks(values, [str(size) for size in values])
        axes[1][column].set_xlabel(scaling.AXES[field])
    axes[0][0].set_ylabel("milliseconds per step")
    axes[1][0].set_ylabel("peak memory of a step, MB")
    base = described.base
    images = f"{base.ipc} image{'s' if base.ipc > 1 else ''} per class"
    where = load_results(results[0])["environment"]["device"]
    sizes = f"{base.classes} classes, {images}, {base.resolution}×{base.resolution} unless varied"
    title = f"ATOM on {described.title} ({where}); {sizes}"
    save(figure, path, digest(results), title)


def _chunked(chunk: str) -> str:
    return f",{chunk.replace(' at once', ' at a time')}" if chunk else ""


# Bandwidth


@styled
def plot_bandwidth(path: Path, results: Sequence[Path]) -> None:
    """Draw the operators' shares of a copy's bandwidth, by data type and direction; a stroke marks eager PyTorch.

    Captured calls only: others include the host's time to launch them.

    An operator's bytes are the fewest that it must move, so whatever else an implementation moves counts against it.
    """
    cases = bandwidth_cases(results)
    groups: dict[tuple[str, str], list] = {}
    for (operator, layout, dtype, direction, implementation), case in cases.items():
        if implementation == "fused" and case["captured"] and operator not in LAUNCH_BOUND:
            groups.setdefault((operator, layout), []).append(((dtype, direction), case))
    figure, axes = panels(1, 1, 1.2 + sum(0.12 + 0.155 * len(group) for group in groups.values()))
    axis, place, ticks = axes[0][0], 0.0, {}
    for (operator, layout), group in groups.items():
        ticks[place + (len(group) - 1) / 2] = OPERATOR_NAMES[operator] + LAYOUT_NAMES[layout]
        for kind, case in sorted(group, key=lambda item: list(BARS).index(item[0])):
            eager = cases.get((operator, layout, *kind, "eager"))
            _draw_share(axis, place, kind, case["share_of_copy"], eager and eager["share_of_copy"])
            place += 1
        place += 0.8
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, 105)
    axis.set_xlabel("share of the bandwidth of a copy in the same run, %")
    axis.grid(axis="x")
    where = json.loads(results[0].read_text())["environment"]["device"]
    save(figure, path, kernels_digest(results), where, columns=5)


def _draw_share(axis, place: float, kind: tuple[str, str], share: float, eager: float | None) -> None:
    axis.barh(place, 100 * share, 0.95, color=BARS[kind], label=", ".join(kind))
    text = f"{100 * share:.0f} %"
    axis.annotate(text, (100 * share, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5)
    if eager is not None:
        axis.vlines(100 * eager, place - 0.47, place + 0.47, color="black", label="eager PyTorch")


def bandwidth_cases(results: Sequence[Path]) -> dict[tuple, dict]:
    """Return the cases at the size of a CIFAR-10 step's real images.

    Keys are operator, layout, data type, direction and implementation; cases say if they were ``captured`` as CUDA
    graphs. A file of one operator (``kernels-gpu-block.json``) is newer than the file of all operators, and replaces
    its cases.

    Raises:
        ValueError: a file is not one of `benchmarks.kernels`.
    """
    found = {}
    for path in sorted(results, key=lambda path: (len(path.name), path.name)):
        try:
            record = json.loads(path.read_text())
            # Before calls were captured, the copy was a case like the others.
            captured = "operator" not in record.get("copy", {"operator": "copy"})
            for case in record["cases"]:
                if case["shape"] in SHAPES and "share_of_copy" in case:
                    key = case["operator"], case["layout"], case["dtype"], case["direction"], case["implementation"]
                    found[key] = {**case, "captured": captured}
        except (ValueError, KeyError, TypeError) as error:
            message = f"{path} is not a file of `benchmarks.kernels` ({error!r}); it is left as it is"
            raise ValueError(message) from error
    order = {name: place for place, name in enumerate(OPERATOR_NAMES)}
    return dict(sorted(found.items(), key=lambda item: (order[item[0][0]], item[0][1] != "nchw")))


def kernels_digest(paths: Sequence[Path]) -> str:
    """Return a digest of the shares in files of kernels.

    Raises:
        ValueError: as `bandwidth_cases`.
    """
    figures = [[*key, case["captured"], case["share_of_copy"]] for key, case in bandwidth_cases(paths).items()]
    return hashlib.sha256(json.dumps(figures).encode()).hexdigest()[:16]


def _milliseconds(cell: dict) -> float:
    return cell["time"]["median"] * 1e3


def _megabytes(cell: dict) -> float | None:
    peak = cell["memory"]["peak_allocated"]
    return None if peak is None else peak / 1e6


def _megabytes_of_a_step(cell: dict) -> float | None:
    peak = cell["memory"]["peak_allocated"]
    return None if peak is None else (peak - cell["memory"].get("resident", 0)) / 1e6


def _logarithmic(axis, which: str) -> None:
    """Make an axis, "x" or "y", logarithmic with plain numbers and a grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    own = getattr(axis, f"{which}axis")
    own.set_major_locator(LogLocator(subs=(1, 3) if which == "y" else (1,)))
    own.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    own.set_minor_formatter(NullFormatter())
    axis.grid(axis=which)
