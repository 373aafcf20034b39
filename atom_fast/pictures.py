"""Draw grids of images and loss curves, and format results as text."""

from __future__ import annotations

import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atom_fast._files import write_atomically
from atom_fast.names import LOG_FILE

if TYPE_CHECKING:
    from atom_fast.synthetic import SyntheticSet

CELL_SIZE = 64  # target side of an enlarged image in pixels, so that 8 x 8 digits and 64 x 64 photographs are visible
MARGIN = 8  # pixels around the grid and beside the names
# Pixels; a grid of many images is enlarged less, or shrunk to no less than CELL_SIZE, so that viewers can open it.
LARGEST_SIDE = 6000
# Further terms and networks by setting, as the names of methods call them.
_ADDITIONS = {"pool_networks": "pool", "characteristic_weight": "cf", "calibration_weight": "ce"}


def save_image_grid(
    pixels: torch.Tensor,
    path: str | os.PathLike,
    *,
    columns: int,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Write images to one PNG in row-major order, small ones enlarged by an integer factor, many large ones shrunk.

    Args:
        pixels: float ``[N, C, H, W]`` in [0, 1] with 1 or 3 channels, on any device; other values are clamped.
        path: PNG file to write or replace.
        columns: images per row; ``columns=ipc`` shows one class per row if the images are sorted by class.
        class_names: one name per row, written to its left, or one name per image, written below it.
        title: line above the images.

    Returns:
        ``path``.

    Raises:
        ValueError: wrong shape, no images, or a number of names that matches neither rows nor images.
        OSError: the file could not be written.
    """
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(f"pixels must be [N, 1 or 3, H, W] and not empty; got {list(pixels.shape)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    count, rows = len(pixels), math.ceil(len(pixels) / columns)
    if class_names is not None and len(class_names) not in (rows, count):
        accepted = f"{rows} names (one per row) or {count} (one per image)"
        raise ValueError(f"class_names must hold {accepted}; got {len(class_names)}")
    columns = min(columns, count)
    image = _draw_grid(pixels, rows, columns, class_names, title)
    buffer = io.BytesIO()
    # Repeated pixels compress well as runs; zlib's default strategy takes forty times as long.
    image.save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return write_atomically(path, buffer.getvalue())


def save_synthetic_grid(synthetic: SyntheticSet, path: str | os.PathLike, title: str | None = None) -> Path:
    """Write the stored images of a synthetic set to one PNG, with a partition its sheets.

    One row per class, or ten images per row if every class has one; rows of smaller classes are padded with white. See
    :func:`save_image_grid` for arguments, result and errors.
    """
    pixels = synthetic.sheet_pixels()[torch.argsort(synthetic.sheet_labels, stable=True)]
    sizes = [size // synthetic.partition**2 for size in synthetic.class_sizes]
    largest = max(sizes)
    names = [name for name, size in zip(synthetic.class_names, sizes, strict=True) if size]
    if largest == 1:
        return save_image_grid(pixels, path, columns=min(10, len(pixels)), class_names=names, title=title)
    blank = pixels.new_ones(1, *pixels.shape[1:])
    rows = [torch.cat([row, blank.expand(largest - len(row), -1, -1, -1)]) for row in pixels.split(sizes) if len(row)]
    return save_image_grid(torch.cat(rows), path, columns=largest, class_names=names, title=title)


def save_run_pictures(folder: str | os.PathLike, synthetic: SyntheticSet) -> None:
    """Write ``synthetic.png`` and ``loss.png`` of a finished run into its folder.

    Raises:
        OSError: a file could not be written.
    """
    folder = Path(folder)
    save_synthetic_grid(synthetic, folder / "synthetic.png", title=describe(synthetic))
    save_loss_curves(folder / LOG_FILE, folder / "loss.png", title=describe(synthetic))


def describe(synthetic: SyntheticSet) -> str:
    """Describe a synthetic set in one line: data set, size, method and iterations, if its metadata contains them."""
    metadata, config = synthetic.metadata, synthetic.metadata.get("config", {})
    size = count_images(synthetic) if synthetic.ipc is None else f"{synthetic.ipc} per class"
    if synthetic.partition > 1 and synthetic.ipc is not None:
        size = f"{synthetic.ipc} sheets of {synthetic.partition**2} images per class"
    parts = [metadata.get("dataset"), size, metadata.get("method") or method_name(config)]
    parts.append(f"{config['iterations']} iterations" if "iterations" in config else None)
    return ", ".join(part for part in parts if part)


def count_images(synthetic: SyntheticSet) -> str:
    """Return how many images a set trains as, and with a partition their sheets: ``80 images on 20 sheets``."""
    return f"{len(synthetic)} images" + (f" on {len(synthetic.sheets)} sheets" if synthetic.partition > 1 else "")


def method_name(config: Mapping[str, object]) -> str:
    """Name a configuration's method, such as "dsa"; "synthetic" if ``config`` is empty.

    Matching is named by what it matches, such as "atom+pool+ce": the attention maps come first, then "pool" (trained
    networks), "cf" (characteristic functions), "ce" (cross-entropy) and "easy" (only the easiest real images).
    """
    if not config:
        return "synthetic"
    method = config.get("method", "matching")  # settings of before there were others lack it
    if method != "matching":
        return str(method)
    added = "".join(f"+{name}" for setting, name in _ADDITIONS.items() if config.get(setting))
    return _matched(config) + added + ("+easy" if config.get("easy_fraction", 1.0) != 1.0 else "")


def _matched(config: Mapping[str, object]) -> str:
    names = {(True, True): "atom", (False, True): "atom-channel", (True, False): "datadam", (False, False): "dm"}
    name = names[config.get("spatial_power") is not None, config.get("channel_power") is not None]
    if not config.get("feature_maps"):
        return name
    return "feature-maps" if name == "dm" else f"{name}-feature-maps"


def _draw_grid(pixels, rows: int, columns: int, class_names: Sequence[str] | None, title: str | None):
    from PIL import Image, ImageDraw, ImageFont

    height, width = pixels.shape[2:]
    cell_height, cell_width = _cell(rows, columns, height, width)
    resampling = Image.Resampling.NEAREST if cell_height >= height else Image.Resampling.BOX
    by_row = class_names is not None and len(class_names) == rows
    font, heading = ImageFont.load_default(size=13 if by_row else 11), ImageFont.load_default(size=14)
    names = [_fit(name, font, 160 if by_row else cell_width) for name in class_names or ()]
    left = MARGIN + (math.ceil(max(map(font.getlength, names))) + MARGIN if by_row else 0)
    title = _fit(title, heading, LARGEST_SIDE) if title else None
    top = MARGIN + (24 if title else 0)
    row_height, column_width = cell_height + (2 if by_row or not names else 18), cell_width + 2
    canvas_width = max(left + columns * column_width, math.ceil(heading.getlength(title or "")) + MARGIN) + MARGIN
    canvas = Image.new("RGB", (canvas_width, top + rows * row_height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, MARGIN), title, fill="black", font=heading)
    for row in range(rows if by_row else 0):
        draw.text((left - MARGIN, top + row * row_height + cell_height / 2), names[row], "black", font, anchor="rm")
    for index, array in enumerate(_rgb_bytes(pixels)):
        x, y = left + index % columns * column_width, top + index // columns * row_height
        canvas.paste(Image.fromarray(array).resize((cell_width, cell_height), resampling), (x, y))
        if names and not by_row:
            draw.text((x + cell_width / 2, y + cell_height + 2), names[index], "black", font, anchor="ma")
    return canvas


def _rgb_bytes(pixels: torch.Tensor):
    rgb = pixels.detach().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return (rgb.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().cpu().numpy()


def _cell(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """Return height and width in pixels at which each image is drawn."""
    side = max(rows * height, columns * width)
    wanted = math.ceil(CELL_SIZE / max(height, width))
    scale = max(1, min(wanted, LARGEST_SIDE // side))
    shrunk = max(1, min(math.ceil(side / LARGEST_SIDE), min(height, width) // CELL_SIZE))
    return scale * height // shrunk, scale * width // shrunk


def _fit(name: str, font, width: float) -> str:
    name = name[:200]  # each step of the loop measures the whole string
    shortened, characters = name, len(name)
    while characters > 1 and font.getlength(shortened) > width:
        characters -= 1
        shortened = name[:characters] + "…"
    return shortened


def read_log(path: str | os.PathLike) -> list[dict]:
    """Read the records of a JSON-lines log in order; an incomplete last line, left by a crash, is dropped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line before the last is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no log {path}")
    lines = path.read_text("utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is not a JSON object: {line[:80]!r}") from error
    return records


def save_loss_curves(log: str | os.PathLike, path: str | os.PathLike, title: str | None = None) -> Path:
    """Plot the loss terms of a run over its iterations to one PNG, on a logarithmic scale if all are positive.

    Args:
        log: JSON lines from ``distill``; every number whose name ends in ``loss`` becomes a curve.
        path: PNG file to write or replace.
        title: line above the plot.

    Returns:
        ``path``.

    Raises:
        FileNotFoundError: ``log`` does not exist.
        ValueError: the log is damaged or contains no losses.
        OSError: the file could not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = loss_curves(read_log(log))
    if not curves:
        raise ValueError(f"{log} contains no losses: expected records such as {{'iteration': 10, 'loss': 0.5}}")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        iterations, values = zip(*points, strict=True)
        marker = "." if len(points) == 1 else ""
        axes.plot(iterations, values, marker=marker, linewidth=1.2, label=name.replace("_", " "))
    positive = all(value > 0 for points in curves.values() for _, value in points)
    axes.set(xlabel="iteration", ylabel="loss", yscale="log" if positive else "linear")
    axes.set_title(title or "", parse_math=False)
    return save_curves(figure, path)


def save_curves(figure, path: str | os.PathLike) -> Path:
    """Add grid and legend to every plot of a matplotlib figure, and write it as PNG.

    Raises:
        OSError: the file could not be written.
    """
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return write_atomically(path, buffer.getvalue())


def loss_curves(records: Iterable[dict]) -> dict[str, list[tuple[int, float]]]:
    """Return the losses of a log's records, by name, as (iteration, value); what is not a finite number is left out."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if not _is_finite(record.get("iteration")):
            continue
        for name, value in record.items():
            if name.endswith("loss") and _is_finite(value):
                curves.setdefault(name, []).append((record["iteration"], value))
    return curves


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300  # a plot needs room to subtract


def size_text(result: Mapping[str, Any]) -> str:
    """Return a set's size as a line shows it, after a blank: `` ipc=10``, and with a partition what it trains as.

    Args:
        result: ``ipc``, None for classes of different sizes, and perhaps ``partition``.
    """
    ipc, partition = result["ipc"], result.get("partition", 1)  # older results have none
    text = "" if ipc is None else f" ipc={ipc}"
    if partition > 1:
        text += f" partition={partition}" + ("" if ipc is None else f" ({ipc * partition**2} images per class)")
    return text


def result_line(result: Mapping[str, Any]) -> str:
    """Format a result as one line, such as ``digits ipc=10 atom 96.1 ± 0.3 random 91.1 ± 1.0`` (per cent).

    Args:
        result: ``dataset``, ``ipc``, ``method``, ``accuracy_mean``, ``accuracy_std``, with a partition ``partition``
            and, if Random was evaluated, ``random_mean`` and ``random_std``.
    """
    line = f"{result['dataset']}{size_text(result)} {result['method']} {_accuracy(result, 'accuracy')}"
    return f"{line} random {_accuracy(result, 'random')}" if result.get("random_mean") is not None else line


def comparison_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Format results (see :func:`result_line`, with optional ``seconds``) as an aligned Markdown table."""
    head = ("data set", "images per class", "method", "accuracy %", "random %", "distillation s")
    rows = [
        (
            result["dataset"],
            _images_per_class(result),
            result["method"],
            _accuracy(result, "accuracy"),
            _accuracy(result, "random") if result.get("random_mean") is not None else "",
            f"{result['seconds']:.0f}" if result.get("seconds") is not None else "",
        )
        for result in results
    ]
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    table = (head, ["-" * width for width in widths], *rows)
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    )


def _images_per_class(result: Mapping[str, Any]) -> str:
    ipc, partition = result["ipc"], result.get("partition", 1)
    if partition == 1:
        return str(ipc)
    return f"sheets of {partition**2}" if ipc is None else f"{ipc} sheets, {ipc * partition**2} images"


def _accuracy(result: Mapping[str, Any], name: str) -> str:
    if result[f"{name}_mean"] is None:
        return "diverged"
    return f"{result[f'{name}_mean']:.1f} ± {result[f'{name}_std']:.1f}"
