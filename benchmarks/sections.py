"""Parts of a Markdown page between marks, kept equal to what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def replace_sections(text: str, sections: Iterable[tuple[str, str, Path]], page: Path) -> tuple[str, list[str]]:
    """The text with every section replaced, and a sentence for each that was something else.

    Args:
        text: of the page.
        sections: name, what it shall hold, and where that was measured.
        page: named in sentences and errors.

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
    """The text with what is between a section's marks replaced; raises as `replace_sections`."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{page} must have {start} and, after it, {end}, once each")
    before, rest = text.split(start)
    return f"{before}{start}\n{section}\n{end}{rest.split(end)[1]}"
