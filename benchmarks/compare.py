"""Compare two runs by each run's ratio to its own eager step, so that the machine does not matter."""

from __future__ import annotations

import json
import re
from pathlib import Path

from atom_fast._device import NARROW

from .harness import load_results
from .methods import Workload
from .timings import given

Case = tuple  # a measured step or call, without its implementation


def compare(old: Path, new: Path, tolerance: float) -> list[str]:
    """Return a sentence for every case whose time relative to eager grew by more than ``tolerance``.

    Args:
        old, new: results of Table 3, of the kernels or of pytest-benchmark: two files of a kind, or two folders whose
            files of the same name are compared.
        tolerance: accepted growth; 0.15 accepts 15 %.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file is corrupt, or there is nothing to compare.
    """
    return [_message(*change) for change in _changes(old, new) if change[-1] > change[-2] * (1 + tolerance)]


def compare_repeated(old: Path, new: Path, tolerance: float) -> tuple[str, list[str]]:
    """Compare two runs of the same code: find the largest difference, and every case beyond the tolerance.

    Args:
        old, new: as for :func:`compare`.
        tolerance: accepted difference in either direction; 0.15 accepts 15 %.

    Returns:
        A sentence about the largest difference, and one for each case beyond the tolerance, the largest first.

    Raises:
        FileNotFoundError, ValueError: as :func:`compare`.
    """
    changes = sorted(_changes(old, new), key=_deviation, reverse=True)
    beyond = [_message(*change) for change in changes if _deviation(change) > tolerance]
    worst = f"{len(changes)} ratios; the largest difference is {_deviation(changes[0]):.1%}, of {_message(*changes[0])}"
    return worst, beyond


def _changes(old: Path, new: Path) -> list[tuple[Case, str, float, float]]:
    """Return case, implementation, and share of eager's time before and after, of everything that both runs have."""
    changes = []
    for old_file, new_file in _pairs(old, new):
        before, after = ratios(old_file), ratios(new_file)
        for case, implementation in sorted(before.keys() & after.keys(), key=str):
            changes.append((case, implementation, before[case, implementation], after[case, implementation]))
    if not changes:
        raise ValueError(f"{old} and {new} have no case in common that was measured beside eager")
    return changes


def _deviation(change: tuple[Case, str, float, float]) -> float:
    """Return the excess of the larger ratio over the smaller, whichever run came first."""
    *_, was, now = change
    return max(was, now) / min(was, now) - 1


def _message(case: Case, implementation: str, was: float, now: float) -> str:
    return f"{' '.join(map(str, case))} {implementation}: {was:.3g} of eager's time before, {now:.3g} now"


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
    """Return the median time over eager's in the same file, or the cell's own share, by case and implementation.

    Raises:
        ValueError: the file is of no known kind.
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
        (case, implementation): median / medians[case, "eager"]
        for (case, implementation), median in medians.items()
        if implementation != "eager" and (case, "eager") in medians
    }
    return {**found, **shares}


def _pytest_case(benchmark: dict) -> tuple[tuple[Case, str], float]:
    if "implementation" in benchmark["extra_info"]:  # test_operators.py: the group is the case
        return ((benchmark["group"],), benchmark["extra_info"]["implementation"]), benchmark["stats"]["median"]
    parameters = dict(benchmark["params"] or {})
    implementation = str(parameters.pop("implementation", ""))
    # pytest-benchmark writes a function as "UNSERIALIZABLE[<function eager at 0x...>]".
    named = re.search(r"<function (\w+)", implementation)
    case = benchmark["fullname"].split("[")[0], *(f"{name}={value}" for name, value in sorted(parameters.items()))
    return (case, named[1] if named else implementation), benchmark["stats"]["median"]


def _kernel_case(case: dict) -> tuple[tuple[Case, str], float]:
    fields = tuple(str(case[field]) for field in ("operator", "direction", "shape", "dtype", "layout"))
    return (fields, case["implementation"]), case["milliseconds"]


def _table3_case(cell: dict) -> tuple[tuple[Case, str], float]:
    workload = given(Workload(**cell["workload"]))
    implementation, precision = workload.pop("implementation"), workload.pop("precision")
    # 16 bits are compared with eager too, which has one precision.
    label = f"{implementation} {precision}" if precision in NARROW else implementation
    if real := workload.pop("real_precision", None):
        label += f", real images in {real}"
    if chunk := workload.pop("class_chunk", None):
        label += f" {chunk} classes at once"
    return (tuple(f"{name}={value}" for name, value in workload.items()), label), cell["time"]["median"]
