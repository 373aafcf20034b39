"""Candidates trained as the search does it, beside `evaluate` called for one after the other.

Both train the same candidates on the same random digits for as many epochs, with all cores. They take turns, so that
whatever else the machine does meets both. A first turn that is not timed imports PyTorch for the processes.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from atom_fast.evaluation.accuracy import evaluate
from atom_fast.evaluation.sets import select
from benchmarks.accuracy.work import DataCache
from benchmarks.harness import environment, save_results
from benchmarks.search.grid import Candidate
from benchmarks.search.plan import plan
from benchmarks.search.proxies import make_proxies
from benchmarks.search.run import longest_first, train_all
from benchmarks.search.training import unfit_reason


def measure(sample: int = 40, epochs: int = 30, rounds: int = 3, ipc: int = 10, out: Path | None = None) -> dict:
    """Time both sides in turns, print a line for each turn, and return the record.

    Args:
        sample: number of candidates; those that do not fit digits are left out.
        epochs, ipc: of every training.
        rounds: turns of each side.
        out: JSON file of the record.
    """
    search = plan("digits", proxies=["random"], ipc=ipc, sample=sample, epochs=epochs, reference_epochs=0)
    cache = DataCache(None, download=False, device=torch.device("cpu"), progress=False)
    data, _ = cache.data("digits")
    chosen = select(data, "random", ipc, preprocessing=cache.preprocessing("digits", "standard"), progress=False)
    fit = [one for one in search.grid if unfit_reason(one, data.image_shape, data.num_classes) is None]
    grid = longest_first(fit, data.image_shape)
    record = {"environment": environment("cpu"), "candidates": len(grid), "epochs": epochs, "ipc": ipc, "rounds": []}

    def one_after_the_other(grid: Sequence[Candidate]) -> None:
        for candidate in grid:
            evaluate(
                chosen, data, architecture=dataclasses.asdict(candidate), networks=1, protocol=search.protocol,
                progress=False,
            )  # fmt: skip

    def together(grid: Sequence[Candidate]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            proxies = list(make_proxies(search, Path(folder), cache))
            train_all(grid, proxies, Path(folder), lambda candidate: None)

    for side in (one_after_the_other, together):
        side(grid[-2:])
    for number in range(rounds):
        seconds = {}
        for side in (one_after_the_other, together) if number % 2 == 0 else (together, one_after_the_other):
            started = time.perf_counter()
            side(grid)
            seconds[side.__name__] = time.perf_counter() - started
        ratio = seconds["one_after_the_other"] / seconds["together"]
        record["rounds"].append({**seconds, "ratio": ratio})
        record["ratio"] = statistics.median(entry["ratio"] for entry in record["rounds"])
        print(
            f"{len(grid)} candidates, {epochs} epochs: one after the other {seconds['one_after_the_other']:.1f} s, "
            f"together {seconds['together']:.1f} s, {ratio:.2f} times as fast",
            flush=True,
        )
        if out:
            save_results(out, record)
    return record
