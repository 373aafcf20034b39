"""Parts of a Markdown page between marks, kept equal to what was measured."""

from __future__ import annotations

from pathlib import Path


def replace_section(text: str, name: str, section: str, page: Path) -> str:
    """The text with what is between a section's marks replaced.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{page} must have {start} and, after it, {end}, once each")
    before, rest = text.split(start)
    return f"{before}{start}\n{section}\n{end}{rest.split(end)[1]}"
