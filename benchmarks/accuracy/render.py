"""Records of tables and figures as Markdown, for a run's own file and for the pages of the documentation."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atom_fast.distillation.config import default_norm
from benchmarks import markdown
from benchmarks.accuracy.record import FORMAT

NOTHING = "–"
# Names in "reduced" that are written as a number of something; others are written as a setting.
_COUNTED = {
    "sets per cell": "sets per cell",
    "networks per set": "networks per set",
    "iterations": "iterations",
    "real_batch": "real images per class per step",
    "width": "channels",
}
_SINGULAR = {"sets per cell": "set per cell", "networks per set": "network per set"}
_NORMS = {"batch": "BatchNorm", "instance": "InstanceNorm"}
# Settings that `Record.made` states for every file, because the preset's values have changed since some were measured.
_STATED = ("loss_scale", "image_average", "norm")


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measured entry of one row in one column.

    Attributes:
        title: the method, or the setting that differs from the baseline.
        mean, std: accuracy in per cent, over all networks.
        sets, wanted, networks: measured sets, sets to measure, and networks trained on each set.
        seconds: seconds of distilling one set, or None.
        paper: (mean, deviation) as printed, or None.
        to_base: (difference, standard error or None) to the row that the table compares with, or None.
    """

    title: str
    mean: float
    std: float
    sets: int
    wanted: int
    networks: int
    seconds: float | None
    paper: Sequence | None
    to_base: Sequence | None


@dataclasses.dataclass(frozen=True)
class Record:
    """A record as `benchmarks.accuracy.record.collect` makes it, with what pages and pictures need of it."""

    content: Mapping

    @property
    def columns(self) -> list[str]:
        """Columns of all sections."""
        return [column for section in self.content["sections"] for column in section["columns"]]

    @property
    def device(self) -> str:
        """Devices of the evaluations, in a sentence."""
        return " and ".join(
            "a CPU" if device == "cpu" else re.sub(r"NVIDIA (\S+).*", r"an NVIDIA \1", device)
            for device in self.content["devices"]
        )

    @property
    def devices(self) -> str:
        """Devices by name, for a legend."""
        return self.device.removeprefix("an ").replace("a CPU", "CPU")

    @property
    def iterations(self) -> int:
        """Most iterations of any set."""
        return max(configuration["config"]["iterations"] for configuration in self.content["configurations"].values())

    @property
    def where(self) -> str:
        """Data set and images per class, if there is only one of each."""
        titles = [section["title"] for section in self.content["sections"] if section["title"]] or self.columns
        titles = list(dict.fromkeys(titles))
        return self.place(titles[0]) if len(titles) == 1 else ""

    @property
    def preset(self) -> Mapping:
        """Settings of the configuration that changes the fewest."""
        return min(self.content["configurations"].values(), key=lambda entry: len(entry["settings"]))["config"]

    @property
    def made(self) -> str:
        """Norm, loss scale and kind of result of that configuration, at the time it was measured."""
        entry = min(self.content["configurations"].values(), key=lambda entry: len(entry["settings"]))
        config = entry["config"]
        norm = config["norm"] if config["norm"] != "auto" else default_norm(entry["dataset"], entry["ipc"])
        scale = [] if config["loss_scale"] is None else [f"loss scale {config['loss_scale']:g}"]
        return ", ".join([_NORMS[norm], *scale, "running average" if config.get("image_average") else "last iterate"])

    def place(self, column: str) -> str:
        """Return "cifar10:10" as a heading."""
        dataset, _, ipc = column.partition(":")
        if dataset not in self.content["data"]:
            return column
        return f"{self.content['data'][dataset]}, {images(ipc)}"

    def rows(self, column: str) -> list[Measured]:
        """Return the measured rows of a column."""
        return [
            _row(row["title"], row["entries"][column])
            for section in self.content["sections"]
            if column in section["columns"]
            for row in section["rows"]
            if _is_measured(row["entries"].get(column))
        ]


def _is_measured(entry: Mapping | None) -> bool:
    return bool(entry and entry["ours"] and entry["ours"]["mean"] is not None)


def _row(title: str, entry: Mapping) -> Measured:
    ours = entry["ours"]
    sets = ours.get("sets", 0)  # an average over architectures has none
    networks = ours["networks"] // sets if sets else 0
    seconds, to_base = ours.get("set_seconds"), entry.get("to_base")
    return Measured(title, ours["mean"], ours["std"], sets, entry["wanted"], networks, seconds, entry["paper"], to_base)


def read(path: Path) -> Record:
    """Read the record in a results file.

    Raises:
        ValueError: the file does not hold a record.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        record = Record(content)
        for column in record.columns:
            record.rows(column)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a record of a table or figure ({error!r}); it is left as it is") from error
    return record


def render(record: Record) -> str:
    """Return a record as Markdown: title, sizes, and a table per section with every row, measured or not."""
    content = record.content
    lines = [f"{content['title']}.", note(record)]
    if content["devices"]:
        lines.append(
            "Test accuracy after the last epoch in per cent: mean ± population standard deviation over all networks of "
            "all sets."
        )
    if any(section.get("base") and len(section["columns"]) == 1 for section in content["sections"]):
        lines.append("Differences pair sets of the same seed: mean ± standard error.")
    parts = ["\n".join(lines)]
    return "\n\n".join([*parts, *tables(record)])


def tables(record: Record, *, measured_only: bool = False) -> list[str]:
    """Return the table of every section, under its title if there are several; ``measured_only`` as in `table`."""
    parts, sections = [], record.content["sections"]
    for section, before in zip(sections, [None, *sections], strict=False):
        if section["title"] and len(sections) > 1 and (before is None or before["title"] != section["title"]):
            parts.append(f"**{record.place(section['title'])}**")
        parts.append(table(record, section, measured_only=measured_only))
    return parts


def note(record: Record) -> str:
    """Return where and at which size a record was measured: all differences from the paper, device and versions."""
    content, where = record.content, record.where
    sizes = [
        f"{where or name}: {'; '.join(_sizes(record, dataset)) or 'the size of the paper'}"
        for dataset, name in content["data"].items()
    ]
    made = f" {record.made}." if where and content["target"] not in ("study", "additions") else ""
    text = f"{'. '.join(sizes)}.{made}{_additions(record)}"
    if content["devices"]:
        text += f" Measured on {record.device}, {content['date']}, torch {content['versions']['torch']}."
    return markdown.paragraph(text)


def _additions(record: Record) -> str:
    """Return what a record of additions was made with; nothing for another record."""
    content = record.content
    if content["target"] != "additions":
        return ""
    made = [entry["config"] for entry in content["configurations"].values() if entry["method"] not in ("dm", "random")]
    pooled = [config for config in made if config["pool_networks"]] or made

    def stated(name: str, configurations: Sequence[Mapping]) -> str:
        values = dict.fromkeys(config[name] for config in configurations)
        return " or ".join(f"{value:,}" if isinstance(value, int) else _NORMS.get(value, value) for value in values)

    protocols = " and ".join(
        f"{name.partition(' (')[0]} ({one['epochs']:,} epochs)" for name, one in content["protocols"].items()
    )
    weight = max(config["calibration_weight"] for config in made)
    waves = max(config["characteristic_weight"] for config in made)
    easy = min(config["easy_fraction"] for config in made)
    parts = [
        f" Protocol {protocols}; networks of width {stated('width', pooled)} with {stated('norm', pooled)}; "
        f"{stated('iterations', pooled)} steps.",
        "*Partition* r: r² images on each stored one." if any(config["partition"] > 1 for config in made) else "",
        f"*Pool*: {stated('pool_networks', pooled)} networks, trained for {stated('pool_epochs', pooled)} epochs on "
        "the real images; the seconds per set are without that."
        if pooled is not made
        else "",
        f"*Cross-entropy*: of weight {weight:g}, in DM of the same rate (loss scale times weight)." if weight else "",
        f"*Characteristic function*: of weight {waves:g}, likewise." if waves else "",
        f"*Easiest*: {easy:.0%} of the real images of a class." if easy < 1 else "",
    ]
    return " ".join(filter(None, parts))


def _sizes(record: Record, dataset: str) -> list[str]:
    stated = _STATED if record.where and record.content["target"] != "additions" else ()
    return [_reduction(**entry) for entry in record.content["reduced"][dataset] if entry["name"] not in stated]


def _reduction(name: str, value: Any, usual: Any, dm: object = None) -> str:
    """Return a difference from the paper, such as "5 networks per set (paper: 20)"."""
    if name == "evaluation protocol":
        return f"evaluation schedule {value}"
    if isinstance(value, dict):  # settings of one method
        parts = [
            f"{own:,} iterations (published: {usual[setting]:,})" if setting == "iterations" else f"`{setting}` {own}"
            for setting, own in value.items()
        ]
        return f"{name}: {', '.join(parts)}"
    if name in _COUNTED:
        named = _SINGULAR.get(name, _COUNTED[name]) if value == 1 else _COUNTED[name]
        also = "" if dm is None else f"; DM {dm:,}"
        return f"{value:,} {named} (paper: {usual:,}{also})"
    return f"`{name}` {value}" if usual is None else f"`{name}` {value} (preset: {usual})"


def table(record: Record, section: Mapping, *, measured_only: bool = False) -> str:
    """Return a section as a Markdown table; ``measured_only`` leaves out rows that this project has not measured."""
    rows = [
        row
        for row in section["rows"]
        if not measured_only or any(_is_measured(row["entries"].get(column)) for column in section["columns"])
    ]
    if len(section["columns"]) == 1:
        return _one_column(section, rows)
    one_data_set = len(record.content["data"]) == 1
    head = [images(c.partition(":")[2]) if one_data_set and ":" in c else record.place(c) for c in section["columns"]]
    lines = [[row["title"], *(_combined(row["entries"].get(column)) for column in section["columns"])] for row in rows]
    return markdown.table([section["heading"] or " ", *head], lines)


def _one_column(section: Mapping, rows: Sequence[Mapping]) -> str:
    """Return one column in full: accuracy, sizes, the paper's figure, the difference to the base, and seconds."""
    [column] = section["columns"]
    base = section.get("base")
    entries = [(row["title"], row["entries"][column]) for row in rows if row["entries"].get(column)]
    seconds = [(entry["ours"] or {}).get("set_seconds") for _, entry in entries]
    columns = {"accuracy %": [_ours(entry) for _, entry in entries]}
    columns["sets × networks"] = [
        f"{ours['sets']} × {ours['networks'] // ours['sets']}" if (ours := entry["ours"]) else ""
        for _, entry in entries
    ]
    if any(entry["paper"] for _, entry in entries):
        columns["paper %"] = [
            figure(entry["paper"]) + (f" ({entry['source']})" if entry["source"] else "") for _, entry in entries
        ]
    if base:
        columns[f"difference to {base}"] = [difference(entry["to_base"]) for _, entry in entries]
    if any(value is not None for value in seconds):
        columns["seconds per set"] = ["" if value is None else f"{value:,.0f}" for value in seconds]
    titles = [title for title, _ in entries]
    return markdown.table([section["heading"] or "row", *columns], list(zip(titles, *columns.values(), strict=True)))


def _combined(entry: Mapping | None) -> str:
    """Return ours and the paper's figure in one cell."""
    if entry is None:
        return NOTHING
    source = f", {entry['source']}" if entry["source"] else ""
    if entry["cited"]:
        return f"{figure(entry['paper'])} (cited{source})" if entry["paper"] else NOTHING
    if entry["paper"] is None:
        return _ours(entry)
    return f"{_ours(entry)} (paper{source}: {figure(entry['paper'])})"


def _ours(entry: Mapping) -> str:
    """Return this project's accuracy, or the reason why there is none."""
    ours, failed = entry["ours"], entry["failed"]
    if entry["cited"]:
        return "(cited)" if entry["paper"] else NOTHING
    if ours is None:
        return "failed" if failed else "not measured" if entry["wanted"] else NOTHING
    if ours["mean"] is None:
        return "diverged"
    notes = [f"{ours['sets']} of {entry['wanted']} sets"] if ours.get("sets", entry["wanted"]) < entry["wanted"] else []
    notes += [f"{failed} failed"] if failed else []
    notes += [f"{ours['diverged']} networks diverged"] if ours.get("diverged") else []
    return f"{ours['mean']:.1f} ± {ours['std']:.1f}" + (f" ({', '.join(notes)})" if notes else "")


def accuracy(row: Measured) -> str:
    """Return "56.3 ± 0.6"."""
    return f"{row.mean:.1f} ± {row.std:.1f}"


def figure(value: Sequence | None) -> str:
    """Return the paper's (mean, deviation) as printed."""
    if value is None:
        return NOTHING
    mean, deviation = value
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def difference(value: Sequence | None) -> str:
    """Return a signed difference and its standard error."""
    if value is None:
        return NOTHING
    mean, error = value
    text = f"{round(mean, 1) or 0.0:+.1f}".replace("-", "−")
    return text if error is None else f"{text} ± {error:.1f}"


def images(ipc: str | int) -> str:
    """Return "10 images per class"."""
    return f"{ipc} image{'' if str(ipc) == '1' else 's'} per class"
