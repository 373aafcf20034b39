"""What got slower between two runs, by each run's own ratio to its eager provider: the machine does not matter."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .harness import load_results
from .merging import given
from .methods import Setting

Case = tuple  # what is measured, without its provider


def compare(old: Path, new: Path, tolerance: float) -> list[str]:
    """Name every case whose time relative to eager grew by more than ``tolerance``.

    Args:
        old, new: results of Table 3, of the kernels or of pytest-benchmark; two files of a kind, or two folders, of
            which the files of the same name are compared.
        tolerance: 0.15 passes over up to 15 % more.

    Raises:
        FileNotFoundError: a path is not there.
        ValueError: a file is corrupt, or there is nothing to compare.
    """
    return [_message(*change) for change in _changes(old, new) if change[-1] > change[-2] * (1 + tolerance)]


def compare_repeated(old: Path, new: Path, tolerance: float) -> tuple[str, list[str]]:
    """How well one run repeats another: what differs most, and every case whose ratio differs by more than allowed.

    Args:
        old, new: as for :func:`compare`.
        tolerance: 0.15 passes over ratios up to 15 % above or below.

    Returns:
        A sentence, and the cases that differ by more, the worst first.

    Raises:
        FileNotFoundError, ValueError: as :func:`compare`.
    """
    changes = sorted(_changes(old, new), key=_deviation, reverse=True)
    beyond = [_message(*change) for change in changes if _deviation(change) > tolerance]
    worst = f"{len(changes)} ratios; the largest difference is {_deviation(changes[0]):.1%}, of {_message(*changes[0])}"
    return worst, beyond


def _changes(old: Path, new: Path) -> list[tuple[Case, str, float, float]]:
    """Case, provider, and its share of eager's time before and after, of everything that both have."""
    changes = []
    for old_file, new_file in _pairs(old, new):
        before, after = ratios(old_file), ratios(new_file)
        for case, provider in sorted(before.keys() & after.keys(), key=str):
            changes.append((case, provider, before[case, provider], after[case, provider]))
    if not changes:
        raise ValueError(f"{old} and {new} have no case in common that was measured beside eager")
    return changes


def _deviation(change: tuple[Case, str, float, float]) -> float:
    """How much the larger ratio is above the smaller: the same whichever run came first."""
    *_, was, now = change
    return max(was, now) / min(was, now) - 1


def _message(case: Case, provider: str, was: float, now: float) -> str:
    return f"{' '.join(map(str, case))} {provider}: {was:.3g} of eager's time before, {now:.3g} now"


def _pairs(old: Path, new: Path) -> list[tuple[Path, Path]]:
    for path in (old, new):
        if not path.exists():
            raise FileNotFoundError(f"no results at {path}")
    if old.is_dir() != new.is_dir():
        raise ValueError(f"give two files or two folders; got {old} and {new}")
    if not old.is_dir():
        return [(old, new)]
    return [(file, new / file.name) for file in sorted(old.glob("*.json")) if (new / file.name).is_file()]


def ratios(path: Path) -> dict[tuple[Case, str], float]:
    """Median time over eager's in the same file, by case and provider; the cell's own share where it has one.

    Raises:
        ValueError: the file is neither of the two kinds.
    """
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    shares = {}
    if isinstance(content, dict) and "benchmarks" in content:
        medians = dict(_pytest_case(benchmark) for benchmark in content["benchmarks"])
    elif isinstance(content, dict) and "cases" in content:
        medians = dict(_kernel_case(case) for case in content["cases"])
    else:
        measured = [cell for cell in load_results(path)["cells"] if cell["status"] == "ok"]
        medians = dict(_table3_case(cell) for cell in measured)
        shares = {_table3_case(cell)[0]: cell["share_of_eager"] for cell in measured if "share_of_eager" in cell}
    found = {
        (case, provider): median / medians[case, "eager"]
        for (case, provider), median in medians.items()
        if provider != "eager" and (case, "eager") in medians
    }
    return {**found, **shares}


def _pytest_case(benchmark: dict) -> tuple[tuple[Case, str], float]:
    if "provider" in benchmark["extra_info"]:  # benchmarks/test_operators.py: the group is all but the provider
        return ((benchmark["group"],), benchmark["extra_info"]["provider"]), benchmark["stats"]["median"]
    parameters = dict(benchmark["params"] or {})
    provider = str(parameters.pop("provider", ""))
    # pytest-benchmark writes a function as "UNSERIALIZABLE[<function eager at 0x...>]".
    named = re.search(r"<function (\w+)", provider)
    case = benchmark["fullname"].split("[")[0], *(f"{name}={value}" for name, value in sorted(parameters.items()))
    return (case, named[1] if named else provider), benchmark["stats"]["median"]


def _kernel_case(case: dict) -> tuple[tuple[Case, str], float]:
    fields = tuple(str(case[field]) for field in ("operator", "direction", "shape", "dtype", "layout"))
    return (fields, case["provider"]), case["milliseconds"]


def _table3_case(cell: dict) -> tuple[tuple[Case, str], float]:
    setting = given(Setting(**cell["setting"]))
    provider, precision = setting.pop("provider"), setting.pop("precision")
    # bfloat16 is another way to the same step: eager, which has one precision, is what it is compared with too.
    label = f"{provider} bfloat16" if precision == "bfloat16" else provider
    if chunk := setting.pop("class_chunk", None):
        label += f" {chunk} classes at once"
    return (tuple(f"{name}={value}" for name, value in setting.items()), label), cell["time"]["median"]
