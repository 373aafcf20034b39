"""The command line: its help, its precedence of settings, its errors, and one small run from end to end."""

import json
import os
import shlex
import subprocess
import sys
import time

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

import atom_fast.distillation
from atom_fast import demo
from atom_fast.cli import main
from atom_fast.data.sources import load_data
from atom_fast.distillation.config import PRESETS, SETTINGS, DistillConfig, preset, read_config
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import PROTOCOLS, get_protocol

TINY = ["--width", "8", "--depth", "2", "--iterations", "4", "--real-batch", "8", "--log-every", "2"]


def run(*arguments, code=0):
    """Standard output and standard error of a command that must exit with ``code``, and never by a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    run("distill", "--output", output, "--ipc", 2, "--device", "cpu", "--quiet", *TINY)
    return output


def help_of(command):
    """The help of every option of a command, as one line by its first name."""
    entries = {}
    for line in run(command, "--help")[0].split("Options:")[1].splitlines():
        if line.startswith(("  -h", "  --")):
            name = line.split()[0]
            entries[name] = line
        elif line:
            entries[name] += " " + line
    return {name: " ".join(entry.split()).replace("- ", "-") for name, entry in entries.items()}


@pytest.mark.parametrize("command", main.commands)
def test_help_gives_every_option_with_its_default(command):
    entries = help_of(command)
    options = [parameter for parameter in main.commands[command].params if isinstance(parameter, click.Option)]
    assert set(entries) == {option.opts[0] for option in options} | {"-h,"}
    for option in options:
        assert "[default: " in entries[option.opts[0]], option.name


def test_help_gives_every_setting_with_default_and_unit():
    entries = help_of("distill")
    for name, setting in SETTINGS.items():
        default = setting["default"]
        shown = "auto" if default is None else f"{str(default).lower()} {setting['unit']}".rstrip()
        assert entries[f"--{name.replace('_', '-')}"].endswith(f"[default: {shown}]"), name


@pytest.mark.parametrize("command", main.commands)
def test_no_default_is_none(command):
    """It would mean derived in one place, left out in another, and not written in a third."""
    assert "[default: none]" not in " ".join(help_of(command).values())


def test_help_says_what_none_leaves_out_and_what_is_derived():
    entries = help_of("distill")
    assert "FLOAT|NONE" in entries["--spatial-power"]
    assert "none: no spatial attention [default: 4.0]" in entries["--spatial-power"]
    assert "FLOAT|AUTO" in entries["--loss-scale"] and "NONE" not in entries["--loss-scale"]
    assert "auto: 10; with BatchNorm 0.3 x ipc" in entries["--loss-scale"]
    assert entries["--loss-scale"].endswith("[default: auto]")


def test_help_and_version_answer_within_a_second_and_without_pytorch():
    code = """
import contextlib, sys, time
started = time.process_time()
from atom_fast.__main__ import main
from atom_fast import cli
for arguments in (["--version"], ["--help"], *([name, "--help"] for name in cli.main.commands)):
    sys.argv = ["atom-fast", *arguments]
    with contextlib.suppress(SystemExit):
        main()
    if arguments == ["--help"]:
        assert time.process_time() - started < 1, time.process_time() - started
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"atom-fast, version {atom_fast.__version__}\nUsage: atom-fast [OPTIONS]")
    assert "--spatial-power" in result.stdout


def test_is_a_module():
    command = [sys.executable, "-m", "atom_fast", "--help"]
    started = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.startswith("Usage: atom-fast [OPTIONS] COMMAND") and time.monotonic() - started < 10
    assert set(main.commands) == {"demo", "distill", "evaluate", "select", "show", "export", "info", "report", "doctor"}


@pytest.fixture
def configured(monkeypatch):
    """Runs nothing; returns the configuration that ``distill`` was called with."""

    class Stop(Exception):
        pass

    def configuration(*arguments):
        caught = {}

        def record(data, config, output, **options):
            caught.update(config=config, output=output, **options)
            raise Stop

        monkeypatch.setattr(atom_fast.distillation, "distill", record, raising=False)
        result = CliRunner().invoke(main, ["distill", "--quiet", *map(str, arguments)])
        assert isinstance(result.exception, Stop), result.output
        return caught

    return configuration


def test_precedence_is_preset_then_file_then_options(tmp_path, configured):
    file = tmp_path / "settings.yaml"
    file.write_text("preset: datadam-code\niterations: 7\nspatial_power: 2\nipc: 3\n")
    assert configured()["config"] == DistillConfig()
    assert configured("--preset", "dm")["config"] == preset("dm")
    expected = preset("datadam-code", iterations=7, spatial_power=2.0, ipc=3)
    assert configured("--config", file)["config"] == expected
    expected = preset("datadam-code", iterations=9, spatial_power=None, mmd_weight=1.0, ipc=3)
    options = ["--iterations", 9, "--spatial-power", "none", "--mmd-weight", 1]
    assert configured("--config", file, *options)["config"] == expected
    expected = preset("channel", iterations=7, spatial_power=2.0, ipc=3)
    assert configured("--config", file, "--preset", "channel")["config"] == expected


def test_a_default_given_explicitly_counts(tmp_path, configured):
    file = tmp_path / "settings.yaml"
    file.write_text("ipc: 3\ncuda_graph: false\n")
    assert configured("--config", file, "--ipc", 1, "--cuda-graph")["config"] == DistillConfig()


def test_every_setting_can_be_given(configured):
    values = {
        name: False if setting["type"] == "boolean" else setting.get("enum", [setting["default"]])[-1]
        for name, setting in SETTINGS.items()
    }
    arguments = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if value is False:
            arguments.append(f"--no-{flag}")
        else:
            arguments += [f"--{flag}", "auto" if value is None else value]
    assert configured(*arguments)["config"] == DistillConfig(**values)
    flags = [f"--{name.replace('_', '-')}" for name, value in values.items() if value is False]
    switched = dict.fromkeys((name for name, value in values.items() if value is False), True)
    assert configured(*flags)["config"] == DistillConfig(**switched)


def test_default_output_names_data_size_and_preset(configured):
    assert str(configured("--ipc", 10, "--preset", "dm")["output"]) == os.path.join("runs", "digits-ipc10-dm")
    output = configured("--ipc", 10, "--partition", 2)["output"]
    assert str(output) == os.path.join("runs", "digits-ipc10-partition2-paper")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["distill", "--iteration", 5], ["No such option", "--iterations"]),
        (["distill", "--preset", "papre"], ["'papre' is not one of", *PRESETS, "Did you mean 'paper'?"]),
        (["distill", "--dataset", "cifar"], ["'cifar' is not one of", "Did you mean 'cifar10"]),
        (["distill", "--ipc", "many"], ["--ipc", "'many' is not a valid integer"]),
        (["distill", "--ipc", 0], ["ipc must be a whole number of at least 1; got 0"]),
        (["distill", "--spatial-power", 17], ["spatial_power", "17"]),
        (["distill", "--config", "missing.yaml"], ["no configuration file missing.yaml"]),
        (["distill", "--set", "missing.safetensors"], ["missing.safetensors does not exist"]),
        (["distill", "--dataset", "folder", "--data-dir", "missing"], ["missing"]),
        (["distill", "--device", "gpu"], ["device must be 'cpu', 'cuda' or a GPU by number", "got 'gpu'"]),
        (["distill", "--device", "meta"], ["device must be 'cpu', 'cuda'", "got 'meta'"]),
        (["distill", "--ipc", 1000], ["1000 different ones per class were asked for", "or start from noise"]),
        (["select", "--ipc", 1000], ["1000 different ones per class were asked for; give an ipc of at most 13"]),
        (["distill", "--set", "a.safetensors", "--image-init", "real"], ["give --set or --image-init real, not both"]),
        (["distil"], ["No such command 'distil'"]),
        (["evaluate", "missing.safetensors"], ["missing.safetensors does not exist"]),
        (["evaluate", "missing.safetensors", "--seed", -1], ["--seed", "-1 is not in the range x>=0"]),
        (["select", "--seed", -1], ["--seed", "-1 is not in the range x>=0"]),
        (["distill", "--partition", 3], ["partition must be a whole number", "8x8: one of 1, 2, 4, 8; got 3"]),
        (["distill", "--partition", 0], ["partition must be a whole number of at least 1; got 0"]),
        (["select", "--partition", 3], ["partition must be a whole number", "8x8: one of 1, 2, 4, 8; got 3"]),
        (["select", "--partition", -1], ["8x8: one of 1, 2, 4, 8; got -1"]),
        (["select", "--partition", "two"], ["--partition", "'two' is not a valid integer"]),
        (["select", "--method", "full", "--partition", 2], ["method 'full'", "its partition must be 1; got 2"]),
        (["show", "missing.safetensors"], ["missing.safetensors does not exist"]),
        (["show", "missing.safetensors", "--output", "a.jpg"], ["--output must end in .png; got a.jpg"]),
        (["info"], ["Missing argument 'FILE'", "--dataset NAME"]),
        (["info", "--dataset", "digits", "--partition", 2], ["--partition says something of a FILE"]),
        (["info", "--dataset", "folder", "--data-dir", "missing"], ["missing"]),
        (["report", "missing"], ["missing does not exist"]),
        (["report", ".", "--output", "report.pdf"], ["the report's file must end in .html; got report.pdf"]),
        (["report", "."], [". holds no run: neither synthetic.safetensors nor config.yaml"]),
        (["report", ".", "--networks", 0], ["networks must be a whole number, at least 1; got 0"]),
        (["report", ".", "--epochs", 0], ["epochs must be a whole number, at least 1; got 0"]),
    ],
)
def test_errors_are_one_clear_line(tmp_path, monkeypatch, arguments, messages):
    monkeypatch.chdir(tmp_path)
    stdout, stderr = run(*arguments, code=2)
    assert stdout == ""
    errors = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and all(message in errors[0] for message in messages), stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["distill", "select", "demo", "evaluate"])
def test_a_device_that_is_not_supported_is_refused_with_those_that_are(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed = {"evaluate": ["a.safetensors"]}.get(command, [])
    _, stderr = run(command, *needed, "--device", "mps", code=2)
    accepted = "'cpu', 'cuda' or a GPU by number such as 'cuda:1', and no other kind is supported"
    assert stderr == f"Error: device must be {accepted}; got 'mps'\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(
    "Invalid values and mismatched data", "a path that is not UTF-8", "refused by the option's name; nothing is written"
)
@pytest.mark.parametrize(
    "arguments, option",
    [
        (["distill", "--output"], "'--output'"),
        (["distill", "--data-dir"], "'--data-dir'"),
        (["evaluate"], "'FILE'"),
        (["select", "--output"], "'--output'"),
    ],
)
def test_a_path_that_is_not_utf8_is_refused_by_name(arguments, option, tmp_path, monkeypatch):
    """The command after it would name a folder that does not exist, and safetensors opens no such file."""
    monkeypatch.chdir(tmp_path)
    _, stderr = run(*arguments, os.fsdecode(b"runs/caf\xe9"), code=2)
    (error,) = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert option in error and r"b'runs/caf\xe9' is not UTF-8" in error
    assert not list(tmp_path.iterdir())


def test_unknown_settings_in_a_file_are_suggested(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("iteration: 5\n")
    _, stderr = run("distill", "--config", file, code=2)
    assert "Error: unknown setting 'iteration'; did you mean 'iterations'?" in stderr


def test_debugging_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("ATOM_FAST_DEBUG", "1")
    result = CliRunner().invoke(main, ["info", str(tmp_path / "missing")])
    assert isinstance(result.exception, FileNotFoundError)


def test_a_long_failure_is_cut_to_its_first_line(monkeypatch, finished):
    def fail(path, **given):
        raise RuntimeError("first line\n  second line\n")

    monkeypatch.setattr(SyntheticSet, "load", fail)
    _, stderr = run("info", finished / "synthetic.safetensors", code=2)
    assert stderr == "Error: first line (ATOM_FAST_DEBUG=1 shows all of it)\n"


def test_distil_writes_what_it_says(finished):
    synthetic = SyntheticSet.load(finished / "synthetic.safetensors")
    assert synthetic.ipc == 2 and synthetic.class_names == tuple("0123456789")
    assert synthetic.metadata["dataset"] == "digits"
    assert read_config(finished / "config.yaml").iterations == 4
    assert {"synthetic.png", "loss.png", "log.jsonl"} <= {path.name for path in finished.iterdir()}


def test_a_finished_run_is_not_overwritten(finished):
    before = (finished / "synthetic.safetensors").read_bytes()
    _, stderr = run("distill", "--output", finished, "--ipc", 2, "--device", "cpu", "--quiet", *TINY, code=2)
    assert "Error: " in stderr and str(finished) in stderr and "--resume" in stderr
    _, stderr = run("distill", "--output", finished, "--ipc", 1, "--resume", "--device", "cpu", *TINY, code=2)
    assert "ipc was 2, is 1" in stderr
    assert (finished / "synthetic.safetensors").read_bytes() == before


def test_a_run_starts_from_a_given_set(finished, tmp_path):
    settings = ["--ipc", 2, "--device", "cpu", "--quiet", *TINY, "--image-lr", 0]
    file = finished / "synthetic.safetensors"
    run("distill", "--output", tmp_path / "run", "--set", file, *settings)
    given, kept = SyntheticSet.load(file), SyntheticSet.load(tmp_path / "run" / "synthetic.safetensors")
    assert torch.equal(given.images, kept.images)
    run("distill", "--output", tmp_path / "again", "--set", finished, *settings)
    assert torch.equal(SyntheticSet.load(tmp_path / "again").images, given.images)


def test_evaluate_prints_one_line_and_writes_json(finished, tmp_path):
    json_path = tmp_path / "result.json"
    options = ["--networks", 2, "--epochs", 20, "--device", "cpu", "--quiet", "--json", json_path]
    stdout, stderr = run("evaluate", finished / "synthetic.safetensors", *options)
    result, random = json.loads(json_path.read_text())
    accuracies = [f"{side['accuracy_mean']:.1f} ± {side['accuracy_std']:.1f}" for side in (result, random)]
    assert stdout == f"digits ipc=2 atom {accuracies[0]} random {accuracies[1]}\n"
    assert stderr == ""  # the same data: no note
    assert result["same_data"] and result["protocol"]["name"] == "digits (epochs=20)"
    assert result["architecture"] | {"width": 8, "depth": 2} == result["architecture"] == random["architecture"]
    assert len(random["accuracies"]) == 2 and random["method"] == "random"


def test_evaluate_without_random(finished):
    file = finished / "synthetic.safetensors"
    stdout, _ = run("evaluate", file, "--networks", 1, "--no-random", "--epochs", 5, "--device", "cpu", "--quiet")
    assert stdout.startswith("digits ipc=2 atom ") and "random" not in stdout


def test_a_set_of_another_resolution_is_evaluated_from_its_export(finished, tmp_path):
    options = ["--networks", 1, "--epochs", 2, "--device", "cpu", "--quiet"]
    run("distill", "--output", tmp_path / "run", "--resolution", 16, "--ipc", 1, "--device", "cpu", "--quiet", *TINY)
    run("export", tmp_path / "run", tmp_path / "images")
    arguments = ["evaluate", tmp_path / "images", "--dataset", "digits", *options]
    _, stderr = run(*arguments, code=2)
    assert "images must be [N, 1, 8, 8] to fit the test set" in stderr
    stdout, _ = run(*arguments, "--resolution", 16)
    assert stdout.startswith("digits ipc=1 ")


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory):
    """The folder of a run with two sheets of four images per class, and what the command printed."""
    output = tmp_path_factory.mktemp("runs") / "sheets"
    stdout, _ = run("distill", "--output", output, "--ipc", 2, "--partition", 2, "--device", "cpu", "--quiet", *TINY)
    return output, stdout


def test_a_partitioned_run_is_described_by_both_counts(partitioned, tmp_path):
    folder, printed = partitioned
    assert printed.startswith(f"80 images on 20 sheets in {folder / 'synthetic.safetensors'}, ")
    assert SyntheticSet.load(folder).partition == 2
    stdout, _ = run("info", folder)
    assert stdout.startswith("digits, 2 sheets of 4 images per class, atom, 4 iterations\n")
    lines = stdout.splitlines()
    for line in ("images: 80, 1, 8, 8", "sheets: 20, 1, 8, 8", "partition: 2", "ipc: 2"):
        assert line in lines
    facts = json.loads(run("info", folder, "--json")[0])
    assert facts["images"] == [80, 1, 8, 8] and facts["sheets"] == [20, 1, 8, 8]
    assert facts["partition"] == facts["ipc"] == 2 and facts["class_sizes"] == [8] * 10


def test_a_data_set_is_described_without_a_file():
    stdout, _ = run("info", "--dataset", "digits")
    data = load_data("digits")
    lines = stdout.splitlines()
    for line in (
        "dataset: digits", "source: scikit-learn", "classes: 10", "training_images: 1400", "test_images: 397",
        "images_per_class: 135 to 143", "shape: 1, 8, 8", f"bytes: {1797 * 64}", f"fingerprint: {data.fingerprint}",
    ):  # fmt: skip
        assert line in lines
    assert lines[-1].startswith("training_images_are: ")
    facts = json.loads(run("info", "--dataset", "digits", "--json")[0])
    assert facts["class_names"] == list("0123456789") and facts["fingerprint"] == data.fingerprint


def test_a_pool_is_trained_once_for_several_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = ["--partition", 2, "--pool-networks", 1, "--pool-epochs", 1, "--calibration-weight", 0.1]
    for seed in (0, 1):
        options = ["--output", tmp_path / str(seed), "--seed", seed, "--device", "cpu", "--quiet"]
        _, stderr = run("distill", *options, *settings, *TINY)
        assert ("training 1 networks on digits" in stderr) == (seed == 0)
    (network,) = (tmp_path / "cache" / "atom_fast" / "pools").glob("digits-*/network-000.safetensors")
    assert network.stat().st_size < 100_000


def test_facts_of_a_set_are_not_replaced_by_its_metadata(finished, tmp_path):
    synthetic = SyntheticSet.load(finished)
    synthetic.metadata |= {"partition": 7, "images": "many", "note": "kept"}
    facts = json.loads(run("info", synthetic.save(tmp_path / "set.safetensors"), "--json")[0])
    assert facts["partition"] == 1 and facts["images"] == [20, 1, 8, 8] and facts["note"] == "kept"
    assert "sheets" not in facts and facts["ipc"] == 2


def test_pictures_of_a_partitioned_run_show_its_sheets(partitioned, tmp_path):
    """The same in the run's folder, beside the result and from the command, a class in a row."""
    image = pytest.importorskip("PIL.Image")
    folder, _ = partitioned
    run("show", folder, "--output", tmp_path / "grid.png")
    assert (folder / "synthetic.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    tiles = SyntheticSet.load(folder).sheet_pixels()[:, 0].mul(255).round().to(torch.uint8)
    with image.open(folder / "images" / "iteration-00000004.png") as opened:
        drawn = torch.tensor(list(opened.convert("L").tobytes()), dtype=torch.uint8).view(*opened.size[::-1])
    left = drawn.shape[1] - 8 - 2 * 66  # the names take the rest
    for number, tile in enumerate(tiles):
        y, x = 8 + number // 2 * 66, left + number % 2 * 66
        assert torch.equal(drawn[y : y + 64 : 8, x : x + 64 : 8], tile), number


def test_a_partitioned_set_is_evaluated_beside_random_sheets(partitioned, tmp_path):
    path, json_path = partitioned[0] / "synthetic.safetensors", tmp_path / "result.json"
    options = ["--networks", 1, "--epochs", 2, "--device", "cpu", "--quiet", "--json", json_path]
    stdout, _ = run("evaluate", path, *options)
    assert stdout.startswith("digits ipc=2 partition=2 (8 images per class) atom ") and " random " in stdout
    result, random = json.loads(json_path.read_text())
    assert result["method"] == "atom" and random["method"] == "random"
    assert result["partition"] == random["partition"] == 2 and result["ipc"] == random["ipc"] == 2
    # The same images, stored one by one, are another set, in a record of its own.
    run("export", path, tmp_path / "set.pt")
    stdout, _ = run("evaluate", tmp_path / "set.pt", "--dataset", "digits", "--no-random", *options)
    assert stdout.startswith("digits ipc=8 public ")
    assert [record["partition"] for record in json.loads(json_path.read_text())] == [2, 2, 1]


def test_select_makes_sheets_and_names_their_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for partition, stored, shown in ((1, "digits-ipc2-random", "20 images"),
                                     (2, "digits-ipc2-partition2-random", "80 images on 20 sheets")):  # fmt: skip
        path = os.path.join("runs", f"{stored}.safetensors")
        assert run("select", "--ipc", 2, "--partition", partition, "--quiet")[0] == f"{shown} in {path}\n"
        assert SyntheticSet.load(path).partition == partition


def test_a_run_starts_from_a_set_of_its_partition_only(partitioned, finished, tmp_path):
    settings = ["--ipc", 2, "--device", "cpu", "--quiet", *TINY, "--image-lr", 0]
    folder, output = partitioned[0], tmp_path / "run"
    run("distill", "--output", output, "--set", folder, "--partition", 2, *settings)
    assert torch.equal(SyntheticSet.load(output).sheets, SyntheticSet.load(folder).sheets)
    for given, own, others in ((folder, 1, 2), (finished, 2, 1)):
        _, stderr = run("distill", "--output", tmp_path / "no", "--set", given, "--partition", own, *settings, code=2)
        assert f"the set to start from has partition {others}, this run partition {own}; use partition" in stderr
    assert not (tmp_path / "no").exists()


def test_a_folder_of_a_run_stands_for_its_set(finished):
    assert run("info", finished) == run("info", finished / "synthetic.safetensors")


@pytest.mark.parametrize("command", ["info", "show"])
def test_what_another_command_reads_is_named(command, finished, tmp_path):
    run("export", finished, tmp_path / "images")
    _, stderr = run(command, tmp_path / "images", code=2)
    assert "is a folder without synthetic.safetensors" in stderr
    _, stderr = run("distill", "--config", finished, code=2)
    assert f"a run's settings are in its file {finished / 'config.yaml'}" in stderr


def test_what_comes_next_can_be_pasted(tmp_path):
    output = tmp_path / "a run's"
    _, stderr = run("distill", "--output", output, "--ipc", 1, "--device", "cpu", "--quiet", *TINY)
    (line,) = [line for line in stderr.splitlines() if line.startswith("next: ")]
    assert shlex.split(line)[1:] == ["atom-fast", "evaluate", str(output / "synthetic.safetensors")]


def test_show_export_info(finished, tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    file = finished / "synthetic.safetensors"
    stdout, _ = run("show", file, "--output", tmp_path / "grid.png")
    assert stdout == f"{tmp_path / 'grid.png'}\n" and (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    run("export", file, tmp_path / "images")
    assert len(datasets.ImageFolder(tmp_path / "images" / "train")) == 20
    run("export", file, tmp_path / "set.pt")
    assert torch.load(tmp_path / "set.pt", weights_only=True)["data"][0][0].shape == (20, 1, 8, 8)
    stdout, _ = run("info", file)
    assert stdout.startswith("digits, 2 per class, atom, 4 iterations\n")
    mean, std = (statistics.item() for statistics in SyntheticSet.load(file).preprocessing.tensors().values())
    assert f"mean: {mean:.6g}\nstd: {std:.6g}\n" in stdout
    assert "normalise your test images by (x - mean) / std for pixels x in [0, 1]: SyntheticSet.load(" in stdout
    assert "preprocessing: standard" in stdout and "  real_batch: 8" in stdout and "config_hash: " in stdout
    facts = json.loads(run("info", file, "--json")[0])
    assert facts["images"] == [20, 1, 8, 8] and facts["config"]["width"] == 8 and facts["class_sizes"] == [2] * 10
    assert facts["mean"] == [pytest.approx(mean, abs=1e-6)] and facts["std"] == [pytest.approx(std, abs=1e-6)]
    _, stderr = run("export", file, tmp_path / "images", code=2)
    assert "exists and is not an empty folder" in stderr


def test_demo_keeps_what_it_finished_and_nothing_that_is_not_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NETWORKS", 1)
    monkeypatch.setitem(PROTOCOLS, "digits", get_protocol("digits", epochs=5))
    overrides = {"iterations": 2, "real_batch": 8, "width": 8, "depth": 1}
    options = {"device": "cpu", "progress": False, "ipcs": (1,), "overrides": overrides}
    output = tmp_path / "demo"
    first = demo.run_demo(output, **options)
    line = capsys.readouterr().out
    assert line.startswith("digits ipc=1 atom ") and " random " in line and line.count("\n") == 1
    assert json.loads((output / "summary.json").read_text()) == first
    assert set(first[0]) == {
        *("dataset", "ipc", "partition", "method", "accuracy_mean", "accuracy_std", "random_mean", "random_std"),
        *("seconds", "device", "config_hash"),
    }
    cell = output / "digits-ipc1"
    assert {"synthetic.png", "loss.png", "synthetic.safetensors"} <= {path.name for path in cell.iterdir()}

    (cell / "synthetic.png").unlink()
    assert demo.run_demo(output, **options) == first
    kept = capsys.readouterr()
    assert kept.out == line and "kept from an earlier demo" in kept.err and not (cell / "synthetic.png").exists()

    record = output / "demo.json"  # a demo of the version before, whose settings had one more, is kept as well
    known = json.loads(record.read_text())
    known["digits-ipc1"]["config"]["memory_budget"] = None
    record.write_text(json.dumps(known))
    assert demo.run_demo(output, **options) == first and "kept from an earlier demo" in capsys.readouterr().err

    (cell / "result.json").unlink()  # as if it had been stopped before the evaluation was over
    resumed = demo.run_demo(output, **options)
    assert resumed[0]["accuracy_mean"] == first[0]["accuracy_mean"] and (cell / "synthetic.png").exists()

    changed = demo.run_demo(output, **{**options, "overrides": {**overrides, "iterations": 3}})
    assert "repeated, because" in capsys.readouterr().err and changed[0]["config_hash"] != first[0]["config_hash"]

    (output / "demo.json").unlink()
    with pytest.raises(FileExistsError, match="digits-ipc1 was not made by the demo"):
        demo.run_demo(output, **options)
    assert (cell / "synthetic.safetensors").exists()


def test_settings_written_beside_the_result_repeat_it(finished, tmp_path):
    output = tmp_path / "again"
    run("distill", "--output", output, "--config", finished / "config.yaml", "--device", "cpu", "--quiet")
    first, second = (SyntheticSet.load(folder / "synthetic.safetensors") for folder in (finished, output))
    assert torch.equal(first.images, second.images)
    assert first.metadata["config_hash"] == second.metadata["config_hash"]
    assert yaml.safe_load((output / "config.yaml").read_text())["width"] == 8


@pytest.mark.parametrize("command", ["select", "demo"])
def test_what_cannot_be_shared_is_not_run_several_times_over(command, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(main, [command, "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and f"{command} runs in one process" in result.output
    assert not list(tmp_path.iterdir())
