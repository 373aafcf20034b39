"""The benchmark beside busy processes: its neighbours, its turns and its ratios."""

import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import busy


def test_ratios_are_of_neighbouring_turns():
    seconds = {
        "atom_fast": {"1": [1.0, 2.0, 4.0], "2": [2.0, 1.0, 2.0]},
        "equations": {"1": [10.0, 20.0, 80.0], "2": [4.0, 5.0, 8.0]},
    }
    found = busy.compare(seconds)
    assert found == {"to_equations": {"1": 10.0, "2": 4.0}, "to_one_thread": 0.5, "worst": 1.0}
    cell = {"work": "loss", "neighbours": 1, "waiting": "library", "first_seconds": 0.2, "seconds": seconds, **found}
    assert "1 threads  2000.0 ms  2 threads  2000.0 ms  equations 10.00x / 4.00x" in busy.describe(cell)


@pytest.mark.parametrize("count", [0, 2])
def test_neighbours_are_busy_and_end_with_the_block(count):
    def ticks(process):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11])

    with busy._busy(count) as processes:
        ids = [process.pid for process in processes]
        assert len(ids) == count
        while not all(ticks(process) > 100 for process in ids):  # a second of work
            time.sleep(0.1)
    for process in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_every_turn_runs_everything_on_every_number_of_threads(monkeypatch):
    calls = []

    def works():
        return {
            name: lambda name=name: calls.append((name, torch.get_num_threads())) for name in ("atom_fast", "equations")
        }, 3

    before = torch.get_num_threads()
    monkeypatch.setitem(busy.WORKS, "loss", works)
    monkeypatch.setattr(busy, "keep_freed_memory", lambda: None)
    torch.set_num_threads(2)
    try:
        measured = busy._measure(busy.Case("loss", 0, "library"), 2)
    finally:
        torch.set_num_threads(before)
    assert measured["first_seconds"] >= 0
    assert {name: {n: len(v) for n, v in each.items()} for name, each in measured["seconds"].items()} == {
        name: {"1": 2, "2": 2} for name in ("atom_fast", "equations")
    }
    turn = [(name, threads) for name in ("atom_fast", "equations") for threads in (1, 2) for _ in range(4)]
    assert calls == [("atom_fast", 2)] + 3 * turn


def test_a_program_that_uses_the_library_gets_no_waiting_of_the_commands(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    with busy._waiting("library"):
        assert "GOMP_SPINCOUNT" not in os.environ
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
