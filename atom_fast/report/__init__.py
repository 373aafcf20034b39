"""The report of a run, of several, or of a benchmark's cells: one HTML file that needs nothing else."""

import typing as _typing

from atom_fast._lazy import lazy_names as _lazy_names

if _typing.TYPE_CHECKING:
    from atom_fast.report.gather import Report, gather
    from atom_fast.report.render import render, write_report

__all__ = ["Report", "gather", "render", "write_report"]

__getattr__, __dir__ = _lazy_names(
    __name__, {"Report": "gather", "gather": "gather", "render": "render", "write_report": "render"}
)
