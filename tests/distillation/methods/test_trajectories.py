"""MTT, TESLA and DD as runs: experts, resuming, step sizes, and evaluation by what was learnt."""

import pytest
import torch
import torch.nn.functional as F

from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation import network_cache
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.distillation.methods import experts
from atom_fast.distillation.methods.experts import trained_experts
from atom_fast.distillation.network_cache import set_parameters
from atom_fast.distillation.run import DivergenceError
from atom_fast.evaluation.accuracy import evaluate, protocol_of
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import own_steps
from atom_fast.training.trainer import Trainer, accuracy, empty_network, in_model_space, network_seed
from tests.distillation.methods.runs import assert_resumes, digits, losses, run_of, tiny
from tests.distillation.test_step import make_data

SMALL = {"experts": 2, "last_start": 2, "target_epochs": 1, "student_steps": 3}


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_cache, "cache_folder", lambda: folder)
        yield folder / "experts"


def make_experts(data, **more):
    config = preset(method="mtt", **{**tiny("mtt"), **SMALL, **more})
    config = config.resolve(data.image_shape, data.name, torch.device("cpu"))
    preprocessing = fit_preprocessing(data.train_images, config.preprocessing, progress=False)
    return trained_experts(data, preprocessing, config, progress=False), config, preprocessing


def test_experts_are_trained_as_the_recipe_says():
    data = make_data()
    made, config, preprocessing = make_experts(data)
    images = in_model_space(data.train_images, preprocessing, torch.device("cpu"), torch.channels_last)
    network = empty_network("convnet", config.convnet_settings(), data, torch.device("cpu"))
    trainer = Trainer(
        network.to(memory_format=torch.channels_last), images, data.train_labels, experts.recipe(config, 2)
    )
    trainer.restart(network_seed(experts._SEED, 1))
    path = [network_cache.flat(trainer.network)]
    for epoch in range(2):
        trainer.train_epoch(epoch)
        path.append(network_cache.flat(trainer.network))
    kept = made.cache.read(1)["weights"]
    torch.testing.assert_close(kept, torch.stack(path), rtol=1e-4, atol=1e-5)
    assert (kept[2] - kept[1]).abs().max() > 1e-4
    pairs = {(0, 0), (0, 1), (1, 0), (1, 1)}
    for seed in range(40):
        start, target = made.draw(torch.Generator().manual_seed(seed))
        pairs -= {
            (index, epoch)
            for index in range(2)
            for epoch in range(2)
            if torch.equal(start, made.cache.read(index)["weights"][epoch])
            and torch.equal(target, made.cache.read(index)["weights"][epoch + 1])
        }
    assert not pairs, "every expert and start is drawn, with its target"


def test_experts_are_trained_once_and_longer_ones_serve_shorter_runs(capsys):
    data = make_data(per_class=9)
    make_experts(data, last_start=3)
    assert "training 2 networks on made, 3 epochs each" in capsys.readouterr().err
    for more in ({"last_start": 3}, {"ipc": 2, "seed": 3, "image_lr": 1.0, "student_steps": 9}, {"experts": 1}):
        make_experts(data, **more)
        assert capsys.readouterr().err == ""
    before, *_ = make_experts(data, target_epochs=1)
    kept = before.cache.read(0)["weights"]
    longer, *_ = make_experts(data, target_epochs=4)
    assert "training 2 networks on made, 5 epochs each" in capsys.readouterr().err
    assert torch.equal(longer.cache.read(0)["weights"][:4], kept)


@pytest.mark.parametrize("changed", [{"width": 4}, {"norm": "layer"}, {"augmentation": "color"}])
def test_experts_of_other_settings_or_data_are_others(changed):
    data = make_data(per_class=8)
    folder = make_experts(data)[0].cache.folder
    assert make_experts(data, **changed)[0].cache.folder != folder
    assert make_experts(make_data(per_class=7))[0].cache.folder != folder


def test_a_damaged_expert_is_said_and_trained_again(capsys):
    data = make_data(per_class=6)
    made, *_ = make_experts(data)
    path, content = made.cache.file(1), made.cache.file(1).read_bytes()
    path.write_bytes(content[:-1] + b"\0")
    capsys.readouterr()
    make_experts(data)
    printed = capsys.readouterr().err
    assert "network-001.safetensors cannot be used" in printed and "training 1 networks" in printed
    assert path.read_bytes() == content


FOLLOWED = {
    "experts": 1, "last_start": 1, "target_epochs": 2, "student_steps": 5, "image_lr": 30.0, "step_size": 0.02,
    "step_size_lr": 1e-5, "augmentation": "none",
}  # fmt: skip


@pytest.mark.parametrize("method", ["mtt", "tesla"])
def test_twenty_steps_bring_the_network_nearer_to_the_expert(method, data):
    found = losses(run_of(method, data, **FOLLOWED), 20)
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


def test_twenty_steps_of_dd_lower_the_loss_on_real_images(data):
    found = losses(run_of("dd", data, step_size=0.1, student_steps=5, image_lr=0.1), 20)
    assert sum(found[-5:]) < 0.98 * sum(found[:5])


@pytest.mark.parametrize(
    "method, more", [("mtt", {**SMALL, "ipc": 2, "student_batch": 7}), ("tesla", SMALL), ("dd", {})]
)
def test_a_resumed_run_has_the_same_bits_and_the_set_what_was_learnt(method, more, data, tmp_path):
    more = {"student_steps": 3, "step_size_lr": 1e-3 if method == "dd" else 1e-5, **more}
    made = assert_resumes(method, tmp_path, data, **more)
    learnt = made.metadata["learnt"]
    rates = learnt["step_sizes"] if method == "dd" else [learnt["step_size"]]
    first = preset(method=method, **more).for_data(data.image_shape, data.name).step_size
    assert len(rates) == (3 if method == "dd" else 1)
    assert all(rate > 0 and rate != pytest.approx(first, rel=1e-6) for rate in rates)


@pytest.mark.parametrize("method, rate", [("mtt", 1e6), ("mtt", 1e38), ("dd", 1e38)])
def test_a_step_size_that_is_lost_stops_the_run(method, rate, data, tmp_path):
    more = SMALL if method == "mtt" else {"student_steps": 2}
    config = preset(method=method, iterations=3, log_every=1, step_size_lr=rate, **{**tiny(method), **more})
    with pytest.raises(DivergenceError, match=r"iteration [123].*the last good checkpoint is .*00000000"):
        distill(data, config, tmp_path / "run", progress=False, device="cpu")


@pytest.mark.parametrize(
    "method, more, message",
    [
        ("mtt", {"norm": "batch"}, "method 'mtt' needs a norm of each sample"),
        ("mtt", {"real_batch": 64}, "method 'mtt' has no real_batch; got 64"),
        ("tesla", {"rounds": 2}, "method 'tesla' has no rounds; got 2"),
        ("dd", {"augmentation": "color"}, "method 'dd' has no augmentation"),
        ("dd", {"ipc": 4, "student_steps": 3}, r"student_steps must be at least ipc \(4\).*got 3"),
        ("mtt", {"ipc": 10_000}, "class .8. of digits has 135 training images"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(method, more, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill(data, preset(method=method, **more), tmp_path / "run", progress=False, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_set_is_trained_at_the_rate_that_was_learnt_with_it(data, tmp_path):
    config = preset(method="mtt", iterations=1, **{**tiny("mtt"), **SMALL, "step_size": 0.04})
    made = distill(data, config, tmp_path / "run", progress=False, device="cpu")
    rate = made.metadata["learnt"]["step_size"]
    protocol = protocol_of(made, "digits", epochs=2)
    assert protocol.learning_rate == rate and f"learning_rate={rate}" in protocol.name
    plain = SyntheticSet(made.images, made.labels, made.class_names, made.preprocessing)
    assert protocol_of(plain, "digits").name == "digits"
    chosen = evaluate(made, data, networks=1, protocol=protocol, progress=False, device="cpu")
    assert chosen.protocol == protocol


def test_a_set_of_dd_is_trained_by_its_own_steps(data, tmp_path):
    config = preset(method="dd", iterations=2, **{**tiny("dd"), "ipc": 2, "student_steps": 5, "step_size": 0.05})
    made = distill(data, config, tmp_path / "run", progress=False, device="cpu")
    result = evaluate(made, data, networks=1, progress=False, device="cpu")
    assert result.protocol.name == "its own 5 steps"
    network = empty_network("convnet", result.architecture, data, torch.device("cpu"))
    network.reset_parameters(torch.Generator().manual_seed(network_seed(0, 0)))
    for step, rate in enumerate(made.metadata["learnt"]["step_sizes"]):
        loss = F.cross_entropy(network(made.images[step % 2 :: 2]), torch.arange(10))
        gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        flat = network_cache.flat(network)
        parts = zip(gradients, network.parameters(), strict=True)
        moved = torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in parts])
        set_parameters(network, flat - rate * moved)
    tested = in_model_space(data.test_images, made.preprocessing, torch.device("cpu"), torch.contiguous_format)
    assert result.mean == pytest.approx(accuracy(network, tested, data.test_labels), abs=0.5)
    with pytest.raises(ValueError, match="trained by its own steps has no epochs"):
        protocol_of(made, "digits", epochs=3)


@pytest.mark.parametrize("rates", [(0.1, -0.2), (float("nan"),), ("a",)])
def test_steps_of_no_rate_are_refused(rates):
    with pytest.raises(ValueError, match="step_sizes must be|learning_rate must be"):
        own_steps(rates, 10)
