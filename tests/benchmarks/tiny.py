"""Tables of tiny cells, and the commands of ``python -m benchmarks`` within this process."""

import multiprocessing
import os
import socket

import torch
from click.testing import CliRunner

from atom_fast.distillation import ranks
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


def in_two_processes(work, *arguments):
    """The results, or errors, of a function in two processes that are started as torchrun starts them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__, "torch._dynamo"])  # imported once for both
    reports = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_join, args=(rank, port, work, arguments, reports)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(reports.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    return [found[rank] for rank in range(2)]


def _join(rank, port, work, arguments, reports):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in address.items()})
    torch.set_num_threads(1)
    try:
        with ranks.join("cpu"):
            reports.put((rank, work(*arguments)))
    except Exception as error:
        reports.put((rank, error))
