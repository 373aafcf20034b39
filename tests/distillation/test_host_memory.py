"""Data twice as large as a device's memory distil to the same bits as data that fit.

Without a GPU the CPU is said to have little memory. Its images are then read, and its pool is trained, by the code that
reads host memory.
"""

import contextlib
import math

import pytest
import torch

from atom_fast.data import placement
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation import network_cache
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.evaluation.coresets import watch_training
from atom_fast.training import trainer
from tests.distillation.test_step import make_data

SMALL = {
    "ipc": 2, "real_batch": 4, "width": 8, "depth": 2, "iterations": 4, "log_every": 2, "checkpoint_every": 2,
    "image_every": 4, "deterministic": True,
}  # fmt: skip


@pytest.fixture
def data():
    return make_data()


@contextlib.contextmanager
def little_memory(data, monkeypatch, share=0.5):
    """Let every device have that share of the memory that the training images need."""
    with monkeypatch.context() as patched:
        patched.setattr(placement, "device_memory", lambda device: share * data.train_images.nbytes)
        yield


def check_same_bits(data, device, monkeypatch, tmp_path, capsys, name, **settings):
    """Distil in one go with the images on the device, and interrupted with them in host memory."""
    options = {"progress": False, "device": device}
    straight = distill(data, preset(name, **SMALL, **settings), tmp_path / "device", **options)
    assert "host memory" not in capsys.readouterr().err
    with little_memory(data, monkeypatch):
        for iterations in (1, 3, 4):
            config = preset(name, **{**SMALL, **settings, "iterations": iterations})
            resumed = distill(data, config, tmp_path / "host", resume=True, **options)
            assert "host memory: each step reads its images from there" in capsys.readouterr().err
    assert torch.equal(resumed.sheets, straight.sheets)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("paper", {}),
        ("dm", {"partition": 2}),
        ("paper", {"preprocessing": "zca"}),
        ("dm", {"preprocessing": "zca", "class_chunk": 2}),
        ("paper", {"class_chunk": 1, "image_average": True}),
    ],
)
def test_images_in_host_memory_distil_to_the_same_bits(name, settings, data, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("atom_fast.data.whitening._keeps_bytes", lambda device: True)  # as on a GPU
    check_same_bits(data, "cpu", monkeypatch, tmp_path, capsys, name, **settings)


@pytest.mark.parametrize("preprocessing", ["standard", "zca"])
def test_a_pool_trained_from_host_memory_has_the_same_bits(preprocessing, data, monkeypatch, tmp_path, capsys):
    kept = []
    whole = trainer.in_model_space
    monkeypatch.setattr(trainer, "in_model_space", lambda *arguments: kept.append(1) or whole(*arguments))
    pool = {"pool_networks": 2, "pool_epochs": 1, "easy_fraction": 0.5, "calibration_weight": 0.1}
    # Two caches, so that the pool is also trained from host memory.
    names = {math.inf: "cache of device", data.train_images.nbytes / 2: "cache of host"}
    monkeypatch.setattr(
        network_cache, "cache_folder", lambda: tmp_path / names[placement.device_memory(torch.device("cpu"))]
    )
    check_same_bits(data, "cpu", monkeypatch, tmp_path, capsys, "paper", preprocessing=preprocessing, **pool)
    assert kept == [1], "the pool of images in host memory has no float32 copy of them all"


@pytest.mark.parametrize("share", [0.5, 3], ids=["nothing fits", "bytes fit, float32 does not"])
def test_a_network_that_is_watched_gives_the_same_features_without_a_float32_copy(share, data, monkeypatch):
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    features, events = watch_training(data, space, epochs=2, progress=False)
    monkeypatch.setattr(trainer, "in_model_space", None)
    with little_memory(data, monkeypatch, share):
        mapped = watch_training(data, space, epochs=2, progress=False)
    assert torch.equal(mapped[0], features) and torch.equal(mapped[1], events)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("paper", {}),
        ("dm", {"preprocessing": "zca"}),
        ("paper", {"preprocessing": "zca", "class_chunk": 2, "cuda_graph": False}),
        ("paper", {"pool_networks": 1, "pool_epochs": 1}),
    ],
)
def test_a_gpu_distils_the_same_bits_from_pinned_memory(name, settings, device, monkeypatch, tmp_path, capsys):
    data = make_data(per_class=40)
    if "pool_networks" in settings:  # train it once: its bits are not promised on a GPU
        monkeypatch.setattr(network_cache, "cache_folder", lambda: tmp_path / "cache")
    check_same_bits(data, device, monkeypatch, tmp_path, capsys, name, **settings)


@pytest.mark.gpu
def test_a_pool_is_trained_from_pinned_memory(device, monkeypatch, tmp_path):
    data = make_data(per_class=40)
    monkeypatch.setattr(network_cache, "cache_folder", lambda: tmp_path / "cache")
    with little_memory(data, monkeypatch):
        config = preset("paper", **SMALL, pool_networks=2, pool_epochs=2)
        assert distill(data, config, tmp_path / "run", progress=False, device=device).images.isfinite().all()
