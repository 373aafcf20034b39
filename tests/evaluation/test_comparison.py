"""``atom-fast evaluate`` and ``select``: several architectures, sets from elsewhere, and results that last."""

import dataclasses
import json

import pytest
import torch
from atom_fast.evaluation.comparison import compare
from click.testing import CliRunner

from atom_fast.cli import main
from atom_fast.data.sources import load_data
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.evaluation import PROTOCOLS, comparison
from atom_fast.evaluation.sets import select
from atom_fast.synthetic import SyntheticSet


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
    assert [record["evaluation"]["network"] for record in records] == ["alexnet", "convnet"]
    alexnet, convnet = (record["evaluation"]["architecture"] for record in records)
    assert alexnet == {} and convnet["depth"] == 2 and convnet["width"] == 8
    assert all(record["state"]["complete"] and record["random_mean"] is not None for record in records)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "resnet"], "'resnet' is not one of 'convnet', 'alexnet', 'vgg11', 'resnet18', 'vit'. Did you mean"),
        (["--arch", "convnet,vgg11"], "VGG-11 needs images whose sides are multiples of 32; got 8x8"),
        (["--preprocessing", "zca"], "holds its own preprocessing; --preprocessing is for a .pt or a folder"),
        (["--together", "0"], "together must be at least 1"),
        (["--epochs", "0"], "epochs must be a whole number, at least 1; got 0"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, file):
    _, stderr = run("evaluate", file, "--networks", 1, *arguments, code=2)
    errors = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_epochs_replace_those_of_the_protocol_and_the_result_says_so(file, tmp_path):
    run("evaluate", file, "--networks", 1, "--no-random", "--epochs", 3, "--json", tmp_path / "result.json")
    record = json.loads((tmp_path / "result.json").read_text())["evaluation"]
    assert record["protocol"]["epochs"] == 3 and record["protocol"]["name"] == "digits (epochs=3)"
    assert list(record["curves"][0]) == ["3"]


def interrupted_after(finished, monkeypatch):
    """Makes an evaluation stop as by Ctrl-C once so many networks of a side have finished."""
    evaluate = comparison.evaluate

    def stopping(*arguments, on_network, **settings):
        def note(result):
            on_network(result)
            if len(result.curves) - len(result.unfinished) == finished:
                raise KeyboardInterrupt

        return evaluate(*arguments, on_network=note, **settings)

    monkeypatch.setattr(comparison, "evaluate", stopping)


@pytest.mark.fault(
    "Stopped runs", "Ctrl-C in an evaluation with `--json`", "exit code 130; finished networks are not trained again"
)
def test_finished_networks_outlive_an_interruption(file, tmp_path, monkeypatch):
    options = ["--networks", 3, "--together", 1]
    expected = tmp_path / "expected.json"
    line, _ = run("evaluate", file, *options, "--json", expected)
    json_path = tmp_path / "result.json"
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        run("evaluate", file, *options, "--json", json_path, code=130)
    partial = json.loads(json_path.read_text())
    assert not partial["state"]["complete"] and partial["evaluation"]["unfinished"] == [2]
    assert partial["random_evaluation"] is None

    trained = []
    train = comparison.evaluate
    monkeypatch.setattr(
        comparison,
        "evaluate",
        lambda *arguments, earlier, **settings: (
            trained.append(len([c for c in earlier if c])) or train(*arguments, earlier=earlier, **settings)
        ),
    )
    assert run("evaluate", file, *options, "--json", json_path)[0] == line
    assert trained == [2, 0]
    finished = json.loads(json_path.read_text())
    for side in ("evaluation", "random_evaluation"):
        assert finished[side]["accuracies"] == json.loads(expected.read_text())[side]["accuracies"]
    # A complete result, and one of other settings, are measured again.
    run("evaluate", file, *options, "--json", json_path)
    assert trained[2:] == [0, 0]
    json_path.write_text(json.dumps(partial))
    run("evaluate", file, "--networks", 3, "--together", 1, "--seed", 1, "--json", json_path)
    assert trained[4:] == [0, 0]


def count_networks(monkeypatch, stop_after=None):
    """The names of the networks as they are trained; stops as by Ctrl-C after so many."""
    trained, evaluate = [], comparison.evaluate

    def counting(*arguments, network, on_network, **settings):
        def note(result):
            on_network(result)
            trained.append(network)
            if len(trained) == stop_after:
                raise KeyboardInterrupt

        if stop_after == 0:
            raise KeyboardInterrupt
        return evaluate(*arguments, network=network, on_network=note, **settings)

    monkeypatch.setattr(comparison, "evaluate", counting)
    return trained


def test_an_interruption_among_several_architectures_costs_no_finished_network(file, tmp_path, monkeypatch):
    command = ["evaluate", file, "--arch", "alexnet,convnet", "--networks", 2, "--together", 1, "--no-random", "--json"]
    json_path = tmp_path / "result.json"
    expected, _ = run(*command, tmp_path / "expected.json")
    with monkeypatch.context() as patch:
        count_networks(patch, stop_after=3)
        run(*command, json_path, code=130)
    found = json_path.read_text()
    assert [len(record["evaluation"]["unfinished"]) for record in json.loads(found)] == [0, 1]
    with monkeypatch.context() as patch:  # before another network has finished
        count_networks(patch, stop_after=0)
        run(*command, json_path, code=130)
    assert json_path.read_text() == found
    with monkeypatch.context() as patch:
        trained = count_networks(patch)
        assert run(*command, json_path)[0] == expected
    assert trained == ["convnet"]
    finished, whole = (json.loads(path.read_text()) for path in (json_path, tmp_path / "expected.json"))
    assert [r["evaluation"]["curves"] for r in finished] == [r["evaluation"]["curves"] for r in whole]
    assert finished[0] == json.loads(found)[0]

    with monkeypatch.context() as patch:  # a complete result is measured again
        trained = count_networks(patch)
        run(*command, json_path)
    assert trained == ["alexnet", "alexnet", "convnet", "convnet"]
    json_path.write_text(found)
    with monkeypatch.context() as patch:  # nothing is kept beside networks of other settings
        count_networks(patch, stop_after=1)
        run(*command, json_path, "--seed", 1, code=130)
    assert [record["evaluation"]["seed"] for record in json.loads(json_path.read_text())] == [1]


def test_a_set_for_data_that_are_no_choice_is_refused_by_their_name(data, tmp_path):
    chosen = select(data, "random", 1, progress=False)
    for name, message in (("digits32", "says that it is for 'digits32'"), (None, "does not say which data set")):
        chosen.metadata["dataset"] = name
        _, stderr = run("evaluate", chosen.save(tmp_path / "set.safetensors"), code=2)
        assert message in stderr and "give --dataset, one of digits, " in stderr


def test_random_selections_of_neighbouring_seeds_have_none_in_common(data, monkeypatch):
    def choose_all(choose, *rest, networks, **settings):
        return [tuple(choose(index)[0].flatten().tolist()) for index in range(networks)]

    monkeypatch.setattr(comparison, "evaluate", choose_all)
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    selections = [comparison.evaluate_random(data, 1, space, networks=5, seed=seed) for seed in (0, 1)]
    assert len({*selections[0], *selections[1]}) == 10


def test_the_record_so_far_tells_both_sides(file, data):
    told = []
    compare(SyntheticSet.load(file), data, networks=2, device="cpu", progress=False, together=1, on_network=told.append)
    assert [record["accuracy_mean"] is not None for record in told] == [True] * 4
    assert [record["random_mean"] is not None for record in told] == [False, False, True, True]
    assert not any(record["state"]["complete"] for record in told)
    json.dumps(told, allow_nan=False)


def test_a_public_file_and_a_folder_are_evaluated(file, tmp_path):
    ours = SyntheticSet.load(file)
    public, folder = ours.export(tmp_path / "public.pt", format="pt"), ours.export(tmp_path / "images")
    _, stderr = run("evaluate", public, code=2)
    assert "does not say which data set it is for; give --dataset, one of digits, " in stderr
    for path, method in ((public, "public"), (folder, "folder")):
        stdout, stderr = run("evaluate", path, "--dataset", "digits", "--networks", 1, "--no-random")
        assert stdout.startswith(f"digits ipc=1 {method} ") and stderr == ""


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
        settings = {"networks": 1, "random": False, "device": "cpu", "progress": False}
        means.append(compare(chosen, data, **settings)["accuracy_mean"])
    assert means[1] > 75 and means[1] > means[0] + 10


def test_selected_images_say_their_method_everywhere(file):
    stdout = CliRunner().invoke(main, ["info", str(file)]).stdout
    assert stdout.startswith("digits, 1 per class, random\n")
    assert torch.equal(SyntheticSet.load(file).labels, torch.arange(10))
