"""The benchmark of several processes: its counts, ratios and estimates, its interruption, and its section."""

import json
import multiprocessing

import pytest

from atom_fast._threads import affinity
from benchmarks import communication, harness, ranks
from benchmarks.pages import performance
from tests.benchmarks.tiny import command, in_two_processes

TINY = ranks.Sizes(classes=2, ipc=1, real_batch=2, width=8, rounds=2, steps=1)
OPTIONS = ["--classes", "2", "--ipc", "1", "--real-batch", "2", "--width", "8", "--rounds", "2", "--steps", "1"]
CHECKPOINT = 2 * 4 * 3 * 32 * 32  # bytes of an image and its momentum


def measured(processes=2, classes=4, width=8):
    """A cell as `measure` returns it, of fixed times."""
    seconds = {"split": [3.0, 6.0], "apart": [2.0, 8.0], "part": [2.0, 4.0], "whole": [4.0, 9.0]}
    received = 9 * (processes - 1) * classes // processes * 2 * width * 4
    norms = {
        "instance": {"seconds": seconds, **ranks.compare(seconds), "messages": 0, "bytes_received": 0},
        "batch": {"seconds": seconds, **ranks.compare(seconds), "messages": 9, "bytes_received": received},
    }
    time = harness.summary([1.0])
    sent = (classes - classes // processes) * CHECKPOINT
    return {"norms": norms, "meeting": time, "gather": time, "bytes_sent": sent}


@pytest.fixture
def cells(monkeypatch):
    """Replace measurements by fixed figures; return the cells that were measured."""
    found = []

    def measure(cores, classes, sizes):
        found.append((len(cores), classes))
        return measured(len(cores), classes, sizes.width)

    monkeypatch.setattr(ranks, "measure", measure)
    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda _: range(4), raising=False)
    return found


def count(changes):
    """Bytes of each message of a step by change of (norm, classes, width, layers)."""
    found = []
    for norm, classes, width, layers in changes:
        ranks.LAYERS = layers
        run = ranks.make_run(ranks.Sizes(ipc=1, real_batch=2, width=width), norm, classes)
        found.append(ranks.count_bytes("all_gather", lambda run=run: run.step(1)))
    return found


def test_messages_grow_with_the_layers_and_bytes_with_layers_classes_and_width():
    """What the estimate for GPUs takes for granted."""
    changes = [("instance", 2, 8, 2), ("batch", 2, 8, 2), ("batch", 4, 8, 2), ("batch", 2, 16, 2), ("batch", 3, 8, 3)]
    for found in in_two_processes(count, changes):
        assert not isinstance(found, BaseException), found
        nothing, base, classes, width, layers = found
        assert nothing == []
        assert len(base) == 2 * 3, "of the real images, of the synthetic ones, and of the gradient"
        assert set(base) == {2 * 2 * 8 * 4}, "two sums of each class and channel in float32"
        assert classes == width == [2 * size for size in base]
        assert len(layers) == 3 * 3
        assert set(layers) == {2 * base[0]}, "the process with fewer classes sends as many rows"


def test_a_group_measures_every_way_in_turns():
    first, second = in_two_processes(ranks.measure_group, 3, TINY)
    for norm, messages in (("instance", 0), ("batch", 9)):
        found = first["norms"][norm]
        assert set(found["seconds"]) == set(ranks.WAYS) and set(second["norms"][norm]["seconds"]) == {"split", "apart"}
        assert all(len(seconds) == TINY.rounds and min(seconds) > 0 for seconds in found["seconds"].values())
        assert found["weak"] > 0 and found["strong"] > 0
        assert found["messages"] == messages
        assert found["bytes_received"] == second["norms"][norm]["bytes_received"] == messages * 2 * 2 * 8 * 4
    assert first["bytes_sent"] == 2 * CHECKPOINT, "the second process has two of three classes"


def test_on_a_slow_machine_a_cell_has_the_fewest_rounds(monkeypatch):
    monkeypatch.setattr(ranks, "LIMIT", 0.0)
    cell = ranks.measure_group(1, ranks.Sizes(ipc=1, real_batch=2, width=8, steps=1, norms=("batch",)))
    assert {len(seconds) for seconds in cell["norms"]["batch"]["seconds"].values()} == {3}
    assert cell["norms"]["batch"]["messages"] == 0, "one process has nobody to send to"


def test_ratios_are_of_neighbouring_rounds():
    seconds = {"split": [2.0, 2.0, 8.0], "apart": [1.0, 2.0, 4.0], "part": [1.0, 1.0, 6.0], "whole": [3.0, 4.0, 20.0]}
    assert ranks.compare(seconds) == {"weak": 0.5, "apart": 1.0, "strong": 2.0}


@pytest.mark.skipif(affinity() < 2, reason="needs two cores")
def test_the_command_measures_in_processes_and_leaves_none(tmp_path):
    path = tmp_path / "ranks.json"
    text, _ = command("ranks", "--processes", "2", *OPTIONS, "--out", path)
    assert "2 processes, 4 classes" in text and "9 messages and 1.2 kB received" in text
    assert multiprocessing.active_children() == []
    cell = json.loads(path.read_text())["cells"][0]
    assert cell["norms"]["batch"]["messages"] == 9
    assert "| BatchNorm " in performance.ranks(path)
    again, _ = command("ranks", "--processes", "2", *OPTIONS, "--out", path)
    assert again == text, "nothing is measured twice"


def test_an_interrupted_measurement_is_continued(cells, tmp_path, monkeypatch):
    path, measure = tmp_path / "ranks.json", ranks.measure

    def interrupt(cores, classes, sizes):
        if len(cells) == 2:
            raise KeyboardInterrupt
        return measure(cores, classes, sizes)

    monkeypatch.setattr(ranks, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ranks.run(TINY, out=path)
    assert cells == [(2, 4), (2, 8)]
    assert [cell["classes"] for cell in json.loads(path.read_text())["cells"]] == [4, 8]
    monkeypatch.setattr(ranks, "measure", measure)
    ranks.run(TINY, out=path)
    assert cells == [(2, 4), (2, 8), (4, 8)], "weak scaling by two and four, and strong scaling"
    ranks.run(TINY, out=path)
    assert len(cells) == 3


def test_an_interrupt_ends_the_processes(monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ranks.measure([0, 0], 4, TINY)
    assert multiprocessing.active_children() == []


def test_a_file_of_other_sizes_is_left_as_it_is(cells, tmp_path):
    path = tmp_path / "ranks.json"
    ranks.run(TINY, out=path)
    before = path.read_text()
    _, error = command("ranks", *OPTIONS[2:], "--out", path, code=2)
    assert "has other sizes" in error and "Traceback" not in error
    assert path.read_text() == before
    path.write_text(earlier := json.dumps({"setting": {"classes": 5}, "cells": []}))  # before BatchNorm was measured
    assert "left as it is" in command("ranks", *OPTIONS, "--out", path, code=2)[1]
    assert path.read_text() == earlier and len(cells) == 3


@pytest.mark.parametrize(("given", "named"), [("1", "x>=2"), ("2,8", "8 processes need a core each")])
def test_numbers_of_processes_that_cannot_be_measured_are_named(cells, given, named):
    _, error = command("ranks", "--processes", given, code=2)
    assert named in error and not cells


def test_the_estimate_of_a_step_is_messages_and_bytes_over_the_links():
    cell = {"processes": 4, "classes": 12, **measured(4, 12, width=16)}
    cifar10, cifar100, tiny = ranks.batch_norm_sums(cell, 16)
    assert cifar10["messages"] == cifar100["messages"] == 9 and tiny["messages"] == 12
    assert cifar10["bytes_received"] == 9 * 7 * 2 * 2 * 128 * 4, "two of ten classes from each of seven"
    assert cifar100["bytes_received"] == 9 * 7 * 13 * 2 * 128 * 4
    for work in (cifar10, cifar100, tiny):
        part = communication.WORKLOADS[work["workload"]].part / communication.WORKLOADS[work["workload"]].classes
        for name, link in communication.LINKS.items():
            seconds = work["messages"] * link.latency + work["bytes_received"] / link.bandwidth
            assert work["seconds"][name] == pytest.approx(seconds)
            assert work["share"][name] * work["step"] == pytest.approx(seconds)
            assert work["speed"][name] < 1 / part
            limit = work["pays_from"][name]
            assert part * limit + seconds == pytest.approx(limit), "there both take as long"
    assert cifar10["step"] == 0.002 and tiny["step"] == pytest.approx(0.16)


def test_the_estimate_of_a_checkpoint_counts_images_and_momentum():
    cell = {"processes": 3, "classes": 15, "bytes_sent": 2 * 5 * 10 * CHECKPOINT}  # two processes of five classes
    cifar10 = ranks.checkpoint(cell, 10)[0]
    assert cifar10["bytes_received"] == 500 * CHECKPOINT * 7 / 8
    assert all(seconds > cifar10["bytes_received"] / 450e9 for seconds in cifar10["seconds"].values())


def test_the_section_shows_both_norms_and_names_what_is_assumed(cells, tmp_path):
    path = tmp_path / "ranks.json"
    ranks.run(TINY, [2], path)
    text = performance.ranks(path)
    assert "| 2         | 4       | BatchNorm    | 67 % " in text and " 1.42× " in text
    assert "estimated" in text and "Assumed" in text
    for name, link in communication.LINKS.items():
        assert f"{1e6 * link.latency:.0f} µs by {name}" in " ".join(text.split()) and f"| {name} " in text
    assert max(map(len, text.splitlines())) <= 120
