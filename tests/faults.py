"""Write the table of faults in ``docs/reliability.md`` from the tests that inject them: ``python -m tests.faults``.

A test that injects a fault is marked ``@pytest.mark.fault(group, fault, result)``.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
GROUPS = (
    "Stopped runs",
    "More than one process",
    "Full disks",
    "Folders",
    "Damaged files",
    "Hostile files",
    "Invalid values and mismatched data",
    "Kernels in C",
)
BEGIN, END = "<!-- faults: written by python -m tests.faults -->", "<!-- end of faults -->"


def faults() -> dict[str, list[tuple[str, str, str]]]:
    """Return (fault, what happens, test) of every group, in the order of the test files.

    Raises:
        ValueError: a marker does not have three strings, or its group is unknown.
    """
    found: dict[str, list[tuple[str, str, str]]] = {group: [] for group in GROUPS}
    for path in sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: path.name):
        for node in ast.parse(path.read_text("utf-8")).body:
            for decorator in getattr(node, "decorator_list", ()):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                    place = f"{path.relative_to(ROOT / 'tests')}::{node.name}"
                    texts = [argument.value for argument in decorator.args if isinstance(argument, ast.Constant)]
                    if len(texts) != 3 or texts[0] not in found:
                        raise ValueError(f"{place}: a fault needs a group ({', '.join(GROUPS)}) and two strings")
                    found[texts[0]].append((texts[1], texts[2], place))
    return found


def table() -> str:
    """Return the faults as Markdown."""
    parts = [BEGIN, "\n<details><summary>All faults that the tests try, by group</summary>"]
    for group, rows in faults().items():
        if rows:
            parts += [f"\n### {group}\n", "| fault | what happens | shown by |", "| --- | --- | --- |"]
            parts += [f"| {what} | {happens} | `{place}` |" for what, happens, place in rows]
    return "\n".join([*parts, "", "</details>", "", END])


def page() -> str:
    """Return the page with an updated table."""
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    return before + table() + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
