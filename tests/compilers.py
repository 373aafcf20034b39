"""Compile every kernel for every chip with several versions of Triton, and record the results.

    python -m tests.compilers                    # kernels of the presets, with the installed Triton
    python -m tests.compilers --triton 3.5.1 --triton 3.6.0 --triton 3.7.1 --all

Other versions are downloaded into a folder that is removed afterwards. Nothing needs a GPU. The result is
``benchmarks/results/compilers.json``; rows of other versions and chips are kept.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import operator
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # launches are recorded through the interpreter

import click
from tqdm import tqdm

from atom_fast._device import SHARED_MEMORY
from atom_fast._files import write_atomically
from benchmarks.compilers import table
from tests.cubin import ROOT, CubinReport
from tests.launches import compile_launch, specialization
from tests.workloads import launches, workloads

RESULTS = ROOT / "benchmarks" / "results" / "compilers.json"
CHIPS = (75, 80, 86, 89, 90, 100, 120)


@click.command()
@click.option("--triton", "versions", multiple=True, help="a version, may be repeated  [default: the installed one]")
@click.option("--chip", "chips", type=int, multiple=True, help=f"such as 86, may be repeated  [default: {CHIPS}]")
@click.option("--all", "everything", is_flag=True, help="all workloads, not only those of presets  [default: off]")
@click.option("--only", default="", help="workloads whose names contain this text, such as 3x32x32  [default: all]")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="JSON file")
def main(versions, chips, everything, only, output):
    """Compile the package's kernels; report those that do not fit a chip, spill registers or are miscompiled."""
    known = [work for work in workloads() if only in work.name]
    scope = ("everything" if everything else "presets") + (f", {only}" if only else "")
    for version in versions or (None,):
        with _installed(version) as (name, folder):
            for chip in chips or CHIPS:
                chosen = [work for work in known if everything or work.of_presets(chip)]
                _keep(output, {"triton": name, "chip": chip, "workloads": scope, **examine(chosen, chip, folder)})
    click.echo(table(output))


def _keep(output: Path, row: dict) -> None:
    """Write a row to the file; it replaces an earlier row of the same Triton, chip and workloads."""
    rows = json.loads(output.read_text("utf-8")) if output.exists() else []
    place = operator.itemgetter("triton", "chip", "workloads")
    others = [other for other in rows if place(other) != place(row)]
    write_atomically(output, json.dumps(sorted([*others, row], key=place), indent=1) + "\n")


@contextlib.contextmanager
def _installed(version: str | None) -> Iterator[tuple[str, str | None]]:
    """Yield a version of Triton and its folder: None for the installed one, otherwise downloaded to a temporary one."""
    import triton

    if version in (None, triton.__version__):
        yield triton.__version__, None
        return
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        click.echo(f"downloading triton {version}", err=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*command, f"triton=={version}"], check=True)
        yield version, folder


def examine(chosen: list, chip: int, triton: str | None) -> dict[str, object]:
    """Compile the workloads' kernels for one chip; return their number and the kernels that fail a check."""
    reports: dict[str, CubinReport] = {}
    failed: dict[str, str] = {}
    seen = set()
    for work in tqdm(chosen, desc=f"sm_{chip}", unit="workload"):
        for launch in launches(work, chip):
            name, key = f"{launch.kernel} ({work.name})", repr(specialization(launch))
            if key in seen:
                continue
            seen.add(key)
            name += f" #{len(seen)}"
            try:
                reports[name] = compile_launch(launch, chip, triton, brief=True)
            except RuntimeError as error:
                failed[name] = str(error).strip().splitlines()[-1][:200]
    largest = max(reports, key=lambda name: reports[name].shared, default=None)
    return {
        "date": datetime.date.today().isoformat(),
        "kernels": len(reports),
        "largest": largest,
        "largest_shared": reports[largest].shared if largest else 0,
        "limit": SHARED_MEMORY[chip],
        "too_large": {name: r.shared for name, r in reports.items() if r.shared > SHARED_MEMORY[chip]},
        "spills": {name: r.spills for name, r in reports.items() if r.spills},
        "lost_constants": {name: r.lost_constants for name, r in reports.items() if r.lost_constants},
        "failed": failed,
    }


if __name__ == "__main__":
    main()
