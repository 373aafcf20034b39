"""Tables of tiny cells, and the commands of ``python -m benchmarks`` within this process."""

from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.accuracy import plan, reproduce

CELLS = (("digits", 1),)
TINY = {"iterations": 4, "width": 4, "depth": 2, "real_batch": 4}
SMALL = {"settings": TINY, "seeds": 1, "networks": 1, "epochs": 3, "selection_epochs": 1}


def small(target, methods=None, cells=CELLS, **changes):
    return plan(target, cells, methods, **{**SMALL, **changes})


def run(target, output, **options):
    """The record of a plan that is run, and what was reported."""
    reported = []
    record = reproduce(target, output, device="cpu", progress=False, report=reported.append, **options)
    return record, reported


def command(*arguments, code=0):
    """Standard output and standard error of a command."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stdout, result.stderr
