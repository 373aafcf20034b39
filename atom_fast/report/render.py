"""The page of a report: one HTML file without scripts, which loads nothing."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import jinja2
from markupsafe import Markup

from atom_fast._files import write_atomically
from atom_fast.options import printable
from atom_fast.report import charts
from atom_fast.report.accuracies import LARGEST_TABLE
from atom_fast.report.gather import Report, gather

REPORT_FILE = "report.html"


def write_report(source: str | os.PathLike, output: str | os.PathLike | None = None, **options) -> Path:
    """Write the report of a run, of a folder of runs, or of a benchmark's cells to one HTML file.

    Args:
        source: a run's folder, a set's file, a folder of runs and sets, or the output folder of a benchmark.
        output: file to write or replace; None: ``report.html`` in the folder, or the file's name with ``.html``.
        **options: of :func:`~atom_fast.report.gather.gather`, such as ``data_dir``, ``networks`` and ``train``.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: ``source`` holds no run.
        ValueError: an option that is not accepted, or ``output`` does not end in ``.html``.
        OSError: the file could not be written.
    """
    source = Path(source)
    output = Path(output) if output else source / REPORT_FILE if source.is_dir() else source.with_suffix(".html")
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"the report's file must end in .html; got {output}")
    return write_atomically(output, render(gather(source, **options)))


def render(report: Report) -> str:
    """Return the page of a report; the same report gives the same text."""
    template = _environment().get_template("report.html")
    return template.render(report=report, charts=charts, largest_table=LARGEST_TABLE)


@functools.cache  # templates are compiled once
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )


def _printable(value: object) -> object:
    """Escape control characters in text: HTML does not allow them, and a name may turn the direction of a page."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return printable(value)
