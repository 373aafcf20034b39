"""Runs of small tables: cells that are never lost or done twice, failures, signals, and several processes."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal

import pytest
import torch
from PIL import Image

from atom_fast.data.sources import load_data
from atom_fast.distillation import ranks
from atom_fast.distillation.checkpoint import latest_checkpoint, save_checkpoint
from atom_fast.distillation.step import Distillation
from atom_fast.evaluation.sets import select
from benchmarks import paper
from benchmarks.accuracy import reproduce, work
from benchmarks.accuracy.cells import CELL_FILE, cell_folder, claimed, evaluation_file, read_evaluation
from benchmarks.accuracy.record import collect
from benchmarks.accuracy.render import Record, render
from benchmarks.accuracy.run import list_units
from tests.benchmarks.tiny import TINY, in_two_processes, run, small


def test_a_table_ends_with_ours_beside_the_paper_s(table4):
    output, record = table4
    assert record == json.loads((output / "table4.json").read_text())
    [section] = record["sections"]
    assert [row["title"] for row in section["rows"]][:2] == ["Random", "MMD"]
    for row in section["rows"]:
        ours = row["entries"]["digits:1"]["ours"]
        assert 0 <= ours["mean"] <= 100 and ours["sets"] == ours["networks"] == 1
        assert f"| {row['title']} " in (output / "table4.md").read_text()
    assert {"name": "iterations", "value": 4, "usual": 8000, "dm": 20_000} in record["reduced"]["digits"]
    assert record["data"] == {"digits": "digits"} and record["protocols"]
    [config] = {json.dumps(c["config"]) for c in record["configurations"].values() if c["method"] == "atom"}
    assert json.loads(config)["width"] == 4


def test_finished_cells_are_kept_whoever_asks(table4, monkeypatch):
    output, record = table4

    def refuse(*arguments):
        raise AssertionError("a finished cell was worked on")

    monkeypatch.setattr("benchmarks.accuracy.run.work", refuse)
    again, said = run(small("table4"), output)
    assert again["sections"] == record["sections"] and "6 of them finished" in said[0]
    fewer, said = run(small("table1", ["random", "dam", "atom"]), output, only=[1, 1])
    assert "1 cells" in said[0]
    rows = {row["title"]: row["entries"]["digits:1"]["ours"] for row in fewer["sections"][0]["rows"]}
    in_table4 = {row["title"]: row["entries"]["digits:1"]["ours"] for row in record["sections"][0]["rows"]}
    assert rows["ATOM"] == in_table4["MMD + spatial + channel"] and rows["DAM"] == in_table4["MMD + spatial"]


def test_more_networks_continue_fewer(table4, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output)
    [(cell, [before])] = small("table4", ["atom"]).units
    target = small("table4", ["atom"], networks=3)
    first = read_evaluation(output, cell, before)["accuracies"]
    record, _ = run(target, output)
    ours = record["sections"][0]["rows"][-1]["entries"]["digits:1"]["ours"]
    assert ours["networks"] == 3 and ours["accuracies"][0][:1] == first
    assert read_evaluation(output, cell, before)["accuracies"] == first


def test_fewer_networks_train_no_more_than_they_are(table4, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output)
    [(cell, [evaluation])] = small("table4", ["atom"], networks=2).units
    path = evaluation_file(output, cell, evaluation)
    [first] = json.loads(path.read_text())[0]["curves"]
    change_record(path, curves=[first, {}, {}, {"3": 12.5}])  # two of four, interrupted
    run(small("table4", ["atom"], networks=2), output)
    curves = json.loads(path.read_text())[0]["curves"]
    assert curves[0] == first and curves[1] and curves[2:] == [{}, {"3": 12.5}]


def change_record(path, **changed):
    [record] = json.loads(path.read_text())
    path.write_text(json.dumps([{**record, **changed}]))


def test_a_finished_evaluation_of_the_version_before_is_read(table4, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output)
    [(cell, [evaluation])] = small("table4", ["random"]).units
    path = evaluation_file(output, cell, evaluation)
    [record] = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in record.items() if name != "hash"}))
    assert read_evaluation(output, cell, evaluation) == read_evaluation(table4[0], cell, evaluation)


def test_cells_of_an_earlier_version_are_used_or_named(table4, tmp_path):
    """Chosen images have the same folder as then; distilled sets have another, since their settings hash otherwise."""
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output)
    target = small("table4", ["random", "atom"])
    for cell, _ in target.units:
        note = cell_folder(output, cell) / CELL_FILE
        note.write_text(json.dumps({**json.loads(note.read_text()), "format": "atom_fast.reproduce.cell"}))
    [_, (atom, _)] = target.units
    earlier = cell_folder(output, atom).rename(output / "cells" / "digits-ipc1-atom-seed0-01234567")
    record, said = run(target, output)
    assert "2 cells, 1 of them finished" in said[0]
    assert said[1].startswith(f"1 cells of an earlier version, such as {earlier.name}, are kept but not used")
    ours, before = (
        one["sections"][0]["rows"][-1]["entries"]["digits:1"]["ours"]["accuracies"] for one in (record, table4[1])
    )
    assert ours == before and (earlier / CELL_FILE).exists()


def test_an_interrupted_cell_is_resumed(tmp_path, monkeypatch):
    target = small("table4", ["atom"], settings={**TINY, "checkpoint_every": 2})
    whole, _ = run(target, tmp_path / "whole")
    steps = interrupted_at_3(target, tmp_path / "parts", monkeypatch)
    record, _ = run(target, tmp_path / "parts")
    assert steps == [1, 2, 3, 3, 4]
    assert (
        record["sections"][0]["rows"][-1]["entries"]["digits:1"]["ours"]["accuracies"]
        == (whole["sections"][0]["rows"][-1]["entries"]["digits:1"]["ours"]["accuracies"])
    )


def interrupted_at_3(target, output, monkeypatch):
    """The steps that are made, the first three of them in a run that then ends."""
    steps, original = [], Distillation.step

    def stop_at_3(self, iteration):
        steps.append(iteration)
        if steps == [1, 2, 3]:
            raise RuntimeError("the machine went away")
        original(self, iteration)

    monkeypatch.setattr(Distillation, "step", stop_at_3)
    with pytest.raises(RuntimeError, match="went away"):
        run(target, output)
    return steps


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "a cell of a table becomes NaN, or needs more memory than there is",
    "it is named, marked as failed in the table, and the others are done; exit code 2; the same command tries again",
)
@pytest.mark.parametrize("what", ["NaN", "memory", "can't allocate memory"])
def test_a_cell_that_fails_does_not_keep_the_others(tmp_path, monkeypatch, what):
    target, original = small("table4", ["random", "mmd", "atom"]), Distillation.step

    def spoilt(self, iteration):
        original(self, iteration)
        if self.config.spatial_power is None and what == "memory":
            raise torch.OutOfMemoryError("out of memory")
        if self.config.spatial_power is None and what == "can't allocate memory":  # on a CPU
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if self.config.spatial_power is None:
            self.images.detach().fill_(torch.nan)

    monkeypatch.setattr(Distillation, "step", spoilt)
    with pytest.raises(RuntimeError, match=f"(?s)1 of 3 cells failed.*digits-ipc1-mmd-seed0-.*{what}"):
        run(target, tmp_path)
    record = json.loads((tmp_path / "table4.json").read_text())
    rows = {row["title"]: row["entries"]["digits:1"] for row in record["sections"][0]["rows"]}
    assert [name.split("-seed0")[0] for name in record["failed"]] == ["digits-ipc1-mmd"]
    assert rows["MMD"]["failed"] == 1 and rows["MMD"]["ours"] is None
    assert rows["MMD + spatial + channel"]["ours"] and not rows["MMD + spatial + channel"]["failed"]
    assert re.search(r"^\| MMD +\| failed ", render(Record(record)), flags=re.MULTILINE)
    monkeypatch.setattr(Distillation, "step", original)
    record, _ = run(target, tmp_path)
    assert (
        record["failed"] == {}
        and "failed" not in render(Record(record))
        and "not measured" not in render(Record(record))
    )


def test_a_stopped_reproduction_advises_what_it_has(tmp_path, monkeypatch, capsys):
    original = Distillation.step

    def signalled(self, iteration):
        os.kill(os.getpid(), signal.SIGINT)
        original(self, iteration)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Distillation, "step", signalled)
        run(small("table4", ["atom"]), tmp_path / "signalled")
    said = capsys.readouterr().err
    assert ended.value.code == 130 and "SIGINT: stopped after iteration 1 of 4" in said
    assert "to continue, run the same command again" in said and "resume" not in said
    target = small("table4", ["atom"], settings={**TINY, "checkpoint_every": 2})
    interrupted_at_3(target, tmp_path / "failed", monkeypatch)
    said = capsys.readouterr().err
    assert "stopped by an error; iteration 2 is saved" in said and "to continue, run the same command again" in said
    assert "--resume" not in said


def test_sigterm_outside_a_distillation_leaves_the_table_of_what_is_finished(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def evaluating(output, cell, evaluations, cache):
        if cell.method == "random":
            return work.work(output, cell, evaluations, cache)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal comes before the next line")

    monkeypatch.setattr("benchmarks.accuracy.run.work", evaluating)
    with pytest.raises(SystemExit) as ended:
        run(small("table4", ["random", "atom"]), tmp_path)
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    rows = json.loads((tmp_path / "table4.json").read_text())["sections"][0]["rows"]
    ours = {row["title"]: row["entries"]["digits:1"]["ours"] for row in rows}
    assert ours["Random"] and ours["MMD + spatial + channel"] is None


def test_classes_that_are_too_small_are_found_before_a_network_is_trained(monkeypatch):
    monkeypatch.setattr("atom_fast.evaluation.sets.watch_training", None)
    with pytest.raises(ValueError, match="200 different ones per class were asked for; give an ipc of at most 135"):
        select(load_data("digits"), "herding", 200)


def test_a_cell_begun_on_another_device_does_not_keep_the_others(tmp_path, monkeypatch):
    settings = {**TINY, "checkpoint_every": 2}
    target = small("table4", ["mmd", "atom"], settings=settings)
    interrupted_at_3(target, tmp_path, monkeypatch)
    folder = cell_folder(tmp_path, target.units[0][0]) / "run" / "checkpoints"
    checkpoint = latest_checkpoint(folder)
    save_checkpoint(folder, dataclasses.replace(checkpoint, config={**checkpoint.config, "precision": "tf32"}))
    with pytest.raises(RuntimeError, match="1 of 2 cells failed.*mmd.*precision was 'tf32', is 'float32'"):
        run(target, tmp_path)
    assert work.finished(tmp_path, *target.units[1])


def with_other_images(output, units):
    """Have cells say that they were made from other images."""
    for cell, _ in units:
        note = cell_folder(output, cell) / CELL_FILE
        note.write_text(json.dumps({**json.loads(note.read_text()), "fingerprint": "0" * 64, "data": "digits (JPEG)"}))


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "cells of a data set in a table's folder were made from other images than the data at hand, or each other",
    "refused before any work, or where the table would be written; data set and folder are named",
)
def test_images_of_different_origin_are_not_put_into_one_table(table4, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output)
    units = small("table4").units
    with_other_images(output, units[-1:])
    for write in (run, collect):
        message = rf"{units[-1][0].folder_name} .*other images of digits \(digits \(JPEG\)\)"
        with pytest.raises(ValueError, match=message):
            write(small("table4"), output)
    with_other_images(output, units)
    before = sorted(output.rglob("*"))
    with pytest.raises(ValueError, match=r"other images of digits .* than the images at hand \(digits\).*--out"):
        run(small("table4", seeds=2), output)
    assert sorted(output.rglob("*")) == before
    assert run(small("table4"), output)[0]["data"] == {"digits": "digits (JPEG)"}, "what is finished needs no data"


def test_a_cell_that_another_process_has_is_passed_over(tmp_path):
    target = small("table4", ["random", "atom"])
    [(cell, _), _] = target.units
    folder = cell_folder(tmp_path, cell)
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with claimed(folder) as mine:
            assert not mine
        record, said = run(target, tmp_path)
    measured = [row["title"] for row in record["sections"][0]["rows"] if row["entries"]["digits:1"]["ours"]]
    assert measured == ["MMD + spatial + channel"]
    assert any("1 cells are being run by other processes" in line for line in said)
    assert "finished" in list_units(target, tmp_path)[1] and "to do" in list_units(target, tmp_path)[0]
    assert list_units(target, tmp_path, [2]) == list_units(target, tmp_path)[1:]
    with pytest.raises(ValueError, match="there are cells 1 to 2; got 3"):
        list_units(target, tmp_path, [3])


@pytest.mark.fault(
    "Folders", "the file system has no locks for the cells of a table", "one warning; the cells still run"
)
def test_cells_on_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    record, _ = run(small("table4", ["random"], seeds=2), tmp_path)
    assert record["sections"][0]["rows"][0]["entries"]["digits:1"]["ours"]["sets"] == 2
    assert capsys.readouterr().err.count(f"{tmp_path / 'cells'} cannot be locked (No locks available)") == 1


class SecondOfTwo:
    """A process beside another that has nothing to say."""

    rank, size, local_rank = 1, 2, 1

    def all_gather_object(self, value):
        return [value]


def test_each_process_has_its_own_gpu_and_the_first_one_writes(table4, tmp_path, monkeypatch):
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output, ignore=lambda folder, names: [name for name in names if "table4" in name])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda index: None)
    monkeypatch.setattr(ranks, "_group", SecondOfTwo())
    devices = []
    monkeypatch.setattr("benchmarks.accuracy.run.DataCache", lambda *_, device, **options: devices.append(device))
    record = reproduce(small("table4"), output, progress=False, report=str)
    assert devices == [torch.device("cuda", 1)]
    assert record["sections"] == table4[1]["sections"] and not list(output.glob("table4*"))


def share_a_table(output):
    record, reported = run(small("table4", ["random", "atom"], seeds=2), output)
    return record["sections"], reported


def test_processes_started_together_share_the_cells(tmp_path):
    found = in_two_processes(share_a_table, tmp_path)
    assert not any(isinstance(one, BaseException) for one in found), found
    assert found[0][0] == found[1][0] == json.loads((tmp_path / "table4.json").read_text())["sections"]
    entries = [entry for row in found[0][0][0]["rows"] for entry in row["entries"].values()]
    assert {entry["ours"]["sets"] for entry in entries if entry["ours"]} == {2}
    assert sum("written:" in line for _, reported in found for line in reported) == 1
    starts = [json.loads(path.read_text()) for path in tmp_path.glob("cells/*/run/environment.json")]
    assert len(starts) == 2 and all(len(one) == 1 for one in starts), "no cell is done twice"


def damaged(folder, what, **changed):
    if what == "note":
        (folder / CELL_FILE).write_text('{"format": ')
    elif what == "evaluation":
        next(folder.glob("evaluation-*.json")).write_text("")
    elif what == "results":  # JSON, but not an evaluation's
        change_record(next(folder.glob("evaluation-*.json")), **changed)
    elif what == "set":
        path = next(folder.glob("sets/*.safetensors"))
        path.write_bytes(path.read_bytes()[:-7])
    elif what in ("gone", "strange"):
        (folder / CELL_FILE).unlink()
    elif what == "other":
        note = json.loads((folder / CELL_FILE).read_text())
        (folder / CELL_FILE).write_text(json.dumps({**note, "fingerprint": "0" * 64}))
    if what not in ("evaluation", "results", "gone"):
        for path in folder.glob("evaluation-*.json"):
            path.unlink()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("note", "damaged"), ("evaluation", "damaged"), ("set", "damaged"), ("strange", "no cell.json"),
        ("gone", "is missing"),
        ("other", "other images"),
    ],
)  # fmt: skip
def test_a_damaged_cell_is_named_with_a_way_out(table4, tmp_path, what, said):
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output)
    [(cell, _)] = small("table4", ["atom"]).units
    folder = cell_folder(output, cell)
    damaged(folder, what)
    files = output.glob("cells/*/evaluation-*.json")
    others = {path: path.read_bytes() for path in files if folder not in path.parents}
    with pytest.raises((ValueError, RuntimeError), match=f"{folder.name}.*{said}|{said}.*{folder.name}") as error:
        run(small("table4", ["atom"]), output)
    assert re.search("remove|--data-dir", str(error.value))
    assert others and all(path.read_bytes() == content for path, content in others.items())


def test_a_set_is_tested_as_that_of_its_own_cell_only(table4, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output)
    cells = {
        name: cell
        for name, methods, changes in (
            ("atom", ["atom"], {}),
            ("mmd", ["mmd"], {}),
            ("random", ["random"], {}),
            ("seed 1", ["atom"], {"seeds": 2}),
            ("random of seed 1", ["random"], {"seeds": 2}),
        )
        for cell, _ in small("table4", methods, **changes).units
    }
    for moved, to in (("mmd", "atom"), ("atom", "seed 1"), ("random", "random of seed 1"), ("atom", "random")):
        folder = cell_folder(output, cells[to])
        path = work.final_set_file(output, cells[to])
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(work.final_set_file(table4[0], cells[moved]), path)
        shutil.copy(cell_folder(table4[0], cells["atom"]) / CELL_FILE, folder)  # of the same images
        with pytest.raises(ValueError, match="other settings, another seed.*remove"):
            work.load_set(folder, cells[to])
    folder = cell_folder(table4[0], cells["atom"])
    other = dataclasses.replace(cells["atom"], settings=(*cells["atom"].settings, ("loss_scale", 3.0)))
    work.load_set(folder, cells["atom"])
    with pytest.raises(ValueError, match="other settings"):
        work.load_set(folder, other)


def test_what_a_killed_process_left_half_written_is_removed(table4, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output)
    [(cell, _)] = small("table4", ["atom"]).units
    folder = cell_folder(output, cell)
    left = [folder / ".evaluation-convnet-0.json.1-ab.part", work.final_set_file(output, cell).parent / ".it.1-ab.part"]
    for path in left:
        path.write_bytes(b"half")
    run(small("table4", ["atom"], networks=2), output)
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(
    "changed",
    [
        {"curves": 3}, {"curves": [3]}, {"curves": [{"1": 50.0}]}, {"curves": [{"3": "much"}]}, {"seconds": None},
        {"set_seconds": "long"}, {"device": None},
    ],
)  # fmt: skip
def test_results_that_are_not_an_evaluation_s_are_named(table4, tmp_path, changed):
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output)
    [(cell, [evaluation])] = small("table4", ["atom"]).units
    assert evaluation.protocol.epochs == 3
    damaged(cell_folder(output, cell), "results", **changed)
    with pytest.raises((ValueError, RuntimeError), match="evaluation-convnet.*is damaged.*remove it"):
        run(small("table4", ["atom"]), output)


def test_figure_3_evaluates_sets_on_the_way(tmp_path):
    record, _ = run(small("fig3", ["dam", "atom"]), tmp_path)
    [section] = record["sections"]
    assert section["columns"] == ["1", "2", "3", "4"] and [row["title"] for row in section["rows"]] == ["DAM", "ATOM"]
    assert all(entry["ours"] for row in section["rows"] for entry in row["entries"].values())
    [(cell, evaluations)] = small("fig3", ["atom"]).units
    folder = cell_folder(tmp_path, cell)
    sets = [work.load_set(folder, cell, evaluation.iteration) for evaluation in evaluations]
    assert len(sets) == 4 and not torch.equal(sets[0].images, sets[-1].images)
    [(straight, _)] = small("table4", ["atom"]).units
    run(small("table4", ["atom"]), tmp_path)
    torch.testing.assert_close(work.load_set(cell_folder(tmp_path, straight), straight).images, sets[-1].images)
    with Image.open(tmp_path / "fig3.png") as picture:
        assert picture.size[0] > 400


def test_pictures_are_drawn_through_the_inverse_preprocessing(table4):
    output, _ = table4
    record, _ = run(small("fig4"), output)
    assert {reduction["name"] for reduction in record["reduced"]["digits"]} == {*TINY, "augmentation"}
    assert record["data"] == {"digits": "digits"}
    with Image.open(output / "fig4-digits-ipc1.png") as picture:
        assert picture.convert("RGB").getextrema() != ((255, 255),) * 3


def test_table_2_averages_over_architectures(tmp_path, monkeypatch):
    cells = (("digits32", 1),)
    networks = {evaluation.network for _, found in small("table2", cells=cells).units for evaluation in found}
    assert networks == set(paper.TABLE2_NETWORKS)
    monkeypatch.setattr("benchmarks.accuracy.tables._NETWORK_TITLES", {"convnet": "ConvNet", "alexnet": "AlexNet"})
    record, _ = run(small("table2", ["atom"], cells), tmp_path)
    [row] = record["sections"][0]["rows"]
    ours = {column: entry["ours"] for column, entry in row["entries"].items()}
    assert ours["Avg."]["mean"] == pytest.approx((ours["ConvNet"]["mean"] + ours["AlexNet"]["mean"]) / 2)


def test_methods_that_select_and_the_full_data_set(tmp_path):
    methods = ["random", "herding", "forgetting"]
    target = small("table1", methods)
    record, _ = run(target, tmp_path)
    assert sum(bool(row["entries"]["digits:1"]["ours"]) for row in record["sections"][0]["rows"]) == 3
    for cell, _ in target.units:
        chosen = work.load_set(cell_folder(tmp_path, cell), cell)
        assert chosen.class_sizes == (1,) * 10 and chosen.metadata["method"] == cell.method
    [(cell, _)] = small("table1", ["full"]).units
    assert cell.ipc == 0
    run(small("table1", ["full"]), tmp_path)
    assert len(work.load_set(cell_folder(tmp_path, cell), cell)) == 1400


def test_a_table_says_what_its_sets_were_tested_with(tmp_path):
    """The versions are of the machines that evaluated, not of the machine that collects."""
    target = small("table1", ["random"], seeds=2)
    run(target, tmp_path)
    [first, second] = [evaluation_file(tmp_path, cell, evaluations[0]) for cell, evaluations in target.units]
    for path, torch_version in ((first, "2.11.0"), (second, "1.0")):
        change_record(path, versions={"torch": torch_version})
    record = collect(target, tmp_path)
    assert record["versions"] == {"torch": "1.0, 2.11.0"} and "torch 1.0, 2.11.0." in render(Record(record))
