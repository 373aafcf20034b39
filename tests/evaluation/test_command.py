"""``atom-fast evaluate`` and ``select``: several architectures, sets from elsewhere, and results that last."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from atom_fast.cli import main
from atom_fast.data.sources import load_data
from atom_fast.evaluation import accuracy as evaluation
from atom_fast.evaluation.sets import select
from atom_fast.synthetic import SyntheticSet
from atom_fast.training import PROTOCOLS
from tests.evaluation.interruptions import count_trained, interrupted_after


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    for name in ("digits", "dc"):
        monkeypatch.setitem(PROTOCOLS, name, dataclasses.replace(PROTOCOLS[name], epochs=2))


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


@pytest.fixture(scope="module")
def file(data, tmp_path_factory):
    chosen = select(data, "random", 1, progress=False)
    chosen.metadata["config"] = {"width": 8, "depth": 2, "spatial_power": 4.0, "channel_power": 4.0}
    return chosen.save(tmp_path_factory.mktemp("sets") / "chosen.safetensors")


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in (*arguments, "--device", "cpu", "--quiet")])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stdout, result.stderr


def test_several_architectures_are_a_line_and_a_record_each(file, tmp_path):
    json_path = tmp_path / "result.json"
    stdout, stderr = run("evaluate", file, "--arch", "alexnet, convnet,alexnet", "--networks", 2, "--json", json_path)
    assert [line.split(" ipc=1 random ")[0] for line in stdout.splitlines()] == ["alexnet: digits", "convnet: digits"]
    assert stderr == ""
    records = json.loads(json_path.read_text())
    assert [(record["network"], record["unfinished"]) for record in records] == [
        *[("alexnet", [])] * 2,
        *[("convnet", [])] * 2,
    ]
    alexnet, *_, random = (record["architecture"] for record in records)
    assert alexnet == {} and random["depth"] == 2 and random["width"] == 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "resnet"], "'resnet' is not one of 'convnet', 'alexnet', 'vgg11', 'resnet18', 'vit'. Did you mean"),
        (["--arch", "convnet,vgg11"], "VGG-11 needs images whose sides are multiples of 32; got 8x8"),
        (["--preprocessing", "zca"], "says itself what it holds; preprocessing is for files of other projects"),
        (["--together", "0"], "together must be a whole number, at least 1"),
        (["--evaluate-every", "0"], "evaluate_every must be a whole number, at least 1"),
        (["--epochs", "0"], "epochs must be a whole number, at least 1; got 0"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, file):
    _, stderr = run("evaluate", file, "--networks", 1, *arguments, code=2)
    errors = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_epochs_replace_those_of_the_protocol_and_the_result_says_so(file, tmp_path):
    run("evaluate", file, "--networks", 1, "--no-random", "--epochs", 3, "--json", tmp_path / "result.json")
    (record,) = json.loads((tmp_path / "result.json").read_text())
    assert record["protocol"]["epochs"] == 3 and record["protocol"]["name"] == "digits (epochs=3)"
    assert list(record["curves"][0]) == ["3"]


@pytest.mark.fault(
    "Stopped runs", "Ctrl-C in an evaluation with `--json`", "exit code 130; finished networks are not trained again"
)
def test_finished_networks_outlive_an_interruption(file, tmp_path, monkeypatch):
    command = ["evaluate", file, "--arch", "alexnet,convnet", "--networks", 2, "--together", 1, "--json"]
    expected, json_path = tmp_path / "expected.json", tmp_path / "result.json"
    lines, _ = run(*command, expected)
    with monkeypatch.context() as patch:
        interrupted_after(5, patch)
        run(*command, json_path, code=130)
    found = json.loads(json_path.read_text())
    assert [record["unfinished"] for record in found] == [[], [], [1]]
    trained = count_trained(monkeypatch)
    assert run(*command, json_path)[0] == lines and len(trained) == 3
    finished, whole = (json.loads(path.read_text()) for path in (json_path, expected))
    assert [record["curves"] for record in finished] == [record["curves"] for record in whole]
    assert finished[:2] == found[:2]
    # What is complete is printed again; other settings are other records in the file.
    assert run(*command, json_path)[0] == lines and len(trained) == 3
    run(*command, json_path, "--seed", 1, "--no-random", "--arch", "convnet")
    assert json.loads(json_path.read_text())[:4] == finished and len(trained) == 5


def test_a_file_of_something_else_is_not_replaced(file, tmp_path):
    path = tmp_path / "result.json"
    path.write_text('{"evaluation": {}}')
    _, stderr = run("evaluate", file, "--json", path, code=2)
    assert f"{path} is not a record of evaluations by this version" in stderr
    assert path.read_text() == '{"evaluation": {}}'


def test_a_set_for_data_that_are_no_choice_is_refused_by_their_name(data, tmp_path):
    chosen = select(data, "random", 1, progress=False)
    for name, message in (("digits32", "says that it is for 'digits32'"), (None, "does not say which data set")):
        chosen.metadata["dataset"] = name
        _, stderr = run("evaluate", chosen.save(tmp_path / "set.safetensors"), code=2)
        assert message in stderr and "give --dataset, one of digits, " in stderr


def test_a_public_file_and_a_folder_are_evaluated(file, tmp_path):
    ours = SyntheticSet.load(file)
    public, folder = ours.export(tmp_path / "public.pt", format="pt"), ours.export(tmp_path / "images")
    _, stderr = run("evaluate", public, code=2)
    assert "does not say which data set it is for; give --dataset, one of digits, " in stderr
    for path, method in ((public, "public"), (folder, "folder")):
        stdout, stderr = run("evaluate", path, "--dataset", "digits", "--networks", 1, "--no-random")
        assert stdout.startswith(f"digits ipc=1 {method} ")
        assert (method == "public") == ("space: standard" in stderr)


@pytest.mark.parametrize("method", ["herding", "full"])
def test_select_writes_a_set_to_evaluate(method, tmp_path, data):
    output = tmp_path / "chosen.safetensors"
    stdout, _ = run("select", "--method", method, "--ipc", 2, "--epochs", 1, "--output", output)
    count = 1400 if method == "full" else 20
    assert stdout == f"{count} images in {output}\n" and len(SyntheticSet.load(output)) == count
    stdout, stderr = run("evaluate", output, "--networks", 1, "--no-random", "--protocol", "dc")
    assert f" {method} " in stdout and stderr == ""
    if method == "full":
        _, stderr = run("evaluate", output, "--networks", 1, code=2)
        assert "Random needs a set with as many images in every class; leave it out (--no-random)" in stderr


def test_the_full_training_set_trains_better_than_a_part(data, monkeypatch, tmp_path):
    monkeypatch.setitem(PROTOCOLS, "digits", dataclasses.replace(PROTOCOLS["digits"], epochs=6))
    means = []
    for method in ("random", "full"):
        chosen = select(data, method, 2, progress=False)
        chosen.metadata["config"] = {"width": 16, "depth": 2, "network_init": "default"}
        means.append(evaluation.evaluate(chosen, data, networks=1, device="cpu", progress=False).mean)
    assert means[1] > 75 and means[1] > means[0] + 10


def test_selected_images_say_their_method_everywhere(file):
    stdout = CliRunner().invoke(main, ["info", str(file)]).stdout
    assert stdout.startswith("digits, 1 per class, random\n")
    assert torch.equal(SyntheticSet.load(file).labels, torch.arange(10))
