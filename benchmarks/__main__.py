"""``python -m benchmarks table3 | scaling | report | compare``: measure, show, and compare."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from . import compare, report, scaling, table3
from .cells import check_known
from .harness import ROOT


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 1 where a check or a comparison fails, 2 on bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    measure = commands.add_parser(
        "table3",
        help="measure Table 3",
        description="Measure an edition of Table 3. Cells measured before are kept: a second call continues.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    measure.add_argument("--edition", default="cpu", help=f"one of {', '.join(table3.EDITIONS)}")
    measure.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the results file")
    measure.add_argument("--method", action="append", help="only this method; may be repeated")
    measure.add_argument("--implementation", action="append", help="only this implementation; may be repeated")
    measure.add_argument("--ipc", action="append", type=int, help="only this many images per class; may be repeated")
    measure.add_argument("--iterations", type=int, help="timed iterations per cell (default: the edition's)")
    measure.add_argument("--seconds", type=float, help="seconds of timing per cell (default: the edition's)")
    measure.set_defaults(run=_table3)

    growth = commands.add_parser("scaling", help="measure a step against classes, images per class and resolution")
    growth.add_argument("--edition", default="cpu", help=f"one of {', '.join(scaling.EDITIONS)} (default cpu)")
    growth.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the results file")
    growth.set_defaults(run=_scaling)

    show = commands.add_parser("report", help="render tables and pictures, refresh README and docs")
    show.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of results files")
    show.add_argument("--check", action="store_true", help="write nothing; fail where a page or picture differs")
    show.set_defaults(run=_report)

    contrast = commands.add_parser("compare", help="name what got slower between two results files")
    contrast.add_argument("old", type=Path)
    contrast.add_argument("new", type=Path)
    contrast.add_argument("--tolerance", type=float, default=0.15, help="relative change to ignore (default 0.15)")
    contrast.add_argument(
        "--repeated", action="store_true", help="two runs of the same code: name changes in both directions"
    )
    contrast.set_defaults(run=_compare)
    return parser


def _table3(options: argparse.Namespace) -> int:
    check_known("edition", [options.edition], table3.EDITIONS)
    plan = table3.EDITIONS[options.edition].plan
    changes = {name: getattr(options, name) for name in ("iterations", "seconds") if getattr(options, name) is not None}
    for name, value in changes.items():
        if value <= 0:
            raise ValueError(f"--{name} must be above 0; got {value}")
    path = table3.run(
        options.edition,
        options.out,
        methods=options.method,
        implementations=options.implementation,
        ipcs=options.ipc,
        plan=dataclasses.replace(plan, **changes),
    )
    print(report.table3_markdown([path]))
    return 0


def _scaling(options: argparse.Namespace) -> int:
    scaling.run(options.edition, options.out)
    return 0


def _report(options: argparse.Namespace) -> int:
    stale = report.refresh(options.results, ROOT, check=options.check)
    for message in stale:
        print(message if options.check else f"refreshed: {message}")
    return 1 if options.check and stale else 0


def _compare(options: argparse.Namespace) -> int:
    if options.repeated:
        largest, beyond = compare.compare_repeated(options.old, options.new, options.tolerance)
        print("\n".join([*beyond, largest]))
        return 1 if beyond else 0
    slower = compare.compare(options.old, options.new, options.tolerance)
    print("\n".join(slower) or "nothing got slower")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
