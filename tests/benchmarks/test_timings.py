"""Timed cells: measured once in their own process, kept, never mixed, and compared by ratio."""

import dataclasses
import json

import pytest
import torch

from benchmarks import compare, harness, table3, timings
from benchmarks.methods import ALL_IMPLEMENTATIONS, NEED_GPU, TIMED, Workload
from benchmarks.pages.benchmarks import table3_markdown
from benchmarks.timings import merge
from tests.benchmarks.tiny import command
from tests.benchmarks.workloads import small

TIMING = harness.Timing(iterations=4, seconds=5, limit=60)


def test_a_cell_is_measured_in_its_own_process_in_turns_with_eager():
    record = harness.run_cell(small("dm", "fused"), dataclasses.replace(TIMING, seconds=0.5, beside_eager=True))
    assert record["status"] == "ok", record
    assert len(record["seconds"]) == record["time"]["iterations"]
    assert record["time"]["q20"] <= record["time"]["median"] <= record["time"]["q80"]
    assert record["memory"]["peak_allocated"] > 0
    assert 0 < record["share_of_eager"] < 100
    assert sum(record["seconds"]) > 3 * harness.TURN and sum(record["eager_seconds"]) > 3 * harness.TURN


def test_eager_is_measured_alone():
    record = harness.measure(small("dm"), TIMING)
    assert len(record["seconds"]) == 4 and "share_of_eager" not in record


def test_the_share_is_of_neighbouring_turns(monkeypatch):
    """A machine half as fast from some turn on leaves the share as it is."""
    speeds = iter([1, 1, 2, 2, 2, 2, 2, 2])
    monkeypatch.setattr(harness, "_clocked", lambda step: (next(speeds) * step(), 7.0))
    sent = []

    class Neighbour:
        def send(self, message):
            sent.append(message)

        def recv(self):
            return "ready" if len(sent) == 1 else [next(speeds) * 0.8]

    timing = dataclasses.replace(TIMING, seconds=6)
    seconds, beside, loss = harness._time_in_turns(lambda: 0.2, Neighbour(), timing)
    assert sent == ["prepare", True, True, True, True, False] and loss == 7.0
    assert seconds == [0.2, 0.4, 0.4, 0.4] and beside["eager_seconds"] == [0.8, 1.6, 1.6, 1.6]
    assert beside["share_of_eager"] == pytest.approx(0.25)


def test_cells_beside_which_eager_was_slow_are_measured_again(tmp_path, monkeypatch):
    """Once each, the slowest first; kept is what was measured beside a faster eager."""
    answers = {"compile": [1.0], "fused": [1.5, 1.4], "eager-batched": [1.2, 1.3], "fused-graph": [1.05]}
    measured = []

    def run_cell(workload, timing):
        measured.append(workload.implementation)
        seconds = answers[workload.implementation].pop(0)
        record = {"status": "ok", "share_of_eager": 1 / seconds, "eager_seconds": [seconds]}
        return {**record, "time": harness.summary([1.0]), "memory": {"peak_allocated": None}}

    monkeypatch.setattr(timings, "run_cell", run_cell)
    path, chosen = tmp_path / "results.json", [small("dm", implementation=implementation) for implementation in answers]
    timings.measure_cells(path, "table3", "cpu", chosen, TIMING)
    del measured[:]
    timings.measure_slow_again(path, chosen, TIMING, deadline=0.0)
    assert not measured, "there was no time left"
    for _ in range(2):
        timings.measure_slow_again(path, chosen, TIMING)
        assert measured == ["fused", "eager-batched"]
    kept = {
        record["workload"]["implementation"]: record["eager_seconds"] for record in harness.load_results(path)["cells"]
    }
    assert kept == {"compile": [1.0], "fused": [1.4], "eager-batched": [1.2], "fused-graph": [1.05]}


@pytest.mark.parametrize(
    ("changes", "limit", "status"),
    [({"class_images": 10**12}, 60, "OOM"), ({"real_batch": 0, "ipc": -1}, 60, "failed"), ({}, 0.01, "timeout")],
)
def test_a_cell_that_does_not_end_well_is_an_entry(changes, limit, status):
    assert harness.run_cell(small("dm", **changes), dataclasses.replace(TIMING, limit=limit))["status"] == status


def test_summary():
    figures = harness.summary([4.0, 1.0, 2.0, 3.0, 5.0])
    assert figures["median"] == 3 and figures["mean"] == 3 and figures["std"] == pytest.approx(2**0.5)
    assert harness.summary([2.0])["q80"] == 2.0


def test_second_call_continues(edition, tmp_path):
    path = table3.run("cpu", tmp_path, methods=["atom"], ipcs=[1])
    implementations = set(ALL_IMPLEMENTATIONS) - set(NEED_GPU)
    assert edition == {("atom", implementation): 1 for implementation in implementations}
    table3.run("cpu", tmp_path, methods=["atom", "mtt"], ipcs=[1])
    table3.run("cpu", tmp_path, methods=["atom", "mtt"], ipcs=[1])
    assert set(edition.values()) == {1}
    results = json.loads(path.read_text())
    assert len(results["cells"]) == 6
    assert {"device", "driver", "torch", "triton", "commit", "clean", "source"} <= results["environment"].keys()


def test_what_failed_is_tried_again_and_what_was_measured_is_kept(edition, tmp_path, monkeypatch):
    monkeypatch.setattr(timings, "run_cell", lambda workload, timing: {"status": "failed", "message": "gone"})
    path = table3.run("cpu", tmp_path, methods=["dc"], ipcs=[1])
    assert json.loads(path.read_text())["cells"][0]["status"] == "failed"
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(timings, "run_cell", lambda workload, timing: {"status": "OOM", "message": ""})
        table3.run("cpu", tmp_path, methods=["dc"], ipcs=[1])
    cells = json.loads(path.read_text())["cells"]
    assert [cell["status"] for cell in cells] == ["OOM", "OOM"]


def test_every_edition_has_all_seven_methods():
    for edition in table3.EDITIONS.values():
        cells = table3.workloads(edition)
        assert {cell.method for cell in cells} == set(TIMED)
        assert len(set(cells)) == len(cells)
        assert all(cell.device == edition.device for cell in cells)


def test_a_version_is_named_by_its_kernels_too(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "MEASURED", ("kernels",))
    (tmp_path / "kernels").mkdir()
    found = {harness.source_identity()}
    for name in ("norm_block.py", "norm_block.c", "norm_block.h"):
        (tmp_path / "kernels" / name).write_text("one")
        found.add(harness.source_identity())
        (tmp_path / "kernels" / name).write_text("two")
        found.add(harness.source_identity())
    assert len(found) == 7


def test_figures_of_another_version_are_neither_mixed_nor_overwritten(edition, tmp_path):
    path = table3.run("cpu", tmp_path, methods=["dm"], ipcs=[1])
    results = json.loads(path.read_text())
    results["environment"]["source"] = "0123456789ab"
    path.write_text(json.dumps(results))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="source '0123456789ab'"):
        table3.run("cpu", tmp_path, methods=["atom"], ipcs=[1])
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["{ not json", "[]", '{"format": 99, "cells": []}', '{"format": 1}'])
def test_corrupt_results_are_refused_and_left(edition, tmp_path, content):
    path = table3.results_path(tmp_path, "cpu")
    path.write_text(content)
    with pytest.raises(ValueError, match="table3-cpu.json"):
        table3.run("cpu", tmp_path)
    assert path.read_text() == content and not edition


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--edition", "tpu"], "'tpu' is not one of 'gpu', 'cpu'"),
        (["--methods", "atoms"], "Did you mean 'atom'?"),
        (["--implementations", "nope"], "'nope' is not one of"),
        (["--ipcs", "3"], "ipc must be one of 1, 10; got 3"),
        (["--iterations", "0"], "0 is not in the range x>=1"),
    ],
)
def test_bad_names_are_named(arguments, words, tmp_path):
    _, error = command("table3", "--out", tmp_path, *arguments, code=2)
    assert words in error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_edition_without_a_gpu(tmp_path):
    for arguments in (["table3", "--edition", "gpu"], ["kernels"], ["gpu"]):
        assert "needs a CUDA GPU" in command(*arguments, "--out", tmp_path / "out", code=2)[1]


def _key(cell):
    workload = cell["workload"]
    return workload["method"], workload["implementation"], workload["ipc"]


def test_ratios_come_from_the_same_run(measured):
    """A slower machine's eager must not make another run's fused look fast."""
    first = table3.results_path(measured / "results", "cpu")
    results = json.loads(first.read_text())
    (fused_cell,) = [
        cell for cell in results["cells"]
        if _key(cell) == ("atom", "fused", 1)
    ]  # fmt: skip
    fused_cell["measured_at"] = "2999-01-01T00:00:00+00:00"
    second = first.with_name("table3-cpu-later.json")
    second.write_text(json.dumps({**results, "cells": [fused_cell]}))
    merged = merge([first, second])
    own = Workload(**fused_cell["workload"])
    assert merged[own]["eager"] is None
    assert merged[dataclasses.replace(own, implementation="compile")]["eager"]["status"] == "ok"
    second.write_text(json.dumps({**results, "environment": {"device": "other"}}))
    with pytest.raises(ValueError, match="several machines"):
        merge([first, second])


def test_compare_names_what_got_slower_by_ratio(measured, tmp_path):
    old = table3.results_path(measured / "results", "cpu")
    results = json.loads(old.read_text())
    for cell in results["cells"]:  # a machine of half the speed
        if cell["status"] == "ok":
            cell["time"]["median"] *= 2
    new = tmp_path / "new.json"
    new.write_text(json.dumps(results))
    assert compare.compare(old, new, 0.15) == []
    for cell in results["cells"]:
        if (cell["workload"]["method"], cell["workload"]["implementation"]) == ("dm", "fused"):
            cell["time"]["median"] *= 1.3
    new.write_text(json.dumps(results))
    assert len(compare.compare(old, new, 0.15)) == 2  # both sizes
    assert compare.compare(old, new, 0.4) == []
    for cell in results["cells"]:  # measured in turns with eager: that ratio counts
        if cell["workload"]["implementation"] != "eager":
            cell["share_of_eager"] = 0.9
    new.write_text(json.dumps(results))
    assert set(compare.ratios(new).values()) == {0.9}
    assert "(1.11×)" in table3_markdown([new])
    with pytest.raises(FileNotFoundError):
        compare.compare(old, tmp_path / "nowhere.json", 0.15)


def test_a_repeated_run_is_compared_either_way(measured, tmp_path):
    old = table3.results_path(measured / "results", "cpu")
    results = json.loads(old.read_text())
    for cell in results["cells"]:
        if (cell["workload"]["method"], cell["workload"]["implementation"], cell["workload"]["ipc"]) == (
            "dm",
            "fused",
            1,
        ):
            cell["time"]["median"] /= 1.1
    new = tmp_path / "new.json"
    new.write_text(json.dumps(results))
    text, _ = command("compare", old, new, "--repeated")
    assert "28 ratios; the largest difference is 10.0%, of method=dm ipc=1" in text
    for files in ((old, new), (new, old)):
        largest, beyond = compare.compare_repeated(*files, 0.05)
        assert len(beyond) == 1 and "10.0%" in largest
    command("compare", old, new, "--repeated", "--tolerance", "0.05", code=1)
    command("compare", old, old, "--repeated", "--tolerance", "0")
