"""Table 6 from the record of a search: rank correlations beside the paper's, and their scatter plot."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import markdown, paper, plots
from benchmarks.search import ranking
from benchmarks.search.plan import REFERENCE, title

TENTH = 0.1
_NAMED = 3  # failures that are named for each reason
_NORMS = {"none": "0.6", "batch": "tab:blue", "layer": "tab:green", "instance": "tab:red", "group": "tab:orange"}


@dataclasses.dataclass(frozen=True)
class Row:
    """What a proxy tells about the candidates.

    Attributes:
        name: of the proxy.
        chosen: the candidate that the first seed ranks first; the first of equal ones.
        performance: accuracy in % of the chosen candidate on the whole data, mean over seeds; over equal ones where
            several are first. None without training on the whole data, or where that diverged.
        rho, rho_best: Spearman's correlation with training on the whole data, over all candidates and over the best
            tenth by that training, mean over seeds; None where it has no value.
        interval, interval_best: their bootstrap intervals over candidates.
        deviation: of ``rho`` over seeds; None with one seed.
        minutes: of training all candidates, per seed.
        stored: images to store.
    """

    name: str
    chosen: str
    performance: float | None
    rho: float | None
    interval: tuple[float, float] | None
    deviation: float | None
    rho_best: float | None
    interval_best: tuple[float, float] | None
    minutes: float
    stored: int


def rows(record: Mapping[str, Any]) -> list[Row]:
    """Return a row for every proxy, and one for the whole data where it was trained on."""
    entries = dict(record["proxies"])
    reference = record["reference"]
    if reference is not None:
        entries[REFERENCE] = reference
    return [_row(name, entry, reference, record["candidates"]) for name, entry in entries.items()]


def _row(name: str, entry: Mapping, reference: Mapping | None, names: Sequence[str]) -> Row:
    found = [scores(seed) for seed in entry["seeds"]]
    seconds = [seed["seconds"] for seed in entry["seeds"]]
    about = {
        "name": name,
        "chosen": names[int(np.argmax(found[0]))],
        "minutes": sum(seconds) / len(seconds) / 60,
        "stored": entry["stored"],
    }
    if reference is None:
        return Row(
            **about, performance=None, rho=None, interval=None, deviation=None, rho_best=None, interval_best=None
        )
    whole = scores(reference["seeds"][0])
    best = ranking.best(whole, TENTH)
    rho = [ranking.spearman(own, whole) for own in found]
    known = [value for value in rho if value is not None]
    performance = float(np.mean([whole[own == own.max()].mean() for own in found]))
    return Row(
        **about,
        performance=performance if np.isfinite(performance) else None,
        rho=_mean(rho),
        interval=ranking.interval(found, whole),
        deviation=float(np.std(known)) if len(known) > 1 else None,
        rho_best=_mean([ranking.spearman(own[best], whole[best]) for own in found]),
        interval_best=ranking.interval([own[best] for own in found], whole[best]),
    )


def scores(seed: Mapping[str, Any]) -> np.ndarray:
    """Return the accuracies of one seed, float64 [candidates]; minus infinity, the last rank, where one failed."""
    return np.array([-np.inf if value is None else value for value in seed["accuracies"]])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def render(record: Mapping[str, Any]) -> str:
    """Return the table with what it was measured on, as Markdown."""
    beside = (record["dataset"], record["ipc"])
    same = beside == paper.TABLE6_CELL
    head = [
        "candidates trained on",
        "accuracy of the chosen %",
        "ρ, all (95 % interval)",
        "ρ, best tenth",
        "minutes",
        "images stored",
    ]
    if not same:  # another data set's figures: in a column of their own, to compare the order alone
        head.append("paper's ρ (CIFAR-10, IPC 50)")
    lines = []
    for row in rows(record):
        printed = paper.TABLE6.get(row.name)
        cells = [
            title(row.name),
            "" if row.performance is None else f"{row.performance:.1f}",
            _correlation(row.rho, row.interval, row.deviation),
            _correlation(row.rho_best, row.interval_best),
            f"{row.minutes:,.1f}",
            f"{row.stored:,}",
        ]
        if row.name == REFERENCE:
            cells[2] = cells[3] = ""
        if same and printed is not None:
            figures = (f"{printed[0]:.1f}", f"{printed[1]:.2f}", None, f"{printed[2]:,.0f}", printed[3])
            cells[1:] = [
                cell if figure is None else f"{cell} (paper: {figure:,})" if isinstance(figure, int)
                else f"{cell} (paper: {figure})"
                for cell, figure in zip(cells[1:], figures, strict=True)
            ]  # fmt: skip
        if not same:
            cells.append("" if printed is None else f"{printed[1]:.2f}")
        lines.append(cells)
    return "\n".join([*_about(record), "", markdown.table(head, lines), "", *_chosen(record), *_failures(record)])


def _correlation(value: float | None, interval: tuple[float, float] | None, deviation: float | None = None) -> str:
    if value is None:
        return "none"
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    text = f"{value:.2f}{spread}" + ("" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})")
    return text.replace("-", "−")


def _about(record: Mapping[str, Any]) -> Iterator[str]:
    seeds = max(len(entry["seeds"]) for entry in record["proxies"].values())
    grid = f"{record['grid']} candidates" + (", a random sample of the grid" if record["sample"] else "")
    images = f"{record['ipc']} image{'' if record['ipc'] == 1 else 's'} per class"
    whole, epochs = record["reference_epochs"], record["protocol"]["epochs"]
    yield f"# Table 6, architecture search: {record['data']}, {images}"
    yield ""
    yield markdown.paragraph(
        f"{grid} with widths {', '.join(map(str, record['widths']))}; {epochs} epochs on a proxy, "
        + (f"{whole} on the whole data" if whole else "no training on the whole data")
        + f"; {seeds} seed{'' if seeds == 1 else 's'} (one on the whole data). Candidates are ranked by test accuracy. "
        "Minutes are the sum over all candidates, of one core on a CPU. ± is the deviation over seeds; intervals "
        "resample the candidates."
    )


def _chosen(record: Mapping[str, Any]) -> Iterator[str]:
    for row in rows(record):
        yield f"- {title(row.name)} ranks first: {row.chosen}"


def _failures(record: Mapping[str, Any]) -> Iterator[str]:
    """Name candidates that failed, by reason."""
    unfit = record["unfit"]
    if record["unfinished"]:
        total = record["unfinished"] + len(record["candidates"])
        yield f"- {record['unfinished']} of {total} candidates are not finished and left out: the same command goes on"
    if unfit:
        yield markdown.paragraph(
            f"{len(unfit)} of {record['grid']} candidates cannot be built for these images and rank last everywhere; "
            f"no correlation counts them. {_some(unfit)}: {next(iter(unfit.values()))}.",
            bullet="- ",
        )
    entries = {**record["proxies"], **({REFERENCE: record["reference"]} if record["reference"] else {})}
    for name, entry in entries.items():
        for number, seed in enumerate(entry["seeds"]):
            for reason in Counter(seed["failed"].values()):
                failed = [candidate for candidate, why in seed["failed"].items() if why == reason]
                yield markdown.paragraph(
                    f"{title(name)}, seed {number}: {len(failed)} {reason}, ranked last: {_some(failed)}.", bullet="- "
                )


def _some(names) -> str:
    names = list(names)
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


@plots.styled
def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw every candidate's accuracy after each proxy, first seed, against that on the whole data, as PNG."""
    whole = scores(record["reference"]["seeds"][0])
    norms = [name.split("-")[3] for name in record["candidates"]]
    found = {row.name: row for row in rows(record) if row.name != REFERENCE}
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure, axes = plots.panels(lines, columns, 0.8 + 2.5 * lines, sharey=True)
    places = [axis for line in axes for axis in line]
    for axis, (name, row) in zip(places, found.items(), strict=False):
        own = scores(record["proxies"][name]["seeds"][0])
        for norm, colour in _NORMS.items():
            shown = np.array([other == norm for other in norms]) & np.isfinite(own) & np.isfinite(whole)
            label = "no norm" if norm == "none" else f"{norm} norm"
            axis.scatter(own[shown], whole[shown], s=7, color=colour, alpha=0.7, linewidths=0, label=label)
        rho = "none" if row.rho is None else f"{row.rho:.2f}"
        axis.set_title(f"{title(name)}, ρ {rho}", loc="left")
        axis.grid()
    for axis in places[len(found) :]:
        axis.set_visible(False)
    for axis in places[: len(found)][-columns:]:
        axis.set_xlabel("accuracy on the proxy, %")
    for line in axes:
        line[0].set_ylabel("on the whole data, %")
    plots.save(figure, path, record["fingerprint"], columns=5)
