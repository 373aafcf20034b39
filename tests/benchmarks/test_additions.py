"""The study of additions: rows that differ by one thing, bases, selected images with a partition, and its page."""

import json
import shlex
import shutil

import pytest

from atom_fast.distillation.config import SETTINGS
from atom_fast.ops import native
from benchmarks.__main__ import main, parse_settings
from benchmarks.accuracy import plan, work
from benchmarks.accuracy.additions import ADDITIONS
from benchmarks.accuracy.cells import architecture, cell_folder
from benchmarks.pages import results
from tests.benchmarks.tiny import run, small

LOSS = {"spatial_power", "channel_power", "mmd_weight", "loss_scale", "calibration_weight", "characteristic_weight"}
POOL = {"pool_networks": 1, "pool_epochs": 1}


def configs(section):
    return {row.title: row.entries["accuracy"].jobs[0][0].resolved_config for row in section.rows}


def differing(one, other):
    return {name for name in SETTINGS if getattr(one, name) != getattr(other, name)}


def test_rows_differ_by_their_loss_or_by_one_addition():
    methods, ladder = plan("additions", [("cifar10", 10)]).sections
    found = configs(methods)
    for row in methods.rows:
        if row.title.startswith(("DAM", "ATOM")) and "preset" not in row.title:
            assert differing(found[row.title], found[row.base]) <= LOSS, row.title
    for method in ("DM", "DAM", "ATOM"):
        levels = [config for title, config in found.items() if title == method or title.startswith(f"{method}, part")]
        assert len(levels) == 1 + len(ADDITIONS)
        for names, before, after in zip(ADDITIONS.values(), levels, levels[1:], strict=False):
            assert differing(before, after) and differing(before, after) <= {*names}
    [dm, atom] = (found[f"{method}, partition 2, pool, cross-entropy"] for method in ("DM", "ATOM"))
    assert dm.loss_scale == 1 and dm.loss_scale * dm.calibration_weight == atom.loss_scale * atom.calibration_weight
    cells = {row.title: row.entries["accuracy"].jobs[0][0] for row in ladder.rows}
    assert cells["preset best"] == cells["+ characteristic function"] and ladder.base == "ATOM"
    tested = {str(architecture(cell, "convnet")) for cell in cells.values()}
    assert len(tested) == 1 and "batch" in tested.pop()


def test_settings_on_the_command_line_count_where_they_belong():
    given = {"width": 16, "norm": "batch", "partition": 4, "loss_scale": 2.0, **POOL}
    section = plan("additions", [("cifar10", 1)], settings=given).sections[0]
    found = configs(section)
    assert {config.width for config in found.values()} == {16} and {c.norm for c in found.values()} == {"batch"}
    assert found["ATOM"].partition == 1 and found["ATOM"].pool_networks == 0
    assert found["ATOM, partition 4, pool"].pool_networks == 1
    assert found["DM"].loss_scale == found["ATOM"].loss_scale == 2
    alone = plan("additions", [("cifar10", 1)], ["dm"], settings={"partition": 1}).sections
    assert [row.title for row in alone[0].rows][:2] == ["DM", "DM, pool"] and len(alone) == 1


def test_selected_images_have_a_folder_for_each_partition():
    names = [
        [cell.folder_name for cell, _ in plan("table1", [("cifar10", 1)], ["random", "herding"], **given).units]
        for given in ({}, {"settings": {"partition": 1}}, {"settings": {"partition": 2}})
    ]
    assert names[0] == names[1] and not set(names[1]) & set(names[2])
    assert names[0][0] == "cifar10-ipc1-random-seed0-d5a38a9f", "the name of earlier versions"
    full = [plan("table1", [("cifar10", 1)], ["full"], settings={"partition": p}).units[-1][0] for p in (1, 2)]
    assert full[0].folder_name == full[1].folder_name and full[1].partition == 1


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Folder, plan and record of a small study, with a pool of its own."""
    output = tmp_path_factory.mktemp("additions")
    native.is_built()  # from the user's cache, before there is another
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(output / "cache"))
    settings = {"iterations": 2, "width": 4, "depth": 2, "real_batch": 4, **POOL}
    settings |= {"calibration_weight": 0.0, "easy_fraction": 1.0}  # fewer rows
    target = small("additions", ["random", "dm", "atom"], settings=settings, seeds=2)
    record, _ = run(target, output)
    patch.undo()
    return output, target, record


def test_a_difference_pairs_rows_of_the_same_additions(measured):
    output, target, record = measured
    methods, ladder = record["sections"]
    rows = {row["title"]: row["entries"]["accuracy"] for row in methods["rows"]}
    for title, entry in rows.items():
        if title.startswith("DM") or "preset" in title:
            assert entry["to_base"] is None
            continue
        difference, error = entry["to_base"]
        base = rows[title.replace("ATOM", "DM").replace("Random", "DM")]
        assert difference == pytest.approx(entry["ours"]["mean"] - base["ours"]["mean"]) and error is not None
    assert ladder["rows"][-1]["title"] == "preset best" and ladder["rows"][-1]["entries"]["accuracy"]["to_base"]
    [random] = [cell for cell, _ in target.units if cell.method == "random" and cell.seed == 0]
    chosen = work.load_set(cell_folder(output, random), random)
    assert chosen.partition == 2 and chosen.ipc == 1 and len(chosen) == 40


def test_the_page_shows_the_study_and_its_command(measured, tmp_path):
    output, target, _ = measured
    assert results.sections(tmp_path)["additions"] == ""
    shutil.copy(output / "additions.json", tmp_path / "digits-additions.json")
    text = results.sections(tmp_path)["additions"]
    assert "digits-additions" not in results.sections(tmp_path), "it has no section of its own"
    assert "| ATOM, partition 2, pool " in text and "difference to DM" in text and "Cross-entropy" not in text
    assert "difference to ATOM" in text and "Random, partition 2" in text and "Herding" not in text.split("|", 1)[1]
    assert "Protocol digits (3 epochs)" in text.replace("\n", " ") and "width 4" in text and "2 steps" in text
    [command] = [line for line in text.splitlines() if line.startswith("python -m benchmarks additions")]
    arguments = shlex.split(command, comments=True)[4:]
    options = main.commands["additions"].make_context("additions", arguments).params
    assert command.endswith("# digits-additions") and options["epochs"] == 3 and options["seeds"] == 2
    size = {name: options[name] for name in ("seeds", "networks", "epochs", "protocol", "selection_epochs")}
    again = plan("additions", options["cells"], options["methods"], settings=parse_settings(options["given"]), **size)
    assert {cell.folder_name for cell, _ in again.units} == {cell.folder_name for cell, _ in target.units}
    assert json.loads((output / "additions.json").read_text())["target"] == "additions"
