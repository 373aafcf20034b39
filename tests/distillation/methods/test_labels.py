"""LD: its gradient against the second derivative, Adam's steps, the network that lives on, and the set."""

import pytest
import torch
import torch.nn.functional as F

import atom_fast as af
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.distillation.methods import labels as ld
from atom_fast.distillation.run import DivergenceError
from atom_fast.distillation.start import initial_images
from atom_fast.networks.convnet import ConvNet
from atom_fast.synthetic import SyntheticSet
from tests.distillation.test_step import make_data

SMALL = {"ipc": 4, "real_batch": 5, "width": 8, "depth": 2, "label_lr": 0.1}


def make_learner(**settings):
    data = make_data()
    config = preset(method="ld", **{**SMALL, **settings}).resolve(data.image_shape, data.name, torch.device("cpu"))
    preprocessing = fit_preprocessing(data.train_images, config.preprocessing, progress=False)
    start = initial_images(config, data, preprocessing)
    return ld.Learner(config, data, preprocessing, start, progress=False)


def loss_after_a_step(network, images, soft, real, labels, rate):
    """Return the loss of real images after a step of SGD on synthetic ones, differentiable in their labels."""
    parameters = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    with af.backend("reference"):
        logits = torch.func.functional_call(network, parameters, (images,))
        loss = F.cross_entropy(logits, soft)
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
        after = {
            name: value if gradient is None else value - rate * gradient
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
        }
        return F.cross_entropy(torch.func.functional_call(network, after, (real,)), labels)


@pytest.mark.parametrize("norm", ["instance", "none"])
def test_the_labels_gradient_is_the_second_derivative(norm, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(ld, "_PIXELS", 4 * 64)  # several pieces
    network = ConvNet(3, 4, 8, width=6, depth=2, norm=norm).double()
    images, real = torch.randn(5, 3, 8, 8).double(), torch.randn(10, 3, 8, 8).double()
    soft, labels = torch.randn(5, 4).double().requires_grad_(), torch.randint(4, (10,))
    expected_loss = loss_after_a_step(network, images, soft, real, labels, rate=0.3)
    (expected,) = torch.autograd.grad(expected_loss, soft)

    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    own = torch.autograd.grad(
        F.cross_entropy(network(images), soft.detach()), list(network.parameters()), allow_unused=True
    )
    with torch.no_grad():
        for parameter, gradient in zip(network.parameters(), own, strict=True):
            parameter -= 0 if gradient is None else 0.3 * gradient
    loss, direction = ld.mean_gradient(network, real, labels)
    change = ld.directional_derivative(network, before, direction, images)
    torch.testing.assert_close(loss, expected_loss.detach())
    torch.testing.assert_close(0.3 / 5 * change, expected, rtol=1e-8, atol=1e-12)


def test_a_step_moves_only_the_labels_as_that_gradient_says():
    run = make_learner()
    network = {name: value.detach().clone() for name, value in run.network.named_parameters()}
    run.generator.manual_seed(0)
    start, images = run.soft.clone(), run.images.clone()
    run.step(1)
    assert torch.equal(run.images, images)
    assert all(not torch.equal(run.network.get_parameter(name), value) for name, value in network.items()
               if "convolution.bias" not in name)  # fmt: skip
    moved = (run.soft - start).abs()  # Adam's first step has the size of its rate
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=0.02, atol=0)


def test_labels_are_learnt_by_adam():
    run, generator = make_learner(), torch.Generator().manual_seed(0)
    twin = run.soft.clone().requires_grad_()
    adam = torch.optim.Adam([twin], lr=0.1)
    for number in range(1, 6):
        twin.grad = torch.randn(twin.shape, generator=generator) * number
        run._update_labels(twin.grad.clone(), number)
        adam.step()
    torch.testing.assert_close(run.soft, twin.detach())


def test_steps_lower_the_loss():
    run = make_learner()
    start = run.soft.clone()
    for iteration in range(1, 21):
        run.step(iteration)

    def mean_loss(soft):
        losses, generator = [], torch.Generator().manual_seed(1)
        for _ in range(5):
            run.network.reset_parameters(generator)
            real = run._gather_real(torch.arange(30))
            losses.append(loss_after_a_step(run.network, run.images, soft, real, run.data.train_labels, rate=0.1))
        return torch.stack(losses).mean().item()

    assert mean_loss(run.soft) < mean_loss(start) - 0.01
    true = run.soft_labels.gather(1, run.labels[:, None]).mean()
    assert true > 1 / 3 + 0.05  # towards the classes of the images, of which the run was never told


def test_the_network_lives_on_until_its_loss_stops_falling(monkeypatch):
    monkeypatch.setattr(ld, "WINDOW", 2)
    run = make_learner()
    run.step(1)
    run.losses[:] = torch.tensor([0.0, 1e9])
    run.step(2)
    network = run.network.classifier.weight.detach().clone()
    assert 0 < run.losses[1] < 1e9 and run.losses[0] == 0
    run.step(3)
    assert 0 < (run.network.classifier.weight - network).abs().max() < 0.1
    run.losses[1] = 0.0
    run.step(4)
    assert (run.network.classifier.weight - network).abs().max() > 0.1
    assert run.losses[1] == torch.inf


def test_a_resumed_run_has_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(ld, "WINDOW", 3)
    data, settings = make_data(), {"method": "ld", **SMALL}
    whole = distill(data, preset(iterations=8, **settings), tmp_path / "whole", progress=False)
    distill(data, preset(iterations=5, **settings), tmp_path / "parts", progress=False)
    resumed = distill(data, preset(iterations=8, **settings), tmp_path / "parts", resume=True, progress=False)
    assert torch.equal(resumed.soft_labels, whole.soft_labels)
    read = SyntheticSet.load(tmp_path / "parts")
    assert torch.equal(read.targets, whole.soft_labels) and torch.equal(read.images, whole.images)


def test_the_set_has_probabilities():
    run = make_learner()
    run.soft[0] = torch.tensor([2.0, -1.0, 2.0])
    run.soft[1] = torch.tensor([-1.0, -2.0, 0.0])
    labels = run.soft_labels
    torch.testing.assert_close(labels[0], torch.tensor([0.5, 0.0, 0.5]))
    torch.testing.assert_close(labels[1], torch.full((3,), 1 / 3))
    torch.testing.assert_close(labels.sum(1), torch.ones(len(labels)))


@pytest.mark.parametrize(("images", "classes", "expected"), [(10, 10, 10), (100, 10, 50), (1000, 100, 100)])
def test_a_network_s_step_takes_as_many_images_as_published(images, classes, expected):
    assert ld.batch_size(images, classes) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_lr": 1.0}, "method 'ld' has no image_lr; got 1.0"),
        ({"image_init": "noise"}, "method 'ld' has no image_init; got 'noise'"),
        ({"norm": "batch"}, "needs a norm of each sample"),
    ],
)
def test_settings_that_it_has_no_use_for_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill(make_data(), preset(method="ld", **SMALL, **settings), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_labels_that_are_lost_stop_the_run_with_the_last_checkpoint_named(tmp_path, monkeypatch):
    def lost(*arguments):
        return torch.full((12, 3), torch.nan)

    monkeypatch.setattr(ld, "directional_derivative", lost)
    config = preset(method="ld", **SMALL, iterations=5)
    with pytest.raises(DivergenceError, match=r"entropy.*lower label_lr.*checkpoint is .*iteration-0+\.safetensors"):
        distill(make_data(), config, tmp_path, progress=False)
