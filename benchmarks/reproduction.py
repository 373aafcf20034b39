"""Results of ``atom-fast reproduce`` as docs/results.md shows them: Table 1, details of each file, open settings."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from atom_fast.distillation.config import default_norm
from benchmarks.accuracy.tables import FORMAT, markdown

PREFIX = "reproduce-"
TABLE1 = "cifar10-table1"
# They show that a target runs at a small size, and are too small to conclude anything from.
UNSHOWN = ("digits-table1", "digits-table2", "digits-table5", "digits-fig3")
UNBROKEN = "\u00a0±\u00a0"  # in narrow columns
AS_IN_THE_PAPER = "the paper's size"
ROWS = {"preset paper": "baseline", "Random (nothing is matched)": "Random"}
# Words of "reduced" as the page says them; older files say "networks a set".
REDUCED = {
    "sets per cell": "sets per cell",
    "networks per set": "networks per set",
    "sets a cell": "sets per cell",
    "networks a set": "networks per set",
    "real_batch": "real images per class per step",
    "width": "channels",
}
NORMS = {"batch": "BatchNorm", "instance": "InstanceNorm"}
# Stated for every file as the settings it was made with, not as differences to a preset that has changed since.
STATED = re.compile(r"`(loss_scale|image_average|norm)` ")
FEW = 3  # rows that are told in a sentence


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one row of a table in one column.

    Attributes:
        title: the method, or the setting that differs from the preset.
        mean, std: accuracy in per cent, over all networks.
        sets, wanted, networks: how many were measured, were to be, and were trained on each.
        seeds: of the sets.
        accuracies: of every network, set by set.
        seconds, evaluation_seconds: of one set, and of training and testing its networks.
        paper: (mean, deviation) as printed, or None.
        to_base: (difference, standard error or None) to the row that the table compares with, or None.
    """

    title: str
    mean: float
    std: float
    sets: int
    wanted: int
    networks: int
    seeds: tuple[int, ...]
    accuracies: list[list[float]]
    seconds: float | None
    evaluation_seconds: float | None
    paper: Sequence | None
    to_base: Sequence | None


@dataclasses.dataclass(frozen=True)
class Record:
    """A results file.

    Attributes:
        path: where it lies.
        content: as it was read.
    """

    path: Path
    content: Mapping

    @property
    def columns(self) -> list[str]:
        return [column for section in self.content["sections"] for column in section["columns"]]

    @property
    def device(self) -> str:
        return " and ".join("a CPU" if device == "cpu" else _short(device) for device in self.content["devices"])

    @property
    def devices(self) -> str:
        """The devices by name, as a legend has them."""
        return self.device.removeprefix("an ").replace("a CPU", "CPU")

    @property
    def iterations(self) -> int:
        return max(configuration["config"]["iterations"] for configuration in self.content["configurations"].values())

    @property
    def where(self) -> str:
        """Data set and images per class, where there is only one of each."""
        sections = self.content["sections"]
        return self.place(sections[0]["title"] or sections[0]["columns"][0])

    def place(self, column: str) -> str:
        """ "cifar10:10" as it stands in a heading."""
        dataset, _, ipc = column.partition(":")
        if dataset not in self.content["data"]:
            return column
        return f"{self.content['data'][dataset]}, {ipc} image{'' if ipc == '1' else 's'} per class"

    @property
    def preset(self) -> Mapping:
        """The settings of the row that changes the fewest: the preset's."""
        return min(self.content["configurations"].values(), key=lambda entry: len(entry["settings"]))["config"]

    def rows(self, column: str) -> list[Row]:
        """The rows that were measured in a column."""
        found = []
        for section in self.content["sections"]:
            for row in section["rows"]:
                entry = row["entries"].get(column)
                if column in section["columns"] and entry and entry["ours"] and entry["ours"]["mean"] is not None:
                    found.append(_row(row["title"], entry))
        return found


def _row(title: str, entry: Mapping) -> Row:
    ours = entry["ours"]
    sets = ours.get("sets", 0)
    return Row(
        title,
        ours["mean"],
        ours["std"],
        sets,
        entry.get("wanted", sets),
        ours["networks"] // sets if sets else 0,
        tuple(ours.get("seeds", ())),
        ours.get("accuracies", []),
        ours.get("set_seconds"),
        ours.get("evaluation_seconds"),
        entry["paper"],
        entry.get("to_base"),
    )


def _short(device: str) -> str:
    return re.sub(r"NVIDIA (\S+).*", r"an NVIDIA \1", device)


def read(path: Path) -> Record:
    """Read a results file.

    Raises:
        ValueError: the file is not what ``atom-fast reproduce`` wrote.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        record = Record(path, content)
        assert all(isinstance(record.rows(column), list) for column in record.columns)
        return record
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not what atom-fast reproduce wrote ({error!r}); it is left as it is") from error


def sections(results: Path) -> dict[str, str]:
    """By name, every section of the page: Table 1, the open settings, and the details of every file that is shown."""
    records = {path.stem.removeprefix(PREFIX): read(path) for path in sorted(results.glob(f"{PREFIX}*.json"))}
    table = table1(records[TABLE1]) if TABLE1 in records else ""
    shown = {name: details(record) for name, record in records.items() if name not in (TABLE1, *UNSHOWN)}
    return {"table1": table, "open": open_settings(records), **shown}


def table1(record: Record) -> str:
    """Table 1: this project's rows beside the paper's."""
    columns = record.columns
    head = ["accuracy in %", *(text for column in columns for text in (_images(column), "paper"))]
    rows = []
    for title in dict.fromkeys(row.title for column in columns for row in record.rows(column)):
        cells = [title]
        for column in columns:
            row = next((row for row in record.rows(column) if row.title == title), None)
            fewer = "¹" if row and row.sets < row.wanted else ""
            cells += [f"{_accuracy(row)}{fewer}", _figure(row.paper)] if row else ["–", "–"]
        rows.append(cells)
    rows.append(["ATOM: seconds per set", *(text for column in columns for text in (_seconds(record, column), ""))])
    own = [row for column in columns for row in record.rows(column) if row.title == "ATOM"]
    gaps = [round(row.paper[0] - row.mean, 1) for row in own]
    below = _fill(
        f"ATOM is {min(gaps):.1f} to {max(gaps):.1f} points below the paper's figures. {_leads(record)} ¹: one set."
    )
    table = markdown(head, rows).replace(" ± ", UNBROKEN)
    return f"{note(record)}\n\n{table}\n\n{below}"


def _leads(record: Record) -> str:
    """How far ATOM is above DAM, column by column."""
    leads = []
    for column in record.columns:
        rows = {row.title: row for row in record.rows(column)}
        if "ATOM" in rows and "DAM" in rows:
            leads.append(f"{rows['ATOM'].mean - rows['DAM'].mean:+.1f} at {_images(column)}")
    return f"ATOM less DAM, in points: {', '.join(leads)}." if leads else ""


def _seconds(record: Record, column: str) -> str:
    return next((f"{row.seconds:.0f}" for row in record.rows(column) if row.title == "ATOM"), "–")


def _images(column: str) -> str:
    _, _, ipc = column.partition(":")
    return f"{ipc} image{'' if ipc == '1' else 's'} per class"


def details(record: Record) -> str:
    """What was measured, as a table under the sizes that differ from the paper's."""
    columns = record.columns
    if len(columns) > 1:
        return f"{note(record)}\n\n{_combined(record, columns)}"
    if record.content["target"] == "study":
        return _fill(f"{_note(record)} {_studied(record, columns[0])}")
    if len(record.rows(columns[0])) <= FEW:
        return _fill(f"{_note(record)} {_told(record, columns[0])}")
    return f"{note(record)}\n\n{_detailed(record, columns[0])}"


def _studied(record: Record, column: str) -> str:
    """A study's baseline; its other rows are in the table of open settings unless they are few."""
    base, *others = record.rows(column)
    text = f"Baseline, {_made(record)}: {_sentence(base)}."
    if len(others) <= FEW:
        return f"{text} {'. '.join(f'`{row.title}`: {_sentence(row)}' for row in others)}."
    epochs = ", ".join(
        f"{name.partition(' (')[0]} {protocol['epochs']:,}" for name, protocol in record.content["protocols"].items()
    )
    return f"{text} Epochs by schedule: {epochs}."


def _told(record: Record, column: str) -> str:
    """Few rows in a sentence."""
    return f"{'. '.join(f'{ROWS.get(row.title, row.title)}: {_sentence(row)}' for row in record.rows(column))}."


def _sentence(row: Row) -> str:
    parts = [f"{_accuracy(row)} %", f"difference {_difference(row.to_base)}" if row.to_base else ""]
    parts += [f"{row.sets} set{'s' * (row.sets > 1)} × {row.networks} networks"]
    parts += [
        f"paper {_figure(row.paper)}" if row.paper else "",
        f"{row.seconds:,.0f} s per set" if row.seconds else "",
    ]
    first, *rest = filter(None, parts)
    return f"{first} ({', '.join(rest)})"


def note(record: Record) -> str:
    """Where and at what size it was measured: sets, networks and settings that differ from the paper's."""
    return _fill(_note(record))


def _note(record: Record) -> str:
    content = record.content
    one = len(record.columns) == 1
    sizes = [
        f"{record.where if one else name}: {'; '.join(_sizes(record, dataset)) or AS_IN_THE_PAPER}"
        for dataset, name in content["data"].items()
    ]
    torch = content["versions"]["torch"]
    made = f" {_made(record)}." if one and content["target"] != "study" else ""
    return f"{'. '.join(sizes)}.{made} Measured on {record.device}, {content['date']}, torch {torch}."


def _fill(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


def _sizes(record: Record, dataset: str) -> list[str]:
    sizes = map(_plain, record.content["reduced"][dataset])
    return [size for size in sizes if len(record.columns) > 1 or not STATED.match(size)]


def _made(record: Record) -> str:
    """Norm, loss scale and result of the rows, or of a study's baseline, as they were when it was measured."""
    configuration = min(record.content["configurations"].values(), key=lambda entry: len(entry["settings"]))
    config = configuration["config"]
    norm = config["norm"] if config["norm"] != "auto" else default_norm(configuration["dataset"], configuration["ipc"])
    scale = [] if config["loss_scale"] is None else [f"loss scale {config['loss_scale']:g}"]
    result = "running average" if config.get("image_average") else "last iterate"
    return ", ".join([NORMS[norm], *scale, result])


def _plain(reduced: str) -> str:
    """ "networks per set 5 instead of 20" as "5 networks per set (paper: 20)"."""
    match = re.fullmatch(r"(.*) (\S+) instead of (.*)", reduced)
    if match is None:
        return reduced.replace("evaluation protocol", "evaluation schedule")
    name, value, usual = match.groups()
    value = f"{int(value):,}" if value.isdigit() else value
    usual = re.sub(r" \((.*)\)", r"; \1", usual)
    if name == "iterations" or name in REDUCED:
        named = REDUCED.get(name, name)
        one = value == "1" and named in ("sets per cell", "networks per set")
        return f"{value} {named.replace('s ', ' ', 1) if one else named} (paper: {usual})"
    return f"`{name}` {value}" if usual == "the preset's" else f"`{name}` {value} (preset: {usual})"


def _detailed(record: Record, column: str) -> str:
    rows = record.rows(column)
    base = next((section.get("base") for section in record.content["sections"]), None)
    shown = {
        "paper": any(row.paper for row in rows),
        "base": any(row.to_base for row in rows),
        "seconds": any(row.seconds is not None for row in rows),
    }
    head = [record.content["sections"][0]["heading"] or "row", "accuracy %", "sets × networks"]
    head += ["paper %"] * shown["paper"] + [f"difference to {ROWS.get(base, base)}"] * shown["base"]
    head += ["seconds per set"] * shown["seconds"]
    lines = []
    for row in rows:
        cells = [ROWS.get(row.title, row.title), _accuracy(row), f"{row.sets} × {row.networks}"]
        cells += [_figure(row.paper)] * shown["paper"] + [_difference(row.to_base)] * shown["base"]
        cells += [f"{row.seconds:,.0f}"] * shown["seconds"]
        lines.append(cells)
    return markdown(head, lines)


def _combined(record: Record, columns: Sequence[str]) -> str:
    by_column = {column: {row.title: row for row in record.rows(column)} for column in columns}
    titles = dict.fromkeys(title for rows in by_column.values() for title in rows)
    head = [record.content["sections"][0]["heading"] or " ", *(_heading(record, column) for column in columns)]
    lines = [
        [ROWS.get(title, title), *(_accuracy(rows[title]) if title in rows else "–" for rows in by_column.values())]
        for title in titles
    ]
    return markdown(head, lines)


def _heading(record: Record, column: str) -> str:
    return _images(column) if column.partition(":")[0] in record.content["data"] else column


def _accuracy(row: Row) -> str:
    return f"{row.mean:.1f} ± {row.std:.1f}"


def _figure(value: Sequence | None) -> str:
    if value is None:
        return "–"
    mean, deviation = value
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def _difference(value: Sequence | None) -> str:
    if value is None:
        return "–"
    difference, error = value
    text = f"{round(difference, 1) or 0.0:+.1f}".replace("-", "−")
    return text if error is None else f"{text} ± {error:.1f}"


@dataclasses.dataclass(frozen=True)
class Open:
    """A setting that the paper leaves open.

    Attributes:
        setting: its name, a link to the evidence.
        paper: what paper and public code say.
        choice: the preset's.
        effects: what is compared, with the row of each file that shows it.
        evidence: anchor on the page of the figures.
    """

    setting: str
    paper: str
    choice: str
    effects: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    evidence: str


def _in_studies(row: str) -> tuple[tuple[str, str], ...]:
    return (("cifar10-ipc1-study", row), ("cifar10-ipc10-study", row))


OPEN = (
    Open(
        "norm, in distillation and test",
        "InstanceNorm; DataDAM's code: BatchNorm",
        "BatchNorm for CIFAR at 10 and more images per class, InstanceNorm otherwise",
        (("BatchNorm in both", _in_studies("norm batch")), ("in the test only", _in_studies("evaluation_norm batch"))),
        "norm-and-schedule-of-the-test",
    ),
    Open(
        "schedule of the test",
        "fixed rate (§4.1); ×0.5 every 15 epochs (Table 7); DataDAM's code: 1,800 epochs",
        "1,000 epochs, ×0.1 once at half",
        (
            ("fixed rate", _in_studies("evaluation paper-fixed")),
            ("×0.5 every 15 epochs", _in_studies("evaluation paper-table7")),
            ("DC's: fewer epochs, no augmentation", _in_studies("evaluation dc")),
            ("DataDAM's: more epochs, batches of 64", _in_studies("evaluation datadam-code")),
        ),
        "norm-and-schedule-of-the-test",
    ),
    Open(
        "loss scale",
        "none; DataDAM's code: 100",
        "10 with InstanceNorm, 0.3 × images per class with BatchNorm",
        (
            ("1 instead of 10", _in_studies("loss_scale 1")),
            ("100 instead of 10", _in_studies("loss_scale 100")),
            ("1 instead of 3, BatchNorm, 8,000 steps", (("cifar10-ipc10-scale", "loss_scale 1"),)),
            ("10 instead of 3, BatchNorm, 8,000 steps", (("cifar10-ipc10-scale", "loss_scale 10"),)),
        ),
        "loss-scale",
    ),
    Open(
        "result of a run",
        "the last iterate",
        "a running average with BatchNorm, the last iterate otherwise",
        (("running average, 1,000 steps", (("cifar10-ipc10-average", "image_average True"),)),),
        "running-mean",
    ),
    Open(
        "initial images",
        "random real images; DataDAM's code can start from a chosen set",
        "random real images",
        (
            ("herding, 500 steps", (("cifar10-ipc10-start", "image_init herding"),)),
            ("herding, 1,000 steps", (("cifar10-ipc10-start-unit", "image_init herding"),)),
            ("herding, 8,000 steps at 50 images per class", (("cifar10-ipc50-start", "image_init herding"),)),
        ),
        "initial-images",
    ),
    Open(
        "whitening (ZCA)",
        "ZCA; MTT: of raw pixels, DataDAM's code: of standardised pixels",
        "of raw pixels",
        (
            ("standardised first", _in_studies("preprocessing zca_standardized")),
            ("none", _in_studies("preprocessing standard")),
        ),
        "other-settings",
    ),
    Open(
        "pooling",
        "3×3, stride 2 (§4.1); public code: 2×2",
        "2×2",
        (("3×3", _in_studies("pooling avg3")),),
        "other-settings",
    ),
    Open(
        "initial weights",
        "normal (§4.1), uniform (Table 7); public code: PyTorch's default",
        "PyTorch's default with BatchNorm, normal otherwise",
        (
            ("default instead of normal", _in_studies("network_init default")),
            ("uniform instead of normal", _in_studies("network_init uniform")),
        ),
        "other-settings",
    ),
)


def open_settings(records: Mapping[str, Record]) -> str:
    """What the paper leaves open, as one table; what was not measured is left out."""
    lines = []
    for row in OPEN:
        effects = [text for name, places in row.effects if (text := _effect(records, name, places))]
        if effects:
            lines.append([f"[{row.setting}](#{row.evidence})", row.paper, row.choice, "<br>".join(effects)])
    effect = "effect in points at 1 / 10 images per class (one figure: at 10)"
    table = markdown(["setting", "paper and public code", "preset `paper`", effect], lines)
    return table.replace(" ± ", UNBROKEN) if lines else ""


def _effect(records: Mapping[str, Record], name: str, places: Sequence[tuple[str, str]]) -> str:
    found = [
        _difference(row.to_base)
        for file, title in places
        if file in records
        for row in records[file].rows("accuracy")
        if row.title == title
    ]
    return f"{name}: {' / '.join(found)}" if found else ""
