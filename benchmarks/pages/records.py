"""The section of docs/records.md: accuracies that were reached, in how many seconds, and how to repeat each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import markdown
from benchmarks.accuracy.cells import read_json
from benchmarks.accuracy.datasets import DATASETS
from benchmarks.accuracy.render import images
from benchmarks.paper import TABLE1
from benchmarks.records import FORMAT, STAGES

WHOLE, PARTITIONED = "whole", "partitioned"

# The highest published accuracies known to this project, in per cent, of ConvNets of the same size. Both sets are
# partitioned. IDC: Kim et al., ICML 2022; NCFM: Wang et al., CVPR 2025.
PUBLISHED = {("cifar10", 1): ("IDC", 50.6), ("cifar10", 10): ("NCFM", 71.8), ("cifar10", 50): ("NCFM", 77.4)}


def section(folder: Path) -> str:
    """Return the targets, the records in a folder beside them, and the commands that repeat them.

    Raises:
        ValueError: a file is not a record.
    """
    records = sorted(map(_read, sorted(folder.glob("*.json"))), key=_order)
    parts = [_targets()]
    if records:
        parts += [_table(records), *map(_details, records)]
    return "\n\n".join(parts)


def _read(path: Path) -> dict:
    remedy = "it is left as it is"
    record = read_json(path, remedy)
    try:
        if record["format"] != FORMAT or record["name"] != path.stem:
            raise ValueError(f"format {record['format']!r}, name {record['name']!r}")
        _line(record), _details(record), _order(record)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is not a record ({error!r}); {remedy}") from error
    return record


def targets(dataset: str, ipc: int) -> list[tuple[float, str, str]]:
    """Return accuracy, origin and group of every target of a cell, the highest first."""
    found = []
    if figure := TABLE1["ATOM"].get((dataset, ipc)):
        found.append((figure[0], "the paper", WHOLE))
    if published := PUBLISHED.get((dataset, ipc)):
        found.append((published[1], published[0], PARTITIONED))
    return sorted(found, reverse=True)


def _reached(record: Mapping) -> tuple[float, str, str] | None:
    """Return the highest target that a record reached."""
    mean = record["accuracy"]["mean"]
    reached = (target for target in targets(record["dataset"], record["ipc"]) if mean is not None and mean >= target[0])
    return next(reached, None)


def _order(record: Mapping) -> tuple:
    """Sort by cell, then by the target reached, the highest first, then by seconds."""
    reached = _reached(record)
    place = list(DATASETS).index(record["dataset"])
    return place, record["ipc"], -(reached[0] if reached else 0.0), _seconds(record)


def _seconds(record: Mapping) -> float:
    return sum(record["seconds"][stage] for stage in STAGES)


def _targets() -> str:
    lines = []
    for dataset, ipc in PUBLISHED:
        cell = [f"{value:.1f} ({origin}, {group})" for value, origin, group in reversed(targets(dataset, ipc))]
        lines.append([f"{DATASETS[dataset][0]}, {images(ipc)}", *cell])
    return markdown.table(["targets in %", "of the paper", "highest published"], lines)


def _table(records: Sequence[Mapping]) -> str:
    head = ["record", "images per class", "group", "target reached", "accuracy %", "seconds", *STAGES, "device"]
    return markdown.table([*head, "what changed"], [_line(record) for record in records])


def _line(record: Mapping) -> list[str]:
    reached, accuracy = _reached(record), record["accuracy"]
    times = [f"{record['seconds'][stage]:,.0f}" for stage in STAGES]
    resumed = f" ({record['calls']} calls)" if record["calls"] > 1 else ""
    return [
        f"`{record['name']}`",
        f"{DATASETS[record['dataset']][0]}, {record['ipc']}",
        WHOLE if record["partition"] == 1 else f"{PARTITIONED} {record['partition']}",
        f"{reached[0]:.1f} ({reached[1]})" if reached else "–",
        "diverged" if accuracy["mean"] is None else f"{accuracy['mean']:.1f} ± {accuracy['std']:.1f}",
        f"{_seconds(record):,.0f}{resumed}",
        *times,
        re.sub(r"\s+", " ", record["environment"]["device"]).replace("|", "/"),
        record["what"].replace("|", "/"),
    ]


def _details(record: Mapping) -> str:
    accuracy, environment = record["accuracy"], record["environment"]
    config, count = record["config"], len(accuracy["accuracies"])
    commit, changed = environment["commit"], ", modified" if environment["clean"] is False else ""
    version = f"commit {commit[:12]}{changed}" if commit else f"source {environment['source']}"
    text = (
        f"`{record['name']}`: {record['data']}, width {config['width']}, {config['iterations']:,} steps; "
        f"{count} network{'s' * (count != 1)}, protocol {record['protocol']}, last of {accuracy['epoch']:,} epochs; "
        f"{record['date']}, {version}, torch {environment['torch']}. "
        f"SHA-256 of the set: `{record['sha256']}`."
    )
    return f"{markdown.paragraph(text)}\n\n```sh\n{record['command']}\n```"
