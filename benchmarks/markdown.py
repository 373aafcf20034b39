"""Markdown: tables, paragraphs, and the parts of a page between marks, which are kept equal to what was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (head, ["-" * width for width in widths], *rows)
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def paragraph(text: str, bullet: str = "") -> str:
    """Return the text in lines of at most 120 characters, as a list item if ``bullet`` is "- "."""
    rest = " " * len(bullet)
    return textwrap.fill(text, 120, initial_indent=bullet, subsequent_indent=rest, break_on_hyphens=False)


def three_digits(value: float) -> str:
    """Return a number with three significant digits, or whole from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def replace_sections(text: str, sections: Iterable[tuple[str, str, Path]], page: Path) -> tuple[str, list[str]]:
    """Return the text with every section replaced, and a sentence for each section that was different.

    Args:
        text: text of the page.
        sections: name, new content, and source of the content.
        page: path of the page, named in sentences and errors.

    Raises:
        ValueError: a section's marks are not there, once each and in order.
    """
    stale = []
    for name, section, source in sections:
        updated = _replace(text, name, section, page)
        if updated != text:
            stale.append(f"{page.name}: section {name} does not show {source}")
        text = updated
    return text, stale


def _replace(text: str, name: str, section: str, page: Path) -> str:
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{page} must have {start} and, after it, {end}, once each")
    before, rest = text.split(start)
    return f"{before}{start}\n{section}\n{end}{rest.split(end)[1]}"
