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
    pairs = _pairs(old, new)
    messages, compared = [], 0
    for old_file, new_file in pairs:
        before, after = ratios(old_file), ratios(new_file)
        for case, provider in sorted(before.keys() & after.keys(), key=str):
            compared += 1
            was, now = before[case, provider], after[case, provider]
            if now > was * (1 + tolerance):
                label = " ".join(map(str, case))
                messages.append(f"{label} {provider}: {was:.3g} of eager's time before, {now:.3g} now")
    if not compared:
        raise ValueError(f"{old} and {new} have no case in common that was measured beside eager")
    return messages


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
    """Median time over eager's in the same file, by case and provider.

    Raises:
        ValueError: the file is neither of the two kinds.
    """
    medians = _medians(path)
    return {
        (case, provider): median / medians[case, "eager"]
        for (case, provider), median in medians.items()
        if provider != "eager" and (case, "eager") in medians
    }


def _medians(path: Path) -> dict[tuple[Case, str], float]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if isinstance(content, dict) and "benchmarks" in content:
        return dict(_pytest_case(benchmark) for benchmark in content["benchmarks"])
    if isinstance(content, dict) and "cases" in content:
        return dict(_kernel_case(case) for case in content["cases"])
    measured = [cell for cell in load_results(path)["cells"] if cell["status"] == "ok"]
    return dict(_table3_case(cell) for cell in measured)


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
