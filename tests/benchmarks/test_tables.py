"""The paper's tables as plans: cells, settings, sizes, and the commands that name them."""

import dataclasses

import pytest
import torch
from PIL import Image

from atom_fast.training.protocols import PROTOCOLS, get_protocol
from benchmarks import paper
from benchmarks.accuracy import TARGETS, plan
from benchmarks.accuracy.cells import Evaluation, architecture
from benchmarks.accuracy.datasets import load_named
from benchmarks.accuracy.size import size_for
from benchmarks.accuracy.study import FACTORS
from benchmarks.accuracy.tables import parse_cell
from benchmarks.methods import configuration, get_method
from tests.benchmarks.tiny import CELLS


def test_table_4_compares_losses_and_nothing_else():
    losses = {"spatial_power", "channel_power", "mmd_weight", "feature_maps"}
    base = configuration("atom", 1, 0, {}).to_dict()
    for method in ("mmd", "feature-maps", "dam", "atom-channel"):
        other = configuration(method, 1, 0, {}).to_dict()
        assert {name for name in base if base[name] != other[name]} <= losses, method


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
    hard, learnt = plan("table1").sections
    entries = {row.title: row.entries for row in hard.rows}
    assert entries["ATOM"]["cifar10:10"].paper == (57.9, 0.7) and entries["ATOM"]["cifar10:10"].jobs
    assert entries["DSA"]["cifar100:50"].paper == (42.8, 0.4) and entries["DSA"]["cifar100:50"].jobs
    assert entries["KIP"]["cifar100:10"].paper == (29.0, 0.3) and not entries["KIP"]["cifar100:10"].jobs
    assert entries["MTT"]["cifar10:1"].paper is None and entries["MTT"]["cifar10:1"].jobs
    assert {row.title: row.entries["cifar10:1"].paper for row in learnt.rows} == {"LD": (25.7, 0.7), "FRePo": None}
    assert [row.title for row in hard.rows][-4:] == ["DAM", "ATOM†", "ATOM", "Full data set"]
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
        matched = [cell for cell, _ in units if get_method(cell.method).loss == "matching"]
        others = [cell for cell, _ in units if cell not in matched]
        assert len({str(architecture(cell, "convnet")) for cell in matched}) == 1
        assert all(architecture(cell, "convnet")["norm"] == "instance" for cell in others) and len(others) > 10
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


def test_methods_of_another_loss_have_settings_of_their_own():
    given = {"iterations": 10, "width": 16, "real_batch": 32, "partition": 1, "experts": 3}
    size = size_for("cifar10", settings=given, of_methods={"dsa": {"iterations": 100}})
    assert size.settings_of("dsa") == {"iterations": 100, "width": 16, "real_batch": 32}
    assert size.settings_of("mtt") == {"width": 16, "experts": 3}
    assert size.settings_of("atom") == {name: given[name] for name in given if name != "experts"}
    assert {"name": "DSA", "value": {"iterations": 100}, "usual": {"iterations": 1000}} in size.reductions(["dsa"])
    assert all(entry["name"] != "DSA" for entry in size.reductions(["atom"]))
    with pytest.raises(ValueError, match="atom has the settings of the table; got iterations of its own"):
        size_for("cifar10", of_methods={"atom": {"iterations": 5}})
    with pytest.raises(ValueError, match="iterations must be .* at least 1; got 0"):
        size_for("cifar10", of_methods={"dsa": {"iterations": 0}})
    with pytest.raises(ValueError, match="method must be one of .*; got 'dsb'"):
        size_for("cifar10", of_methods={"dsb": {"iterations": 5}})
    for method in ("dc", "dcc", "dsac", "cafe", "cafe-dsa", "dd", "ld", "mtt", "tesla", "frepo"):
        [(cell, _)] = plan("table1", [("digits", 1)], [method], seeds=1).units
        cell.config.resolve((1, 8, 8), "digits", torch.device("cpu"))  # no setting of it is refused


def test_settings_of_one_method_do_not_change_the_networks_that_test_it():
    units = plan("table1", [("digits", 1)], ["dsa", "mtt", "random"], seeds=1).units
    assert {cell.method: cell.resolved_config.depth for cell, _ in units} == {"dsa": 2, "mtt": 2, "random": 3}
    assert {architecture(cell, "convnet")["depth"] for cell, _ in units} == {3}
    units = plan("table1", [("digits", 1)], ["dsa", "mtt", "random"], seeds=1, settings={"depth": 1}).units
    assert {architecture(cell, "convnet")["depth"] for cell, _ in units} == {1}


def test_protocols_are_shortened_in_proportion():
    size = size_for("cifar10", epochs=100)
    assert {name: size.training(name).epochs for name in ("paper", "dc", "datadam-code")} == {
        "paper": 100, "dc": 30, "datadam-code": 180,
    }  # fmt: skip
    assert {"name": "evaluation epochs", "value": 100, "usual": 1000} in size.reductions()
    assert size_for("cifar10").reductions() == []


def test_results_files_have_the_names_of_earlier_versions():
    shorter = get_protocol("datadam-code", epochs=180)
    assert Evaluation("convnet", PROTOCOLS["paper"], 5).file_name({"width": 128}) == "evaluation-convnet-2cfd3596.json"
    assert Evaluation("vit", shorter, 5, 100).file_name({}) == "evaluation-vit-6369b9ed-iteration-00000100.json"


def test_what_changes_no_result_is_no_reduction():
    def named(**settings):
        return [(r["name"], r["value"], r["usual"]) for r in size_for("cifar10", settings=settings).reductions()]

    unchanged = {"checkpoint_every": 7, "log_every": 3, "class_chunk": 2}
    assert size_for("cifar10", epochs=1000, settings=unchanged).reductions() == []
    assert named(**unchanged, width=64) == [("width", 64, 128)]
    assert named(loss_scale=3) == [("loss_scale", 3, None)]
    assert named(spatial_power=None) == [("spatial_power", None, 4.0)]


@pytest.mark.parametrize("iterations", [2000, 8000, 20_000])
def test_a_setting_of_which_dm_has_its_own_is_shown_beside_both(iterations):
    [reduction] = size_for("cifar10", settings={"iterations": iterations}).reductions()
    assert reduction == {"name": "iterations", "value": iterations, "usual": 8000, "dm": 20_000}


def test_cells_are_read():
    assert parse_cell(" tiny:50") == ("tiny", 50)
    for text in ("tiny", "tiny:", "tiny:x", "tiny:-1", "svhn:1"):
        with pytest.raises(ValueError, match="DATASET:IPC"):
            parse_cell(text)


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
