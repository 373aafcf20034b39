"""The pool of trained networks: what it holds, that it is made once, and that a damaged part of it is made again."""

import dataclasses
import math
import threading

import pytest
import torch

from atom_fast.data.sampling import sample_class_indices
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation import network_cache
from atom_fast.distillation import pool as pools
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.distillation.pool import Pool, easiest, set_parameters, trained_pool
from atom_fast.distillation.step import make_convnet
from atom_fast.training.trainer import Trainer, network_seed
from tests.distillation.test_step import make_data

SETTINGS = {"ipc": 2, "real_batch": 4, "width": 8, "depth": 2, "pool_networks": 2, "pool_epochs": 2, "iterations": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(network_cache, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "pools"


def make_pool(data=None, **settings):
    data = make_data() if data is None else data
    config = preset("paper", **{**SETTINGS, **settings})
    config = config.resolve(data.image_shape, data.name, data.train_images.device)
    preprocessing = fit_preprocessing(data.train_images, config.preprocessing, progress=False)
    return trained_pool(data, preprocessing, config, progress=False)


def forbid_training(monkeypatch):
    def refuse(jobs, *rest, **options):
        assert not jobs, f"networks {jobs} were trained"
        return iter(())

    monkeypatch.setattr(network_cache, "train", refuse)


def test_networks_are_trained_as_the_recipe_says_and_scores_are_their_errors():
    data = make_data()
    pool = make_pool(data)
    config = preset("paper", **SETTINGS).for_data(data.image_shape, data.name)
    images = fit_preprocessing(data.train_images, "standard", progress=False).to_model(data.train_images)
    images = images.contiguous(memory_format=torch.channels_last)
    scores = []
    for index in range(2):
        network = make_convnet(config, data).to(memory_format=torch.channels_last).requires_grad_()
        trainer = Trainer(network, images, data.train_labels, pools.recipe(config))
        trainer.restart(network_seed(pools._SEED, index))
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])
        torch.testing.assert_close(pool.initial[index], flat, rtol=0, atol=0)
        for epoch in range(2):
            trainer.train_epoch(epoch)
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])
        torch.testing.assert_close(pool.trained[index], flat, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            predicted = network.eval()(images).softmax(1)
        scores.append((predicted - torch.eye(3)[data.train_labels]).norm(dim=1))
    torch.testing.assert_close(pool.scores, torch.stack(scores).mean(0), rtol=1e-3, atol=1e-4)
    assert 0 < pool.scores.min() < pool.scores.max() < math.sqrt(2)
    assert (pool.trained - pool.initial).abs().max() > 1e-3, "training must have moved the weights"


def test_a_pool_is_made_once_and_grows_by_the_networks_that_are_missing(monkeypatch, capsys):
    small = make_pool()
    assert "training 2 networks on made, 2 epochs each" in capsys.readouterr().err
    larger = make_pool(pool_networks=3)
    assert "training 1 networks on made" in capsys.readouterr().err
    torch.testing.assert_close(larger.trained[:2], small.trained, rtol=0, atol=0)
    forbid_training(monkeypatch)
    for changed in ({}, {"ipc": 1, "seed": 5, "real_batch": 2, "channel_power": None, "calibration_weight": 1.0}):
        again = make_pool(**changed)
        assert again.digest == small.digest
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("changed", [{"width": 4}, {"norm": "layer"}, {"pool_epochs": 1}, {"augmentation": "color"}])
def test_a_pool_of_another_architecture_or_recipe_is_another(changed, cache):
    make_pool(pool_networks=1)
    make_pool(pool_networks=1, **changed)
    assert len(list(cache.iterdir())) == 2


def test_a_pool_of_other_data_or_another_model_space_is_another(cache):
    data = make_data()
    make_pool(data, pool_networks=1)
    other = dataclasses.replace(data, train_images=data.train_images.flip(0), train_labels=data.train_labels.flip(0))
    other.__dict__.pop("fingerprint", None)
    make_pool(other, pool_networks=1)
    make_pool(data, pool_networks=1, preprocessing="zca")
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"\0", "cut"])
def test_a_damaged_network_is_said_and_trained_again_to_the_same_bits(damage, cache, capsys):
    before = make_pool()
    (path,) = cache.glob("*/network-001.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content[:-1] + damage)
    capsys.readouterr()
    after = make_pool()
    printed = capsys.readouterr().err
    assert "network-001.safetensors cannot be used" in printed
    assert "training 1 networks" in printed
    assert after.digest == before.digest
    assert path.read_bytes() == content


def test_a_network_of_another_pool_is_not_used(cache, capsys):
    one, other = make_pool(), make_pool(pool_epochs=1)
    first, second = sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    path = second / "network-000.safetensors"
    path.write_bytes((first / path.name).read_bytes())
    capsys.readouterr()
    assert make_pool(pool_epochs=1).digest == other.digest != one.digest
    assert f"cannot be used (it is network-000 of {first.name})" in capsys.readouterr().err


def test_two_that_need_a_pool_at_once_share_one(monkeypatch):
    trained, train, both = [], network_cache.train, threading.Barrier(2)

    def counted(jobs, *rest, **options):
        trained.extend(jobs)
        yield from train(jobs, *rest, **options)

    monkeypatch.setattr(network_cache, "train", counted)
    found = []

    def need():
        both.wait()
        found.append(make_pool(pool_networks=3).digest)

    threads = [threading.Thread(target=need) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(trained) == [0, 1, 2]
    assert len(found) == 2 and len(set(found)) == 1


def test_a_kill_in_training_costs_only_the_network_in_training(cache, monkeypatch, capsys):
    train = network_cache.train

    def killed(jobs, *rest, **options):
        for number, result in enumerate(train(jobs, *rest, **options)):
            if number == 1:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(network_cache, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        make_pool()
    assert len(list(cache.glob("*/*.safetensors"))) == 1
    monkeypatch.setattr(network_cache, "train", train)
    capsys.readouterr()
    make_pool()
    assert "training 1 networks" in capsys.readouterr().err


def test_a_network_that_diverges_is_an_error(monkeypatch, cache):
    diverging = dataclasses.replace(pools.recipe(preset("paper", pool_epochs=1)), learning_rate=1e30)
    monkeypatch.setattr(pools, "recipe", lambda config: diverging)
    with pytest.raises(RuntimeError, match="network [01] of the pool diverged"):
        make_pool()
    assert not list(cache.glob("*/*.safetensors"))


def test_a_drawn_network_lies_between_its_initial_and_trained_weights(device):
    data = make_data(device=device)
    config = preset("paper", **SETTINGS).for_data(data.image_shape, data.name)
    network = make_convnet(config, data).to(device, memory_format=torch.channels_last)
    size = sum(parameter.numel() for parameter in network.parameters())
    places = torch.arange(size, device=device, dtype=torch.float32)
    pool = Pool(torch.stack((places, places + 100)), torch.stack((places + 1, places + 101)), places, "").to(device)
    generator = torch.Generator(device).manual_seed(0)
    seen = []
    for _ in range(400):
        pool.draw(network, generator)
        offsets = torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()]) - places
        assert (offsets - offsets.mean()).abs().max() < 1e-3, "one network and one age for all parameters"
        seen.append(offsets.mean().item())
    second = [value - 100 for value in seen if value > 50]
    first = [value for value in seen if value <= 50]
    for ages in (first, second):
        assert 120 < len(ages) < 280
        assert min(ages) >= -1e-3 and max(ages) <= 1.001
        assert abs(sum(ages) / len(ages) - 0.5) < 0.1


def test_parameters_keep_their_layout():
    data = make_data()
    config = preset("paper", **SETTINGS).for_data(data.image_shape, data.name)
    network = make_convnet(config, data).to(memory_format=torch.channels_last)
    strides = [parameter.stride() for parameter in network.parameters()]
    weights = torch.randn(sum(parameter.numel() for parameter in network.parameters()))
    set_parameters(network, weights)
    assert strides == [parameter.stride() for parameter in network.parameters()]
    assert torch.equal(torch.cat([parameter.reshape(-1) for parameter in network.parameters()]), weights)


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, 5), (0.25, 3), (0.01, 1), (1.0, 10)])
def test_only_the_easiest_images_of_each_class_are_sampled(fraction, kept):
    data = make_data(classes=3, per_class=10)
    scores = torch.rand(30, generator=torch.Generator().manual_seed(3))
    easy = easiest(data, scores, fraction)
    assert easy.class_sizes == (kept,) * 3
    drawn = sample_class_indices(easy, kept, torch.Generator().manual_seed(0))
    for label, indices in enumerate(drawn):
        own = (data.train_labels == label).nonzero().flatten()
        expected = own[scores[own].argsort()[:kept]]
        assert sorted(indices.tolist()) == sorted(expected.tolist())
    if fraction == 1:
        assert torch.equal(easy.class_index, data.class_index)


@pytest.mark.parametrize("made", ["anew", "from the cache"])
def test_a_run_with_a_pool_is_resumed_to_the_same_bits(made, cache, tmp_path):
    data = make_data()
    more = {"partition": 2, "calibration_weight": 0.1, "easy_fraction": 0.8, "synthetic_batch": 5}
    config = preset("paper", **{**SETTINGS, **more}, checkpoint_every=2)
    whole = distill(data, config, tmp_path / "whole", progress=False, device="cpu")
    distill(data, dataclasses.replace(config, iterations=2), tmp_path / "parts", progress=False, device="cpu")
    if made == "anew":
        for path in cache.glob("*/*.safetensors"):
            path.unlink()
    parts = distill(data, config, tmp_path / "parts", resume=True, progress=False, device="cpu")
    assert torch.equal(whole.sheets, parts.sheets)
    assert whole.metadata["pool_digest"] == parts.metadata["pool_digest"]
    assert whole.partition == 2 and len(whole.images) == 4 * len(whole.sheets)


def test_a_run_is_not_resumed_with_another_pool(tmp_path, monkeypatch):
    data, config = make_data(), preset("paper", **SETTINGS)
    distill(data, dataclasses.replace(config, iterations=2), tmp_path / "run", progress=False, device="cpu")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("run/checkpoints/*")}
    monkeypatch.setattr(pools, "_SEED", 1)
    monkeypatch.setattr(network_cache, "cache_folder", lambda: tmp_path / "other")
    with pytest.raises(ValueError, match="began with other trained networks"):
        distill(data, config, tmp_path / "run", resume=True, progress=False, device="cpu")
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("run/checkpoints/*")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration_weight": 0.1}, "calibration_weight 0.1 needs trained networks: give pool_networks"),
        ({"easy_fraction": 0.5}, "easy_fraction 0.5 needs trained networks"),
        ({"easy_fraction": 0.0, "pool_networks": 1}, "easy_fraction must be a number above 0"),
        ({"pool_networks": -1}, "pool_networks must be a whole number of at least 0"),
        ({"partition": 0}, "partition must be a whole number of at least 1"),
        ({"synthetic_batch": 0}, "synthetic_batch must be a whole number of at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        preset("paper", **settings)
