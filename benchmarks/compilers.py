"""The results of `python -m tests.compilers` as a table: every kernel for every chip by several versions of Triton."""

from __future__ import annotations

import json
from pathlib import Path

GPUS = {
    75: "T4, GeForce RTX 20",
    80: "A100",
    86: "GeForce RTX 30, A10, A40",
    89: "GeForce RTX 40, L4, L40S",
    90: "H100, H200",
    100: "B200",
    120: "GeForce RTX 50",
}
BAD = {"too_large": "ask for more", "spills": "spill", "lost_constants": "miscompiled", "failed": "do not compile"}


def table(source: Path) -> str:
    """Return the results file as a table, one row per chip; kernels of all versions of Triton are counted together."""
    rows = json.loads(source.read_text("utf-8"))
    heads = ["chip", "Triton", "kernels", "most shared memory in KB", "the chip's", *BAD.values()]
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- | {' | '.join(['---:'] * (len(heads) - 2))} |"]
    for chip in sorted({row["chip"] for row in rows}):
        own = [row for row in rows if row["chip"] == chip]
        most = max(row["largest_shared"] for row in own) / 1024
        cells = [f"sm_{chip} ({GPUS[chip]})", ", ".join(sorted({row["triton"] for row in own}))]
        cells += [sum(row["kernels"] for row in own), f"{most:.0f}", own[0]["limit"] >> 10]
        cells += [sum(len(row[name]) for row in own) for name in BAD]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
