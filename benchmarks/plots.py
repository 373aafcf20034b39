"""Pictures of what was measured; each names in its metadata the figures it was drawn from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from atom_fast.roofline import BACKWARD_OPERATIONS, DEVICES, FORWARD_OPERATIONS, Device

from . import paper, scaling, table3
from .harness import load_results
from .merging import digest, merge
from .methods import METHODS
from .operators import WIDTH

PRECISION_NAMES = {"float32": "", "tf32": "", "bfloat16": " bfloat16"}
BAR = 0.12  # width of a bar; methods are 1 apart
# The baselines in greys; half as strong in bfloat16.
COLOURS = {
    "eager": "0.75",
    "eager-batched": "0.55",
    "compile": "0.3",
    "fused": "tab:orange",
    "fused-graph": "tab:red",
}
MARKERS = {
    "attention": "o",
    "block": "s",
    "first_block": "P",
    "instance_norm": "v",
    "batch_norm": "<",
    "augment": "^",
    "matching": "D",
}
# Arithmetic on a value, forward and backward, as `atom_fast.roofline` counts it. A block's is that of its norm and
# pooling, and of the maps, which are the attention operator's. Augmentation interpolates between four pixels.
MAPS = 10, 9
OPERATIONS = {
    "attention": MAPS,
    "block": (FORWARD_OPERATIONS, BACKWARD_OPERATIONS),
    "first_block": (FORWARD_OPERATIONS, BACKWARD_OPERATIONS),
    "instance_norm": (FORWARD_OPERATIONS - MAPS[0], BACKWARD_OPERATIONS - MAPS[1]),
    "batch_norm": (FORWARD_OPERATIONS - MAPS[0], BACKWARD_OPERATIONS - MAPS[1]),
    "augment": (20, 20),
    "matching": (3, 2),
}


def plot_table3(path: Path, edition: str, results: Sequence[Path]) -> None:
    """Draw run time and peak memory of every method and provider as bars, a panel for each number of images a class."""
    merged = merge(results)
    ipcs = table3.EDITIONS[edition].ipcs
    figure, axes = _panels(len(ipcs), sharex=True)
    for column, ipc in enumerate(ipcs):
        for row, value in enumerate((_milliseconds, _megabytes)):
            _draw_bars(axes[row][column], [cell for setting, cell in merged.items() if setting.ipc == ipc], value)
        axes[0][column].set_title(f"{ipc} image{'s' if ipc > 1 else ''} a class")
        if table3.EDITIONS[edition].device == "cuda":
            _draw_paper(axes[0][column], [paper.SECONDS[method][column] for method in METHODS])
            _draw_paper(axes[1][column], [paper.MEGABYTES[method][column] for method in METHODS])
    axes[0][0].set_ylabel("milliseconds a step")
    axes[1][0].set_ylabel("peak memory, MB")
    _finish(figure, table3.EDITIONS[edition].title, path, results)


def plot_scaling(path: Path, edition: str, results: Sequence[Path]) -> None:
    """Draw run time and peak memory of a step against each of the sizes that were varied.

    On a GPU, memory is that beyond what is held between steps: the data set grows with classes and resolution too.
    """
    described = scaling.EDITIONS[edition]
    merged = merge(results)
    figure, axes = _panels(len(described.values), sharex="col")
    for column, (field, values) in enumerate(described.values.items()):
        for row, value in enumerate((_milliseconds, _megabytes_of_a_step)):
            for label, line in scaling.lines(described, field).items():
                cells = {size: merged.get(setting) for size, setting in line.items()}
                points = {size: value(cell) for size, cell in cells.items() if cell and cell["status"] == "ok"}
                provider, _, chunk = label.partition(",")
                axes[row][column].plot(
                    points.keys(), points.values(), color=COLOURS[provider], label=label,
                    marker="s" if chunk else "o", linestyle="--" if chunk else "-",
                )  # fmt: skip
            _dress(axes[row][column])
        axes[0][column].set_xscale("log", base=2)
        axes[1][column].set_xticks(values, [str(size) for size in values])
        axes[1][column].set_xlabel(scaling.AXES[field])
    axes[0][0].set_ylabel("milliseconds a step")
    axes[1][0].set_ylabel("peak memory of a step, MB")
    base = described.base
    images = f"{base.ipc} image{'s' if base.ipc > 1 else ''} a class"
    sizes = f"{base.classes} classes, {images}, {base.resolution}×{base.resolution} where not varied"
    _finish(figure, f"ATOM on {described.title}: {sizes}", path, results)


def plot_roofline(path: Path, results: Path) -> None:
    """Draw the bytes a second that every kernel reached against its arithmetic intensity, below what could be reached.

    A kernel's bytes are the fewest it must move, so that what an implementation moves beyond them counts against it.
    """
    record = json.loads(results.read_text())
    name = record["environment"]["device"]
    copy = record["copy"]["bytes_per_second"]
    device = next((device for word, device in DEVICES.items() if word in name), None)
    dtypes = sorted({case["dtype"] for case in record["cases"]}, reverse=True)
    largest = max(case["bytes"] for case in record["cases"])
    figure, axes = _panels(len(dtypes), sharex=True, rows=1)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        _dress(axis)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        _draw_roof(axis, copy, device, "bfloat16" if dtype == "bfloat16" else "tf32")
        for case in record["cases"]:
            if case["dtype"] == dtype:
                _draw_kernel(axis, case, case["bytes"] / largest)
        axis.set_title(dtype)
        axis.set_xlabel("operations a byte")
    axes[0][0].set_ylabel("GB/s")
    title = f"Kernels against the roofline ({name}); filled: forward, hollow: backward; the larger, the more bytes"
    _save(figure, title, path, kernels_digest(results))


def _draw_roof(axis, copy: float, device: Device | None, precision: str) -> None:
    """What a copy reached in the same run and, where the datasheet is known, its bandwidth and arithmetic."""
    axis.axhline(copy / 1e9, color="black", linewidth=1, label="a copy in the same run")
    if device is None:
        return
    intensities = [2 ** (step / 8) for step in range(-8, 65)]
    for rate, style, units in ((device.vector, ":", "vector"), (device.matrix[precision], "--", "matrix")):
        least = [min(device.bandwidth, rate / intensity) / 1e9 for intensity in intensities]
        label = f"datasheet, {units} units"
        axis.plot(intensities, least, color="black", linestyle=style, linewidth=1, label=label)


def _draw_kernel(axis, case: dict, size: float) -> None:
    colour, marker = COLOURS[case["provider"]], MARKERS[case["operator"]]
    axis.scatter(
        _operations(case) / case["bytes"], case["bytes_per_second"] / 1e9, s=12 + 120 * size,
        marker=marker, edgecolor=colour, alpha=0.8, facecolor=colour if case["direction"] == "forward" else "none",
    )  # fmt: skip
    axis.scatter([], [], marker=marker, color="black", label=case["operator"].replace("_", " "))
    axis.scatter([], [], marker="_", linewidth=6, color=colour, label=case["provider"])


def _operations(case: dict) -> float:
    """Arithmetic of a case; of the first block with its convolution, which its backward has to compute again."""
    values = math.prod(case["shape"])
    backward = case["direction"] == "backward"
    if case["operator"] != "first_block":
        return OPERATIONS[case["operator"]][backward] * values
    outputs = values / case["shape"][1] * WIDTH
    return outputs * (OPERATIONS["first_block"][backward] + (1 + backward) * 2 * 9 * case["shape"][1])


def kernels_digest(path: Path) -> str:
    """Names the figures in a file of kernels.

    Raises:
        ValueError: it is no such file.
    """
    try:
        record = json.loads(path.read_text())
        figures = record["environment"]["device"], record["copy"]["bytes_per_second"], record["cases"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of `benchmarks.kernels` ({error!r}); it is left as it is") from error
    return hashlib.sha256(json.dumps(figures).encode()).hexdigest()[:16]


def _panels(columns: int, sharex, rows: int = 2) -> tuple:
    """A figure of rows of panels, without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3.5 * rows if rows > 1 else 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharey="row", sharex=sharex, squeeze=False)


def _finish(figure, title: str, path: Path, results: Sequence[Path]) -> None:
    where = load_results(results[0])["environment"]["device"]
    _save(figure, f"{title} ({where})", path, digest(results))


def _save(figure, title: str, path: Path, source: str) -> None:
    """Add legend and title, and write the picture with the name of the figures it was drawn from."""
    named = {
        name: handle for axis in figure.axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(len(named), 6), frameon=False)
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Source": source})


def _milliseconds(cell: dict) -> float:
    return cell["time"]["median"] * 1e3


def _megabytes(cell: dict) -> float | None:
    peak = cell["memory"]["peak_allocated"]
    return None if peak is None else peak / 1e6


def _megabytes_of_a_step(cell: dict) -> float | None:
    peak = cell["memory"]["peak_allocated"]
    return None if peak is None else (peak - cell["memory"].get("resident", 0)) / 1e6


def _draw_bars(axis, cells: list[dict], value: Callable[[dict], float | None]) -> None:
    for place, (method, described) in enumerate(METHODS.items()):
        labels = [(provider, precision) for provider in described.providers for precision in PRECISION_NAMES]
        own = {
            (cell["setting"]["provider"], cell["setting"]["precision"]): cell
            for cell in cells
            if cell["setting"]["method"] == method
        }
        present = [label for label in labels if label in own]
        for number, (provider, precision) in enumerate(present):
            cell = own[provider, precision]
            x = place + (number - (len(present) - 1) / 2) * BAR
            if cell["status"] != "ok":
                bottom = axis.get_xaxis_transform()
                axis.text(x, 0.02, cell["status"], transform=bottom, rotation=90, ha="center", va="bottom")
            elif value(cell) is not None:
                alpha = 0.5 if precision == "bfloat16" else 1
                name = f"{provider}{PRECISION_NAMES[precision]}"
                axis.bar(x, value(cell), BAR, color=COLOURS[provider], alpha=alpha, label=name)
    _dress(axis)
    axis.set_xticks(range(len(METHODS)), [method.title for method in METHODS.values()])


def _draw_paper(axis, printed: Sequence) -> None:
    """A dash at the paper's figure."""
    scale = [value[0] * 1e3 if isinstance(value, tuple) else value for value in printed]
    points = [(place, value) for place, value in enumerate(scale) if not isinstance(value, str)]
    x, y = zip(*points, strict=True)
    axis.plot(x, y, linestyle="none", marker="_", markersize=22, color="black", label=f"paper, {paper.DEVICE}")


def _dress(axis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
