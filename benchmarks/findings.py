"""Pictures of accuracies: the paper's methods and this project's against seconds, one per finding, and the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import paper
from .accuracy.render import Measured, Record, read
from .methods import METHODS
from .plots import files_digest, panels, save, styled

OURS, PAPER = "tab:red", "0.45"
# Tiles of docs/figures/cifar10-ipc10.png in pixels: place of the first, side, and distance from one to the next.
FIRST_TILE, TILE, PITCH = (85, 8), 64, 66
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# DAM and ATOM overlap at 50 images per class.
MARKS = {"DM": ("o", OURS), "DAM": ("D", "white"), "ATOM": ("o", OURS)}
NAME, MARGIN, GAP = 150, 16, 28  # pixels for a name, around the picture, and between its two halves
PROTOCOLS = {
    "baseline": "InstanceNorm, preset's schedule",
    "evaluation_norm batch": "tested with BatchNorm",
    "norm batch": "distilled and tested with BatchNorm",
    "evaluation paper-fixed": "fixed learning rate",
    "evaluation paper-table7": "×0.5 every 15 epochs",
    "evaluation dc": "DC's: short, no augmentation",
    "evaluation datadam-code": "DataDAM's: long, batches of 64",
}


@styled
def plot_accuracy(path: Path, table1: Path) -> None:
    """Draw accuracy against seconds per distilled set: the paper's methods on its A100, and this project's."""
    record = read(table1)
    figure, axes = panels(1, len(paper.TABLE3_IPCS), 3.9)
    for column, ipc in enumerate(paper.TABLE3_IPCS):
        axis = axes[0][column]
        for method, (seconds, accuracy) in _printed(ipc).items():
            label = f"paper, {paper.TABLE3_DEVICE}: time per step × steps"
            axis.plot(seconds, accuracy, "o", mfc="white", mec=PAPER, color=PAPER, label=label)
            _label(axis, METHODS[method].title, seconds, accuracy, PAPER, above=method == "atom")
        for row in record.rows(f"cifar10:{ipc}"):
            label = f"atom_fast, {record.devices}: measured"
            shape, fill = MARKS[row.title]
            axis.errorbar(row.seconds, row.mean, row.std, fmt=shape, color=OURS, mfc=fill, capsize=2, label=label)
            _label(axis, row.title, row.seconds, row.mean, OURS, above=row.title == "ATOM")
        axis.set_xscale("log")
        axis.set_xlim(5, 1e5)
        axis.set_xticks([10, 100, 1000, 10000], ["10", "100", "1,000", "10,000"])
        axis.minorticks_off()
        axis.set_title(f"{ipc} image{'s' if ipc > 1 else ''} per class", loc="left")
        axis.set_xlabel("seconds per distilled set")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("CIFAR-10 test accuracy, %")
    save(figure, path, files_digest([table1]))


def _printed(ipc: int) -> dict[str, tuple[float, float]]:
    """Return the paper's seconds of a whole distillation and accuracy, by method."""
    found = {}
    for method, seconds in paper.TABLE3_SECONDS.items():
        step = seconds[paper.TABLE3_IPCS.index(ipc)]
        accuracy = paper.TABLE1.get(METHODS[method].title, {}).get(("cifar10", ipc))
        if method == "atom-channel" and ipc == 50:
            accuracy = paper.TABLE4[method]
        if accuracy and method in paper.ITERATIONS and not isinstance(step, str):
            found[method] = step[0] * paper.ITERATIONS[method], accuracy[0]
    return found


def _label(axis, text: str, x: float, y: float, colour: str, above: bool) -> None:
    """Write a name beside a point, slightly above or below it, since DAM and ATOM lie close to each other."""
    axis.annotate(
        text, (x, y), xytext=(6, 5 if above else -4), textcoords="offset points", color=colour, fontsize=8, va="center"
    )


@styled
def plot_norm_and_schedule(path: Path, studies: Sequence[Path]) -> None:
    """Draw the accuracy of one preset under other norms and other schedules of the test."""
    figure, axes = panels(1, len(studies), 2.6, sharey=True)
    for axis, study in zip(axes[0], studies, strict=True):
        rows = {row.title: row for row in read(study).rows("accuracy")}
        for place, name in enumerate(PROTOCOLS):
            row = rows[name]
            axis.barh(place, row.mean, 0.7, xerr=row.std, color=_colour(name), error_kw={"elinewidth": 1, "capsize": 2})
            axis.annotate(f"{row.mean:.1f}", (0.3, place), color="white", va="center", fontsize=8)
        axis.set_title(_images(read(study)), loc="left")
        axis.set_xlabel("accuracy, %")
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(PROTOCOLS)), PROTOCOLS.values())
    axes[0][0].invert_yaxis()
    sizes = {f"{record.iterations} steps, {record.preset['width']} channels" for record in map(read, studies)}
    save(figure, path, files_digest(studies), f"Short, narrow runs: {' and '.join(sorted(sizes))}")


def _images(record: Record) -> str:
    """Return the images per class of a record, without the data set."""
    return record.where.rpartition(", ")[2]


def _colour(name: str) -> str:
    return "0.35" if name == "baseline" else "#6a51a3" if "norm" in name else "#2b7bba"


@styled
def plot_loss_scale(path: Path, batch: Path, instance: Sequence[Path]) -> None:
    """Draw accuracy against the loss scale: BatchNorm at full size, and InstanceNorm in short, narrow runs."""
    figure, axes = panels(1, 2, 2.8)
    full = read(batch)
    _draw_scales(axes[0][0], full, "BatchNorm", "tab:red")
    axes[0][0].set_title(f"{full.iterations:,} steps, 128 channels, {full.devices}", loc="left")
    for study, colour in zip(map(read, instance), ("tab:blue", "tab:orange"), strict=True):
        _draw_scales(axes[0][1], study, "InstanceNorm", colour)
        axes[0][1].set_title(f"{study.iterations:,} steps, 32 channels, {study.devices}", loc="left")
    for axis in axes[0]:
        axis.set_xlabel("loss scale")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, %")
    save(figure, path, files_digest([batch, *instance]))


def _draw_scales(axis, record: Record, norm: str, colour: str) -> None:
    rows = {row.title: row for row in record.rows("accuracy")}
    points = {record.preset["loss_scale"]: rows["baseline"]}
    points |= {float(title.split()[1]): row for title, row in rows.items() if title.startswith("loss_scale ")}
    scales = sorted(points)
    means, stds = [points[scale].mean for scale in scales], [points[scale].std for scale in scales]
    label = f"{_images(record)}, {norm}"
    axis.errorbar(scales, means, stds, marker="o", markersize=4, capsize=3, color=colour, label=label)
    axis.set_xscale("log")
    axis.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axis.minorticks_off()


@styled
def plot_settings(path: Path, compared: Mapping[str, Mapping[str, Measured]], source: str, title: str) -> None:
    """Draw a dot per setting, with its standard deviation and its figure beside it.

    Args:
        path: file of the picture.
        compared: row of each setting by panel; all panels have the same settings.
        source: digest of the results, for the metadata.
        title: data set, sets and networks.
    """
    figure, axes = panels(1, len(compared), 2.2, sharex=True, sharey=True)
    for axis, (name, rows) in zip(axes[0], compared.items(), strict=True):
        for place, row in enumerate(rows.values()):
            colour = OURS if place else "0.35"
            axis.errorbar(row.mean, place, xerr=row.std, fmt="o", color=colour, markersize=6, capsize=3)
            figures, beside = f"{row.mean:.1f} ± {row.std:.1f}", (row.mean + row.std, place)
            look = {"color": colour, "va": "center", "bbox": {"color": "white", "pad": 1}}
            axis.annotate(figures, beside, xytext=(7, 0), textcoords="offset points", **look)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_title(name, loc="left")
        axis.set_xlabel("test accuracy, %; bars: standard deviation")
        axis.grid(axis="x", alpha=0.3)
    drawn = [row for rows in compared.values() for row in rows.values()]
    low, high = min(row.mean - row.std for row in drawn), max(row.mean + row.std for row in drawn)
    # Room for the figures to the right of the dots, which take more of a narrow panel.
    axes[0][0].set_xlim(low - 0.1 * (high - low), high + (0.05 + 0.2 * len(compared)) * (high - low))
    save(figure, path, source, title)


def plot_running_mean(path: Path, average: Path) -> None:
    """Draw the accuracy of the last iterate and of the running average of the same runs."""
    record = read(average)
    rows = {row.title: row for row in record.rows("accuracy")}
    settings = {"last iterate": rows["baseline"], "running average": rows["image_average True"]}
    compared = {_images(record): settings}
    plot_settings(path, compared, files_digest([average]), _measured(record, settings["running average"]))


def plot_unit_variance(path: Path, without: Path, divided: Path) -> None:
    """Draw the accuracy of DAM's and ATOM's set, tested as it was distilled and with unit variance."""
    records = {"as distilled": read(without), "unit variance": read(divided)}
    sides = {name: {row.title: row for row in record.rows("cifar10:10")} for name, record in records.items()}
    titles = {"DAM": "MMD + spatial", "ATOM": "MMD + spatial + channel"}
    record = records["unit variance"]
    compared = {
        f"{method}, {_images(record)}": {name: rows[title] for name, rows in sides.items()}
        for method, title in titles.items()
    }
    measured = _measured(record, sides["unit variance"][titles["ATOM"]])
    plot_settings(path, compared, files_digest([without, divided]), measured)


def _measured(record: Record, row: Measured) -> str:
    """Return data set, sets and networks of a row, and the steps of its runs."""
    sets = f"{row.sets} set{'s' if row.sets > 1 else ''} × {row.networks} networks"
    return f"{record.where.rpartition(', ')[0]}: {sets} per row, {record.iterations:,} steps"


def draw_classes(path: Path, picture: Path) -> None:
    """Draw the ten images of each class beside its name, two classes per line, from the picture of a run."""
    from PIL import Image, ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo

    half = NAME + len(CLASSES) * PITCH
    lines = len(CLASSES) // 2
    card = Image.new("RGB", (2 * MARGIN + 2 * half + GAP, 2 * MARGIN + lines * PITCH), "white")
    write, font = ImageDraw.Draw(card), ImageFont.load_default(26)
    with Image.open(picture) as drawn:
        for number, name in enumerate(CLASSES):
            top, left = FIRST_TILE[1] + number * PITCH, FIRST_TILE[0]
            row = drawn.convert("RGB").crop((left, top, left + len(CLASSES) * PITCH - 2, top + TILE))
            x, y = MARGIN + (number >= lines) * (half + GAP), MARGIN + number % lines * PITCH
            write.text((x + NAME - 12, y + TILE // 2), name, "black", font, anchor="rm")
            card.paste(row, (x + NAME, y))
    information = PngInfo()
    information.add_text("Source", files_digest([picture]))
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path, pnginfo=information)
