"""Sections of docs/reproduction.md kept equal to the results of ``atom-fast reproduce`` that are kept beside them."""

from __future__ import annotations

import json
from pathlib import Path

from atom_fast._files import write_atomically
from atom_fast.reproduce.tables import FORMAT, render

from .sections import replace_sections

PREFIX = "reproduce-"


def refresh(results: Path, page: Path, *, check: bool = False) -> list[str]:
    """Put every ``reproduce-NAME.json`` between the marks ``<!-- NAME:start -->`` and ``:end`` of a page.

    Args:
        results: folder of results files.
        page: Markdown file with the marks.
        check: write nothing.

    Returns:
        A sentence for everything that was, or is, out of date.

    Raises:
        ValueError: a file is not what ``atom-fast reproduce`` wrote, or the page lacks a mark.
    """
    found = sorted(results.glob(f"{PREFIX}*.json"))
    sections = [(path.stem.removeprefix(PREFIX), section(path), path) for path in found]
    text, stale = replace_sections(page.read_text("utf-8"), sections, page)
    if stale and not check:
        write_atomically(page, text)
    return stale


def section(path: Path, *, measured: bool = False) -> str:
    """A results file as Markdown, or of its rows those that were measured.

    Raises:
        ValueError: the file is not what ``atom-fast reproduce`` wrote.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']!r}")
        for part in record["sections"] if measured else ():
            part["rows"] = [row for row in part["rows"] if any(entry["ours"] for entry in row["entries"].values())]
        return render(record)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not what atom-fast reproduce wrote ({error!r}); it is left as it is") from error
