"""Every file in examples/ runs, at a small size."""

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path

import torch

import atom_fast as af
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import get_protocol

FOLDER = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments):
    load(name).main([str(argument) for argument in arguments])


def test_the_loss_is_replaced_and_the_images_stay_the_same(capsys):
    run("drop_in_loss", "--steps", 2, "--ipc", 2)
    (difference,) = re.findall(r"largest difference .*: (\S+)", capsys.readouterr().out)
    assert float(difference) < 1e-5


def test_digits_are_distilled_and_evaluated(tmp_path, monkeypatch, capsys):
    short = dataclasses.replace(get_protocol("digits"), epochs=1)
    evaluation = importlib.import_module("atom_fast.evaluation.accuracy")
    monkeypatch.setattr(evaluation, "get_protocol", lambda name: short)
    run("digits", "--iterations", 2, "--networks", 1, "--output", tmp_path / "run")
    (accuracy,) = re.findall(r"^digits ipc=10 atom: (\d+\.\d) ", capsys.readouterr().out, re.M)
    assert 0 <= float(accuracy) <= 100
    synthetic = SyntheticSet.load(tmp_path / "run" / "synthetic.safetensors")
    assert synthetic.images.shape == (100, 1, 8, 8)


def test_algorithm_1_in_plain_pytorch_runs(capsys):
    state = torch.get_rng_state()
    run("plain_atom", "--iterations", 1, "--epochs", 1)
    torch.set_rng_state(state)
    assert re.search(r"^distilled images: accuracy \d+\.\d ", capsys.readouterr().out, re.M)


def test_classes_are_learnt_step_by_step_from_a_memory(tmp_path, capsys):
    few = ("--steps", 2, "--ipc", 1, "--iterations", 1, "--networks", 1, "--epochs", 1, "--output", tmp_path / "run")
    own = af.select(af.load_data("digits"), "random", progress=False).save(tmp_path / "own.safetensors")
    run("continual", *few, "--set", f"own={own}")
    printed = capsys.readouterr().out
    pattern = r"^order 0, (\d+) classes, (\w+): (\d+\.\d) ± 0.0 %$"
    found = {(int(classes), name): float(accuracy) for classes, name, accuracy in re.findall(pattern, printed, re.M)}
    names = ("Random", "Herding", "DM", "ATOM", "own")
    assert list(found) == [(classes, name) for classes in (5, 10) for name in names]
    assert (tmp_path / "run" / "continual.png").stat().st_size > 10_000
    run("continual", *few, "--set", f"own={own}")  # goes on where it was, and finds the same
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("order")] == [
        line for line in printed.splitlines() if line.startswith("order")
    ]


def test_a_memory_has_the_classes_in_the_order_in_which_they_came(tmp_path):
    example = load("continual")
    data = af.load_data("digits")
    chosen = af.select(data, "random", 2, progress=False)
    part = example.restrict(data, [7, 2])
    assert part.class_names == ("7", "2") and len(part.test_images) < len(data.test_images)
    assert torch.equal(part.train_images[part.train_labels == 1], data.train_images[data.train_labels == 2])
    memory = example.of_classes(chosen, [7, 2])
    joined = example.join([example.of_classes(chosen, [7]), example.of_classes(chosen, [2])])
    for one in (memory, joined):
        assert one.class_names == ("7", "2") and one.labels.tolist() == [0, 0, 1, 1]
        assert torch.equal(one.images[2:], chosen.images[chosen.labels == 2])


def test_every_example_is_run_here():
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names == set(re.findall(r'run\("(\w+)"', Path(__file__).read_text("utf-8")))
