"""Sections of docs/results.md: Table 1, the settings that the paper leaves open, and every results file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import markdown
from benchmarks.accuracy import TARGETS
from benchmarks.accuracy.render import Measured, Record, accuracy, difference, figure, images, note, read, tables

TABLE1 = "cifar10-table1"
# They show that a target runs at a small size, and are too small to conclude anything from.
UNSHOWN = ("digits-table2", "digits-table5", "digits-fig3")
UNBROKEN = "\u00a0±\u00a0"  # in narrow columns
FEW = 3  # rows that fit a sentence


def sections(folder: Path) -> dict[str, str]:
    """Return every section of the page by name: Table 1, the open settings, and each file that is shown."""
    records = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    first = table1(records[TABLE1]) if TABLE1 in records else ""
    together = {name: record for name, record in records.items() if record.content["target"] == "additions"}
    alone = {name: record for name, record in records.items() if name not in (TABLE1, *UNSHOWN, *together)}
    shown = {name: details(record) for name, record in alone.items()}
    return {"table1": first, "open": open_settings(records), "additions": additions(together), **shown}


def additions(records: Mapping[str, Record]) -> str:
    """Return the section of the records of additions, with the command of each; "" where there are none."""
    if not records:
        return ""
    about = markdown.paragraph(
        "Additions of other papers to DM, DAM and ATOM, one after the other, all else equal. The first table of a cell "
        "compares every method with DM of the same additions: what attention gives on top of them. The second compares "
        "ATOM with ATOM alone. A partitioned set stores as many images and trains as more: compare it with Random and "
        "Herding of the same partition, not with sets without one."
    )
    shown = (f"{details(record)}\n\n```sh\n{_command(record)}  # {name}\n```" for name, record in records.items())
    return "\n\n".join(("## What known additions give", about, *shown))


def _command(record: Record) -> str:
    """Return the command that measures a record of one data set again."""
    content = record.content
    [(dataset, size)] = content["sizes"].items()
    cells = ",".join(dict.fromkeys(section["title"] for section in content["sections"]))
    changed = {entry["name"]: entry["value"] for entry in content["reduced"][dataset]}
    methods = {entry["method"] for entry in content["configurations"].values()}
    options = {
        "cells": cells,
        "methods": ",".join(name for name in TARGETS["additions"].methods if name in methods),
        "seeds": size["sets"],
        "networks": size["networks"],
        "protocol": changed.get("evaluation protocol"),
        "epochs": changed.get("evaluation epochs"),
        "selection-epochs": changed.get("epochs before images are chosen"),
    }
    settings = [f"--set {name}={'none' if value is None else value}" for name, value in size["settings"].items()]
    given = [f"--{name} {value}" for name, value in options.items() if value is not None]
    return " ".join(("python -m benchmarks additions", *given, *settings, "--data-dir data"))


def table1(record: Record) -> str:
    """Return Table 1: the measured rows beside the paper's, in narrow columns."""
    columns = record.columns
    head = ["accuracy in %", *(text for column in columns for text in (_images(column), "paper"))]
    lines = []
    for title in dict.fromkeys(row.title for column in columns for row in record.rows(column)):
        cells = [title]
        for column in columns:
            row = next((row for row in record.rows(column) if row.title == title), None)
            fewer = "¹" if row and row.sets < row.wanted else ""
            cells += [f"{accuracy(row)}{fewer}", figure(row.paper)] if row else ["–", "–"]
        lines.append(cells)
    atom = {column: row for column in columns for row in record.rows(column) if row.title == "ATOM"}
    seconds = (f"{atom[column].seconds:.0f}" if column in atom else "–" for column in columns)
    lines.append(["ATOM: seconds per set", *(text for value in seconds for text in (value, ""))])
    gaps = [round(row.paper[0] - row.mean, 1) for row in atom.values()]
    below = markdown.paragraph(
        f"ATOM is {min(gaps):.1f} to {max(gaps):.1f} points below the paper's figures. {_leads(record)} ¹: one set."
    )
    return f"{note(record)}\n\n{markdown.table(head, lines).replace(' ± ', UNBROKEN)}\n\n{below}"


def _leads(record: Record) -> str:
    """Return ATOM's lead over DAM, column by column."""
    leads = []
    for column in record.columns:
        rows = {row.title: row for row in record.rows(column)}
        if "ATOM" in rows and "DAM" in rows:
            leads.append(f"{rows['ATOM'].mean - rows['DAM'].mean:+.1f} at {_images(column)}")
    return f"ATOM less DAM, in points: {', '.join(leads)}." if leads else ""


def _images(column: str) -> str:
    return images(column.partition(":")[2])


def details(record: Record) -> str:
    """Return the sizes of a results file and its measured rows: few rows as a sentence, more as a table."""
    columns, parts = record.columns, [note(record)]
    if len(columns) == 1 and record.content["target"] == "study":
        return markdown.paragraph(f"{parts[0]} {_study(record, record.rows(columns[0]))}")
    if len(columns) == 1 and len(record.rows(columns[0])) <= FEW:
        return markdown.paragraph(
            f"{parts[0]} {'. '.join(f'{row.title}: {_sentence(row)}' for row in record.rows(columns[0]))}."
        )
    return "\n\n".join([*parts, *tables(record, measured_only=True)])


def _study(record: Record, rows: Sequence[Measured]) -> str:
    """Return a study's baseline, and its other rows if they are few; otherwise the open settings show them."""
    base, *others = rows
    text = f"Baseline, {record.made}: {_sentence(base)}."
    if len(others) <= FEW:
        return f"{text} {'. '.join(f'`{row.title}`: {_sentence(row)}' for row in others)}."
    epochs = ", ".join(
        f"{name.partition(' (')[0]} {protocol['epochs']:,}" for name, protocol in record.content["protocols"].items()
    )
    return f"{text} Epochs by schedule: {epochs}."


def _sentence(row: Measured) -> str:
    parts = [
        f"difference {difference(row.to_base)}" if row.to_base else "",
        f"{row.sets} set{'s' * (row.sets > 1)} × {row.networks} networks",
        f"paper {figure(row.paper)}" if row.paper else "",
        f"{row.seconds:,.0f} s per set" if row.seconds else "",
    ]
    return f"{accuracy(row)} % ({', '.join(filter(None, parts))})"


@dataclasses.dataclass(frozen=True)
class Open:
    """A setting that the paper leaves open.

    Attributes:
        setting: name, a link to the evidence.
        paper: values in the paper and in public code.
        choice: value in the preset.
        effects: each comparison, with the files and rows that show it.
        evidence: anchor of the figures on the page.
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
        "running-average",
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
    """Return the settings that the paper leaves open as one table, without effects that were not measured."""
    lines = []
    for row in OPEN:
        effects = [text for name, places in row.effects if (text := _effect(records, name, places))]
        if effects:
            lines.append([f"[{row.setting}](#{row.evidence})", row.paper, row.choice, "<br>".join(effects)])
    effect = "effect in points at 1 / 10 images per class (one figure: at 10)"
    head = ["setting", "paper and public code", "preset `paper`", effect]
    return markdown.table(head, lines).replace(" ± ", UNBROKEN) if lines else ""


def _effect(records: Mapping[str, Record], name: str, places: Sequence[tuple[str, str]]) -> str:
    found = [
        difference(row.to_base)
        for file, title in places
        if file in records
        for row in records[file].rows("accuracy")
        if row.title == title
    ]
    return f"{name}: {' / '.join(found)}" if found else ""
