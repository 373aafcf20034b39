"""Every file in examples/ runs, at a small size."""

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path

import torch

from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import get_protocol

FOLDER = Path(__file__).resolve().parent.parent / "examples"


def run(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


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


def test_every_example_is_run_here():
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names == set(re.findall(r'run\("(\w+)"', Path(__file__).read_text("utf-8")))
