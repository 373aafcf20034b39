"""Scales and points of the page's charts, as numbers: the template draws them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 480, 260  # of a drawing, in its own units: a phone shows it nearly unreduced
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 36  # margins
ROW = 26  # height of a row of `dots`
SIDE = 14  # margin of `dots`: half of a tick's text
_POINTS = 200  # of a curve: more cannot be told apart


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve: its ``name``, the ``points`` of an SVG polyline, and the ``first`` and ``last`` value as text."""

    name: str
    points: str
    first: str
    last: str


@dataclasses.dataclass(frozen=True)
class Lines:
    """A chart of curves; ticks are (position, text)."""

    series: tuple[Series, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    logarithmic: bool


@dataclasses.dataclass(frozen=True)
class Dots:
    """A chart of one row of points for each name, with a line at their mean; ticks are (position, text)."""

    rows: tuple[tuple[str, tuple[float, ...], float], ...]
    ticks: tuple[tuple[float, str], ...]
    height: int


def lines(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Lines | None:
    """Return a chart of curves, (x, y) each, on a logarithmic scale if all values are positive.

    Curves that are zero throughout, such as a loss that is not used, are left out; None if nothing is left.
    """
    used = {name: _thinned(points) for name, points in curves.items() if any(y for _, y in points)}
    if not used:
        return None
    xs = [x for points in used.values() for x, _ in points]
    ys = [y for points in used.values() for _, y in points]
    logarithmic = min(ys) > 0
    low, high = (math.log10(min(ys)), math.log10(max(ys))) if logarithmic else (min(ys), max(ys))
    margin = 0.04 * (high - low) or max(0.5, 0.04 * abs(high))
    low, high = low - margin, high + margin
    first, last = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = ((math.log10(y) if logarithmic else y) - low) / (high - low)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1
        )

    series = []
    for name, points in used.items():
        places = [place(x, y) for x, y in points]
        if len(places) == 1:  # a line of no length would not be seen
            places.append((places[0][0] + 3, places[0][1]))
        text = " ".join(f"{x:g},{y:g}" for x, y in places)
        series.append(Series(name, text, f"{points[0][1]:.3g}", f"{points[-1][1]:.3g}"))
    levels = _decades(low, high) if logarithmic else _round_numbers(low, high)
    return Lines(
        series=tuple(series),
        x_ticks=tuple((place(x, ys[0])[0], f"{x:,.0f}") for x in _round_numbers(first, last)),
        y_ticks=tuple((place(first, y)[1], f"{y:g}") for y in levels),
        logarithmic=logarithmic,
    )


def dots(rows: Sequence[tuple[str, Sequence[float]]]) -> Dots | None:
    """Return a chart of percentages, from 0 to 100 or only around those there are; None without any."""
    rows = [(name, values) for name, values in rows if values]
    if not rows:
        return None
    everything = [value for _, values in rows for value in values]
    low, high = 10 * math.floor(min(everything) / 10), 10 * math.ceil(max(everything) / 10)
    if low == high:
        low, high = (low - 10, high) if high >= 100 else (low, high + 10)

    def place(value: float) -> float:
        return round(SIDE + (value - low) / (high - low) * (WIDTH - 2 * SIDE), 1)

    return Dots(
        rows=tuple((name, tuple(map(place, values)), place(sum(values) / len(values))) for name, values in rows),
        ticks=tuple((place(value), f"{value:g}") for value in _round_numbers(low, high)),
        height=2 * ROW * len(rows) + 22,
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``_POINTS`` of them, evenly, with the first and the last."""
    count = min(len(points), _POINTS)
    if count < 2:
        return list(points)
    return [points[round(number * (len(points) - 1) / (count - 1))] for number in range(count)]


def _round_numbers(low: float, high: float) -> list[float]:
    """Three to seven round numbers within a range."""
    if high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (factor * step) >= 3 or factor == 1)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Round numbers between the powers ``low`` and ``high`` of ten."""
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        levels = [factor * 10.0**power for power in powers for factor in factors]
        inside = [level for level in levels if low <= math.log10(level) <= high]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / 7)]
    return _linear_levels(low, high)


def _linear_levels(low: float, high: float) -> list[float]:
    return [level for level in _round_numbers(10**low, 10**high) if level > 0]
