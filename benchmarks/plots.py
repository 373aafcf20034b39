"""Pictures of what was measured; each names in its metadata the figures it was drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import paper, scaling, table3
from .harness import load_results
from .merging import digest, merge
from .methods import METHODS

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
    """Draw run time and peak memory of a step against each of the sizes that were varied."""
    described = scaling.EDITIONS[edition]
    merged = merge(results)
    figure, axes = _panels(len(described.values), sharex="col")
    for column, (field, values) in enumerate(described.values.items()):
        for row, value in enumerate((_milliseconds, _megabytes)):
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
    axes[1][0].set_ylabel("peak memory, MB")
    base = described.base
    sizes = f"{base.classes} classes, {base.ipc} images a class, {base.resolution}×{base.resolution} where not varied"
    _finish(figure, f"ATOM on {described.title}: {sizes}", path, results)


def _panels(columns: int, sharex) -> tuple:
    """A figure of two rows of panels, without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 7), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(2, columns, sharey="row", sharex=sharex, squeeze=False)


def _finish(figure, title: str, path: Path, results: Sequence[Path]) -> None:
    """Add legend and title, and write the picture with the name of the figures it was drawn from."""
    named = {
        name: handle for axis in figure.axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False)
    where = load_results(results[0])["environment"]["device"]
    figure.suptitle(f"{title} ({where})", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Source": digest(results)})


def _milliseconds(cell: dict) -> float:
    return cell["time"]["median"] * 1e3


def _megabytes(cell: dict) -> float | None:
    peak = cell["memory"]["peak_allocated"]
    return None if peak is None else peak / 1e6


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
