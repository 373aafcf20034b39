"""The paper's tables by name: what a plan holds, cells that are never lost or done twice, and what is written."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from atom_fast.cli import _parse_settings, main
from atom_fast.data.sources import load_data
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation import preset
from atom_fast.distillation.checkpoint import latest_checkpoint, save_checkpoint
from atom_fast.distillation.matching import fused_if_possible, matching_terms
from atom_fast.distillation.ranks import World
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation, make_network
from atom_fast.evaluation.sets import select
from atom_fast.functional import class_groups
from benchmarks.accuracy import TARGETS, paper, plan, reproduce, work
from benchmarks.accuracy.budget import Estimator, choose
from benchmarks.accuracy.cells import (
    CELL_FILE,
    architecture,
    cell_folder,
    claimed,
    evaluation_file,
    read_evaluation,
)
from benchmarks.accuracy.datasets import load_named
from benchmarks.accuracy.methods import METHODS, configuration
from benchmarks.accuracy.run import list_units
from benchmarks.accuracy.scale import scale_for
from benchmarks.accuracy.study import FACTORS
from benchmarks.accuracy.tables import _paired, collect, render
from benchmarks.accuracy.targets import parse_cell
from tests.distillation.test_ranks import Launch, context  # noqa: F401  a fixture

CELLS = (("digits", 1),)
TINY = {"iterations": 4, "width": 4, "depth": 2, "real_batch": 4}
SMALL = {"settings": TINY, "seeds": 1, "networks": 1, "epochs": 3, "selection_epochs": 1}


def small(target, methods=None, cells=CELLS, **changes):
    return plan(target, cells, methods, **{**SMALL, **changes})


def run(target, output, **options):
    said = []
    record = reproduce(target, output, device="cpu", progress=False, report=said.append, **options)
    return record, said


@pytest.fixture(scope="module")
def table4(tmp_path_factory):
    """The folder and the record of a small Table 4."""
    output = tmp_path_factory.mktemp("reproduce")
    return output, run(small("table4"), output)[0]


def command(*arguments, code=0):
    result = CliRunner().invoke(main, ["reproduce", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stdout, result.stderr


# What is matched


def test_feature_matching_is_equation_3_with_the_map_itself():
    data = load_data("digits")
    config = preset("paper", ipc=2, spatial_power=None, channel_power=None, feature_maps=True, **TINY)
    config = config.resolve(data.image_shape, "digits", torch.device("cpu"))
    network = make_network(config, data)
    network.reset_parameters(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    real, synthetic = (torch.randn(10 * n, 1, 8, 8, generator=generator) for n in (3, 2))
    real_labels, labels = (torch.arange(10).repeat_interleave(n) for n in (3, 2))
    synthetic.requires_grad_()
    extractor, why = fused_if_possible(network, config, synthetic)
    assert extractor is network and "feature_maps" in why
    attention, _ = matching_terms(extractor, real, synthetic, config, class_groups(real_labels, labels))
    expected = 0
    for layer in range(config.depth - 1):
        f, g = (network.features(images)[1][layer] for images in (real, synthetic))
        for k in range(10):
            ours = torch.stack([x.flatten() / x.norm() for x in g[labels == k]]).mean(0)
            target = torch.stack([x.flatten() / x.norm() for x in f[real_labels == k]]).mean(0)
            expected = expected + (target - ours).square().sum()
    torch.testing.assert_close(attention, expected)
    gradients = [torch.autograd.grad(loss, synthetic)[0] for loss in (attention, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_feature_matching_adds_to_attention():
    data = load_data("digits")
    terms = {}
    for name, settings in {"both": {"feature_maps": True}, "attention": {}}.items():
        config = preset("paper", **TINY, **settings).resolve(data.image_shape, "digits", torch.device("cpu"))
        space = fit_preprocessing(data.train_images, "standard", progress=False)
        steps = Distillation(config, data, space, initial_images(config, data, space))
        steps.step(1)
        terms[name] = steps.read_terms()
    assert terms["both"].attention_loss > terms["attention"].attention_loss > 0
    assert terms["both"].mmd_loss == pytest.approx(terms["attention"].mmd_loss, rel=1e-4)


def test_table_4_compares_losses_and_nothing_else():
    losses = {"spatial_power", "channel_power", "mmd_weight", "feature_maps"}
    base = configuration("atom", 1, 0, {}).to_dict()
    for method in ("mmd", "feature-maps", "dam", "atom-channel"):
        other = configuration(method, 1, 0, {}).to_dict()
        assert {name for name in base if base[name] != other[name]} <= losses, method


# Plans


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_the_paper_s_cells(target):
    found = plan(target)
    assert {(cell.dataset, cell.ipc) for cell, _ in found.units if cell.method != "full"} == set(TARGETS[target].cells)
    sets = {}
    for cell, evaluations in found.units:
        assert all(evaluation.networks == 20 for evaluation in evaluations)
        sets.setdefault(dataclasses.replace(cell, seed=0), set()).add(cell.seed)
    expected = {"grids": {0}}.get(found.kind, set(range(5)))
    assert all(seeds == expected or cell.method == "full" for cell, seeds in sets.items())


def test_the_paper_s_figures_stand_where_they_belong():
    entries = {row.title: row.entries for row in plan("table1").sections[0].rows}
    assert entries["ATOM"]["cifar10:10"].paper == (57.9, 0.7) and entries["ATOM"]["cifar10:10"].jobs
    assert entries["DSA"]["cifar100:50"].paper == (42.8, 0.4) and not entries["DSA"]["cifar100:50"].jobs
    assert entries["Full data set"]["tiny:1"].paper == (37.6, 0.4)
    assert "tiny:1" not in entries["K-Center"] or entries["K-Center"]["tiny:1"].paper is None
    [section] = plan("table5").sections
    assert {row.title: row.entries["p_s = 1"].paper for row in section.rows}["p_c = 8"] == (58.8, None)
    assert paper.TABLE2["ATOM"]["average"] == (62.7, 0.6) and len(paper.TABLE5) == 16
    means = [paper.TABLE2["DAM"][network][0] for network in paper.TABLE2_NETWORKS]
    assert sum(means) / 5 == pytest.approx(60.8, abs=0.05), "a digit lost in copying shows here"


def test_tables_and_figures_share_cells():
    atom = {cell.folder_name for cell, _ in plan("table1", [("cifar10", 50)], ["atom"]).units}
    for target in ("table2", "table4", "fig5"):
        shared = {cell.folder_name for cell, _ in plan(target, methods=["atom"]).units}
        assert shared <= atom, target
    [default] = [cell for cell, _ in plan("table5", seeds=1).units
                 if cell.config.spatial_power == cell.config.channel_power == 4]  # fmt: skip
    assert default.folder_name == plan("table1", [("cifar10", 10)], ["atom"]).units[0][0].folder_name


def test_a_cell_s_folder_tells_its_settings_apart():
    names = set()
    for settings in ({}, {"width": 64}, {"iterations": 10}, {"norm": "batch"}):
        names |= {cell.folder_name for cell, _ in plan("table4", CELLS, settings=settings).units}
    assert len(names) == 6 * 3 * 4 - 3 * 3, "random images differ by none of these settings"
    assert plan("table4", CELLS, seeds=1, settings={"checkpoint_every": 7}).units[0][0].folder_name in names


def test_settings_that_are_what_the_data_set_implies_are_the_same_cell():
    for cells, settings in (
        (CELLS, {"network_init": "normal", "norm": "instance", "preprocessing": "standard", "loss_scale": 10}),
        ([("cifar10", 10)], {"network_init": "default", "norm": "batch", "preprocessing": "zca", "loss_scale": 3}),
    ):
        names = [
            [cell.folder_name for cell, _ in plan("table1", cells, ["random", "atom"], settings=given).units]
            for given in ({}, settings)
        ]
        assert names[0] == names[1]


def test_all_methods_are_tested_on_the_same_networks():
    for settings in ({}, {"norm": "batch", "width": 16}):
        units = plan("table1", CELLS, settings=settings).units
        assert len({str(architecture(cell, "convnet")) for cell, _ in units}) == 1
    assert architecture(units[0][0], "convnet")["norm"] == "batch"
    assert architecture(units[0][0], "convnet", "group")["norm"] == "group" and architecture(units[0][0], "vit") == {}


def test_the_study_changes_one_setting_at_a_time():
    [section] = plan("study", [("cifar10", 1)]).sections
    base = section.rows[0].entries["accuracy"].jobs[0]
    seen = set()
    for row in section.rows[1:]:
        cell, evaluation = row.entries["accuracy"].jobs[0]
        before, after = base[0].config.to_dict(), cell.config.to_dict()
        changed = {name for name in before if before[name] != after[name]}
        changed |= {"evaluation"} if evaluation.protocol != base[1].protocol else set()
        changed |= {"evaluation_norm"} if evaluation.norm != base[1].norm else set()
        assert len(changed) == 1, row.title
        seen |= changed
    assert seen == set(FACTORS)
    assert len(section.rows) == 1 + sum(len(values) - 1 for values in FACTORS.values())


def test_protocols_are_shortened_in_proportion():
    scale = scale_for("cifar10", epochs=100)
    assert {name: scale.training(name).epochs for name in ("paper", "dc", "datadam-code")} == {
        "paper": 100, "dc": 30, "datadam-code": 180,
    }  # fmt: skip
    assert any("epochs 100 instead of 1000" in text for text in scale.reductions())
    assert scale_for("cifar10").reductions() == []


def test_what_changes_no_result_is_no_reduction():
    settings = {"checkpoint_every": 7, "log_every": 3, "class_chunk": 2}
    assert scale_for("cifar10", epochs=1000, settings=settings).reductions() == []
    assert scale_for("cifar10", settings={**settings, "width": 64}).reductions() == ["width 64 instead of 128"]
    assert scale_for("cifar10", settings={"loss_scale": 3}).reductions() == ["loss_scale 3 instead of the preset's"]
    assert scale_for("cifar10", settings={"spatial_power": None}).reductions() == ["spatial_power None instead of 4.0"]


@pytest.mark.parametrize(
    ("iterations", "said"),
    [
        (2000, "iterations 2,000 instead of 8,000, and 20,000 for DM"),
        (8000, "iterations 8,000 instead of 20,000 for DM"),
        (20_000, "iterations 20,000 instead of 8,000"),
    ],
)
def test_a_setting_of_which_dm_has_its_own_names_only_what_it_replaces(iterations, said):
    assert scale_for("cifar10", settings={"iterations": iterations}).reductions() == [said]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["table9"], "table1"),
        (["table1", "--cells", "cifar11:1"], "cifar11:1"),
        (["table1", "--cells", "cifar10:0"], "cifar10:0"),
        (["table1", "--cells", "cifar10"], "DATASET:IPC"),
        (["table2", "--methods", "herding"], "dm, dam, atom"),
        (["table2", "--cells", "digits:1"], "digits32"),
        (["study", "--factors", "norm,colour"], "colour"),
        (["table4", "--factors", "norm"], "only study has factors"),
        (["table4", "--set", "no_such=1"], "no_such"),
        (["table4", "--set", "norm"], "NAME=VALUE"),
        (["table4", "--set", "image_init=given"], "real, noise or herding"),
        (["table4", "--set", "loss_scale=["], "not readable as YAML"),
        (["table4", "--set", "norm=!!bool x"], "not readable as YAML"),
        (["table5", "--set", "channel_power=2"], "varies channel_power itself"),
        (["table1", "--cells", "digits:²"], "DATASET:IPC"),
        (["table4", "--set", "norm=[1, 2]"], "norm"),
        (["table4", "--set", "seed=3"], "--seeds"),
        (["table4", "--set", "ipc=3"], "--cells"),
        (["table4", "--seeds", "0"], "seeds"),
        (["table4", "--cells", "digits:99999999999999", "--set", "image_init=noise"], "ipc must be a whole number"),
        (["table4", "--set", "memory_budget=0"], "'600 MB'"),
        (["table4", "--cells", "digits:1", "--only", "99"], "99"),
        (["table4", "--cells", "digits:1000", "--seeds", "1", "--methods", "atom", "--quiet"], "1000"),
    ],
)
def test_what_does_not_exist_is_named(arguments, named, tmp_path):
    options = [] if "--only" not in arguments and "1000" not in str(arguments) else ["--device", "cpu"]
    _, error = command(*arguments, "--output", tmp_path, *options, code=2)
    assert named in error and "Traceback" not in error


def test_cells_are_read():
    assert parse_cell(" tiny:50") == ("tiny", 50)
    for text in ("tiny", "tiny:", "tiny:x", "tiny:-1", "svhn:1"):
        with pytest.raises(ValueError, match="DATASET:IPC"):
            parse_cell(text)


# Data


def test_missing_data_says_where_and_how(tmp_path):
    _, error = command("fig5", "--data-dir", tmp_path, "--output", tmp_path / "out", "--quiet", code=2)
    assert str(tmp_path) in error and "--download" in error and "train/<class>" in error
    assert not list((tmp_path / "out").glob("cells/*/*"))


def write_folder(root, quality=None, classes=10, size=32):
    for split in ("train", "test"):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            image = Image.effect_noise((size, size), 40 + label).convert("RGB")
            if quality:
                image.save(folder / "0.jpg", quality=quality)
            else:
                image.save(folder / "0.png")


@pytest.mark.parametrize(
    ("quality", "title"), [(75, "CIFAR-10 (JPEG q75)"), (90, "CIFAR-10 (JPEG q90)"), (None, "CIFAR-10 (PNG)")]
)
def test_folders_of_images_are_named_by_their_format(quality, title, tmp_path):
    write_folder(tmp_path / "cifar10", quality)
    data, found = load_named("cifar10", tmp_path, progress=False)
    assert (found, data.name, data.num_classes) == (title, "cifar10", 10)
    assert load_named("cifar10", tmp_path / "cifar10", progress=False)[1] == title


def test_images_of_another_data_set_are_refused(tmp_path):
    write_folder(tmp_path, classes=3)
    with pytest.raises(ValueError, match="10 classes"):
        load_named("cifar10", tmp_path, progress=False)


# Cells


def test_a_table_ends_with_ours_beside_the_paper_s(table4):
    output, record = table4
    assert record == json.loads((output / "table4.json").read_text())
    [section] = record["sections"]
    assert [row["title"] for row in section["rows"]][:2] == ["Random (nothing is matched)", "MMD"]
    for row in section["rows"]:
        ours = row["entries"]["digits:1"]["ours"]
        assert 0 <= ours["mean"] <= 100 and ours["sets"] == ours["networks"] == 1
        assert f"| {row['title']} " in (output / "table4.md").read_text()
    assert any("iterations 4 instead of 8,000" in text for text in record["reduced"]["digits"])
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
    record = json.loads(path.read_text())
    [first] = record["curves"]
    path.write_text(json.dumps({**record, "curves": [first, {}, {}, {"3": 12.5}]}))  # two of four, interrupted
    run(small("table4", ["atom"], networks=2), output)
    curves = json.loads(path.read_text())["curves"]
    assert curves[0] == first and curves[1] and curves[2:] == [{}, {"3": 12.5}]


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
    "a cell of `reproduce` becomes NaN, or needs more memory than there is",
    "it is named, marked as failed in the table, and the others are done; exit code 2; the same command tries again",
)
@pytest.mark.parametrize(
    ("what", "budget"), [("NaN", None), ("NaN", 60.0), ("memory", None), ("can't allocate memory", None)]
)
def test_a_cell_that_fails_does_not_keep_the_others(tmp_path, monkeypatch, what, budget):
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
        run(target, tmp_path, budget=budget)
    record = json.loads((tmp_path / "table4.json").read_text())
    rows = {row["title"]: row["entries"]["digits:1"] for row in record["sections"][0]["rows"]}
    assert [name.split("-seed0")[0] for name in record["failed"]] == ["digits-ipc1-mmd"]
    assert rows["MMD"]["failed"] == 1 and rows["MMD"]["ours"] is None
    assert rows["MMD + spatial + channel"]["ours"] and not rows["MMD + spatial + channel"]["failed"]
    assert re.search(r"^\| MMD +\| failed ", render(record), flags=re.MULTILINE)
    monkeypatch.setattr(Distillation, "step", original)
    record, _ = run(target, tmp_path)
    assert record["failed"] == {} and "failed" not in render(record) and "not measured" not in render(record)


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

    def evaluating(output, cell, evaluations, shelf):
        if cell.method == "random":
            return work.work(output, cell, evaluations, shelf)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal comes before the next line")

    monkeypatch.setattr("benchmarks.accuracy.run.work", evaluating)
    with pytest.raises(SystemExit) as ended:
        run(small("table4", ["random", "atom"]), tmp_path)
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    rows = json.loads((tmp_path / "table4.json").read_text())["sections"][0]["rows"]
    ours = {row["title"]: row["entries"]["digits:1"]["ours"] for row in rows}
    assert ours["Random (nothing is matched)"] and ours["MMD + spatial + channel"] is None


def test_classes_that_are_too_small_are_found_before_a_network_is_trained(monkeypatch):
    monkeypatch.setattr("atom_fast.evaluation.sets.watch_training", None)
    with pytest.raises(ValueError, match="200 different ones per class were asked for; give an ipc of at most 135"):
        select(load_data("digits"), "herding", 200)


def test_settings_on_the_command_line_are_read():
    given = ["spatial_power=none", "loss_scale=1e2", "norm=batch", "image_average=true", "channel-power=2"]
    assert _parse_settings(given) == {
        "spatial_power": None, "loss_scale": 100.0, "norm": "batch", "image_average": True, "channel_power": 2,
    }  # fmt: skip


def test_no_setting_undoes_what_defines_a_method():
    given = {"channel_power": 8.0, "spatial_power": 2.0, "mmd_weight": 0.5, "feature_maps": False}
    found = {name: configuration(name, 1, 0, given) for name in ("atom", "dam", "atom-channel", "mmd", "feature-maps")}
    assert {name: (c.spatial_power, c.channel_power, c.feature_maps, c.mmd_weight) for name, c in found.items()} == {
        "atom": (2.0, 8.0, False, 0.5),
        "dam": (2.0, None, False, 0.5),
        "atom-channel": (None, 8.0, False, 0.5),
        "mmd": (None, None, False, 1.0),
        "feature-maps": (None, None, True, 0.5),
    }


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
    "cells of a data set in a folder of `reproduce` were made from other images than the data at hand, or each other",
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
    with pytest.raises(ValueError, match=r"other images of digits .* than the images at hand \(digits\).*--output"):
        run(small("table4", seeds=2), output)
    assert sorted(output.rglob("*")) == before
    assert run(small("table4"), output)[0]["data"] == {"digits": "digits (JPEG)"}, "what is finished needs no data"


def test_a_stopped_run_writes_what_is_finished(tmp_path, monkeypatch):
    def stop(self, iteration):
        raise SystemExit(143)

    monkeypatch.setattr(Distillation, "step", stop)
    with pytest.raises(SystemExit):
        run(small("table4", ["random", "atom"]), tmp_path)
    record = json.loads((tmp_path / "table4.json").read_text())
    ours = [row["entries"]["digits:1"]["ours"] for row in record["sections"][0]["rows"]]
    assert ours[0]["networks"] == 1 and not any(ours[1:])


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


@pytest.mark.fault(
    "Folders", "the file system has no locks for the cells of `reproduce`", "one warning; the cells still run"
)
def test_cells_on_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    record, _ = run(small("table4", ["random"], seeds=2), tmp_path)
    assert record["sections"][0]["rows"][0]["entries"]["digits:1"]["ours"]["sets"] == 2
    assert capsys.readouterr().err.count(f"{tmp_path / 'cells'} cannot be locked (No locks available)") == 1


class SecondOfTwo(World):
    """As if another process were there that has nothing to say."""

    rank, size, local_rank, label = 1, 2, 1, "rank 1: "


def test_each_process_has_its_own_gpu_and_the_first_one_writes(table4, tmp_path, monkeypatch):
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output, ignore=lambda folder, names: [name for name in names if "table4" in name])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda index: None)
    devices = []
    monkeypatch.setattr("benchmarks.accuracy.run.Shelf", lambda *arguments, device, **options: devices.append(device))
    record = reproduce(small("table4"), output, progress=False, report=str, world=SecondOfTwo())
    assert devices == [torch.device("cuda", 1)]
    assert record["sections"] == table4[1]["sections"] and not list(output.glob("table4*"))


def share_a_table(world, output):
    said = []
    record = reproduce(
        small("table4", ["random", "mmd", "atom"], seeds=2), output, device="cpu", progress=False, report=said.append,
        world=world,
    )  # fmt: skip
    return record["sections"], said


def test_processes_started_together_share_the_cells(tmp_path, context):  # noqa: F811  the fixture
    found = Launch(context, 2, share_a_table, tmp_path).results()
    assert not any(isinstance(one, BaseException) for one in found), found
    assert found[0][0] == found[1][0] == json.loads((tmp_path / "table4.json").read_text())["sections"]
    assert {entry["ours"]["sets"] for row in found[0][0][0]["rows"] for entry in row["entries"].values()
            if entry["ours"]} == {2}  # fmt: skip
    assert sum("written:" in line for _, said in found for line in said) == 1
    starts = [json.loads(path.read_text()) for path in tmp_path.glob("cells/*/run/environment.json")]
    assert len(starts) == 4 and all(len(one) == 1 for one in starts), "no cell is done twice"


def damaged(folder, what, **changed):
    if what == "note":
        (folder / CELL_FILE).write_text('{"format": ')
    elif what == "evaluation":
        next(folder.glob("evaluation-*.json")).write_text("")
    elif what == "results":  # JSON, but not an evaluation's
        path = next(folder.glob("evaluation-*.json"))
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
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


# Budget


def test_a_budget_takes_what_fits_in_order():
    assert choose(["a", "b", "c"], [40.0, 100.0, 20.0], 1.0) == (["a", "c"], ["b"])
    assert choose(["a"], [1.0], 0.0) == ([], ["a"])


@pytest.mark.parametrize("budget", [-3.0, float("nan")])
def test_a_budget_that_is_none_is_refused(tmp_path, budget):
    with pytest.raises(ValueError, match=f"budget must be at least 0 minutes; got {budget:g}"):
        run(small("table4", ["random"]), tmp_path, budget=budget)
    assert not list(tmp_path.iterdir())


def test_a_budget_names_what_runs_and_what_is_left(table4, tmp_path, monkeypatch):
    output = tmp_path / "copy"
    shutil.copytree(table4[0], output)
    target = small("table4", ["random", "mmd", "atom"], seeds=2)
    seconds = {"random": 5.0, "mmd": 30.0, "atom": 1000.0}
    monkeypatch.setattr(Estimator, "seconds", lambda self, unit: seconds[unit[0].method])
    record, said = run(target, output, budget=1.0)
    assert said[0].endswith("6 cells, 3 of them finished") and said[1].startswith("estimating 3 cells: ")
    assert "2 of 3 cells fit into 1 min" in said[2] and "not counted: fitting the whitening" in said[2]
    assert any("left, 17 min" in line and "atom seed 1" in line for line in said)
    entries = {row["title"]: row["entries"]["digits:1"]["ours"] for row in record["sections"][0]["rows"]}
    assert entries["MMD"]["sets"] == 2 and entries["MMD + spatial + channel"]["sets"] == 1
    assert "(1 of 2 sets)" in render(record)


def test_what_is_being_estimated_is_shown_before_it_is(tmp_path, monkeypatch, capsys):
    shown = []

    def seconds(self, unit):
        shown.append((unit[0].method, capsys.readouterr().err))
        return 0.0

    monkeypatch.setattr(Estimator, "seconds", seconds)
    monkeypatch.setattr("benchmarks.accuracy.run._do", lambda output, units, *rest: units)
    reproduce(small("table4", ["mmd", "atom"]), tmp_path, device="cpu", budget=1.0)
    assert [method for method, _ in shown] == ["mmd", "atom"]
    assert all(f"digits ipc 1 {method} seed 0" in bar for method, bar in shown)


def test_estimates_come_from_finished_cells_or_probes(table4, tmp_path):
    shelf = work.Shelf(None, download=False, device=torch.device("cpu"), progress=False)
    target = small("table4", seeds=2)
    known = Estimator(table4[0], target.units, shelf)
    for unit in target.units:
        cell, [evaluation] = unit
        if cell.seed == 0:
            assert known.seconds(unit) == 0
        elif cell.method == "atom":
            found = read_evaluation(table4[0], dataclasses.replace(cell, seed=0), evaluation)
            assert known.seconds(unit) >= found["set_seconds"]
    assert not known._probed
    [unit] = small("table4", ["atom"]).units
    assert 0 < Estimator(tmp_path, [unit], shelf).seconds(unit) < 60


@pytest.fixture
def estimated(monkeypatch):
    """Estimators that take a set for 100 seconds, and an evaluation for 10, where nothing is measured."""
    monkeypatch.setattr(Estimator, "_probe_set", lambda self, cell: 100.0)
    monkeypatch.setattr(Estimator, "_probe_evaluation", lambda self, cell, evaluation: 10.0)
    return lambda output, unit, units=None: Estimator(output, units or [unit], None).seconds(unit)


def test_an_estimate_is_of_what_is_left(tmp_path, monkeypatch, estimated):
    target = small("table4", ["atom"], networks=4, settings={**TINY, "checkpoint_every": 2})
    [unit] = target.units
    assert estimated(tmp_path, unit) == 110
    interrupted_at_3(target, tmp_path, monkeypatch)
    assert estimated(tmp_path, unit) == 60
    run(small("table4", ["atom"], settings={**TINY, "checkpoint_every": 2}), tmp_path)
    assert estimated(tmp_path, unit) == 7.5
    run(target, tmp_path)
    assert estimated(tmp_path, unit) == 0


def test_an_estimate_takes_no_milestone_for_the_whole_set(tmp_path, estimated):
    run(small("fig3", ["atom"]), tmp_path)
    units = small("fig3", ["atom"], seeds=2).units
    for evaluation, seconds in zip(units[0][1], (1.0, 2.0, 3.0, 4.0), strict=True):
        path = evaluation_file(tmp_path, units[0][0], evaluation)
        path.write_text(json.dumps({**json.loads(path.read_text()), "set_seconds": seconds, "seconds": 0.5}))
    assert estimated(tmp_path, units[1], units) == 4 + 4 * 0.5


def test_a_probe_trains_networks_of_the_norm_asked_for(tmp_path, monkeypatch):
    from benchmarks.accuracy import budget

    norms, original = set(), budget.evaluate

    def spy(*arguments, **options):
        norms.add(options["architecture"]["norm"])
        return original(*arguments, **options)

    monkeypatch.setattr(budget, "evaluate", spy)
    shelf = work.Shelf(None, download=False, device=torch.device("cpu"), progress=False)
    cell, evaluations = plan("study", CELLS, factors=["evaluation_norm"], **SMALL).units[0]
    [evaluation] = [one for one in evaluations if one.norm == "batch"]
    assert Estimator(tmp_path, [], shelf)._evaluation_seconds(cell, evaluation) > 0 and norms == {"batch"}


# Figures, and the rest of the tables


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
    assert not any("networks" in text or "sets" in text or "epochs" in text for text in record["reduced"]["digits"])
    assert record["reduced"]["digits"] and record["data"] == {"digits": "digits"}
    with Image.open(output / "fig4-digits-ipc1.png") as picture:
        assert picture.convert("RGB").getextrema() != ((255, 255),) * 3


def test_table_2_averages_over_architectures(tmp_path, monkeypatch):
    cells = (("digits32", 1),)
    networks = {evaluation.network for _, found in small("table2", cells=cells).units for evaluation in found}
    assert networks == set(paper.TABLE2_NETWORKS)
    monkeypatch.setattr("benchmarks.accuracy.targets._NETWORK_TITLES", {"convnet": "ConvNet", "alexnet": "AlexNet"})
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
    """Not what the machine has that puts it together."""
    target = small("table1", ["random"], seeds=2)
    run(target, tmp_path)
    [first, second] = [evaluation_file(tmp_path, cell, evaluations[0]) for cell, evaluations in target.units]
    for path, torch_version in ((first, "2.11.0"), (second, "1.0")):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "versions": {"torch": torch_version}}))
    record = collect(target, tmp_path)
    assert record["versions"] == {"torch": "1.0, 2.11.0"} and "torch 1.0, 2.11.0." in render(record)


def test_a_set_of_before_a_setting_came_is_its_cell_s(tmp_path):
    target = small("table1", ["dam"], seeds=1)
    [(cell, _)] = target.units
    run(target, tmp_path)
    folder = cell_folder(tmp_path, cell)
    made = work.load_set(folder, cell)
    del made.metadata["config"]["image_average"]
    made.save(work.final_set_file(tmp_path, cell))
    assert "image_average" not in work.load_set(folder, cell).metadata["config"]


def test_rows_are_compared_set_by_set():
    base = {"seeds": [0, 1, 2], "accuracies": [[10.0, 20.0], [30.0], [None]]}
    other = {"seeds": [1, 0, 3], "accuracies": [[34.0], [15.0, None], [99.0]]}
    mean, error = _paired(other, base)
    assert (mean, error) == (2.0, pytest.approx(2.0)), "of seeds 0 and 1, by 0 and 4"
    assert _paired({"seeds": [1], "accuracies": [[31.0]]}, base) == [1.0, None]
    assert _paired(other, None) is None and _paired({"seeds": [9], "accuracies": [[1.0]]}, base) is None


def test_what_is_not_measured_is_not_filled_in(tmp_path):
    record = collect(plan("table1", [("cifar10", 1)], ["atom"]), tmp_path)
    rows = {row["title"]: row["entries"]["cifar10:1"] for row in record["sections"][0]["rows"]}
    assert rows["ATOM"]["ours"] is None and rows["ATOM"]["difference"] is None and not rows["ATOM"]["cited"]
    assert rows["DC"]["cited"] and rows["DC"]["paper"] == [28.3, 0.5]
    text = render(record)
    assert "not measured" in text and "(cited)" in text and "at the size of the paper" in text
    assert set(METHODS) >= set(TARGETS["table1"].methods)
    assert rows["ATOM"]["source"] == "" and "(Table 1)" not in text
    text = render(collect(plan("table4", [("cifar10", 10)], ["atom"]), tmp_path))
    rows = dict(re.findall(r"^\| (MMD[^|]*?) +\| ([^|]*?) +\|", text, flags=re.MULTILINE))
    assert rows["MMD"] == "(cited)" and rows["MMD + feature map"] == "–", "the paper has no figure for the latter"


def test_figures_of_another_table_are_marked_with_it(tmp_path):
    """The paper's Table 4 has one cell; what stands beside others is from its Table 1."""
    cells = [("cifar10", 50), ("cifar10", 1)]
    record = collect(plan("table4", cells, ["atom"]), tmp_path)
    rows = {row["title"]: row["entries"] for row in record["sections"][0]["rows"]}
    atom, random = rows["MMD + spatial + channel"], rows["Random (nothing is matched)"]
    assert [atom[cell]["source"] for cell in ("cifar10:50", "cifar10:1")] == ["", "Table 1"]
    assert [random[cell]["source"] for cell in ("cifar10:50", "cifar10:1")] == ["Table 1", "Table 1"]
    both = render(record)
    assert "(paper 68.8 ± 0.5)" in both and "(paper, Table 1: 34.8 ± 1.0)" in both
    assert "14.4 ± 2.0 (cited, Table 1)" in both
    alone = render(collect(plan("table4", cells[1:], ["atom"]), tmp_path))
    assert "| 34.8 ± 1.0 (Table 1) |" in alone and "| 32.0 ± 1.2 (Table 1) |" in alone
    study = render(collect(plan("study", cells[1:], factors=["pooling"]), tmp_path))
    assert "| 34.8 ± 1.0 (Table 1) |" in study


# Documents


def test_commands_on_the_page_exist():
    page = Path(__file__).resolve().parents[2] / "docs" / "results.md"
    commands = re.findall(r"^atom-fast reproduce (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    assert len(commands) > 3
    for line in commands:
        arguments = shlex.split(line, comments=True)
        command = main.commands["reproduce"]
        options = command.make_context("reproduce", arguments, click.Context(main, **main.context_settings)).params
        scale = {name: options[name] for name in ("seeds", "networks", "epochs")}
        assert plan(options["target"], options["cells"], options["methods"], options["factors"], **scale).units


def test_a_table_is_shown_as_it_was_measured(tmp_path, table4):
    from benchmarks import reproduction

    results = tmp_path / "results"
    results.mkdir()
    kept = results / "reproduce-digits-table4.json"
    shutil.copy(table4[0] / "table4.json", kept)
    record = reproduction.read(kept)
    shown = reproduction.sections(results)["digits-table4"]
    for column in record.columns:
        for row in record.rows(column):
            assert f"| {reproduction.ROWS.get(row.title, row.title)}" in shown
            assert f"{row.mean:.1f} ± {row.std:.1f}" in shown
    assert "(paper: " in shown and "Measured on a CPU" in shown and "instead of" not in shown
    kept.write_text("{}")
    with pytest.raises(ValueError, match="reproduce-digits-table4"):
        reproduction.sections(results)
