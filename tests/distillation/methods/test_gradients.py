"""Gradient matching: the gradients of all classes at once, the published loss, and runs of DC, DSA, DCC and DSAC."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_fast.data.augmentation import augment_stages, draw_stages
from atom_fast.distillation import ranks
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.distillation.methods.gradients import class_gradients, gradient_distance
from atom_fast.networks.convnet import ConvNet
from benchmarks.methods import dc
from tests.distillation.methods.runs import assert_resumes, digits, losses, run_of

DEPTH, SIDE = 2, 8


@pytest.fixture(scope="module")
def data():
    return digits()


def network_and_images(classes, batch, ipc, dtype, norm="instance", seed=0):
    generator = torch.Generator().manual_seed(seed)
    network = ConvNet(3, classes, SIDE, width=8, depth=DEPTH, norm=norm, initialization="normal")
    network.reset_parameters(generator)
    shapes = (classes * batch, 3, SIDE, SIDE), (classes * ipc, 3, SIDE, SIDE)
    real, synthetic = (torch.randn(shape, generator=generator) for shape in shapes)
    layout = torch.channels_last
    images = (part.to(dtype).contiguous(memory_format=layout) for part in (real, synthetic))
    return network.to(dtype, memory_format=layout), *images


def labels_of(classes, each):
    return torch.arange(classes).repeat_interleave(each)


def image_gradient(network, real, synthetic, classes):
    """Return the loss and its gradient, computed as a step does."""
    synthetic = synthetic.requires_grad_()
    sizes = len(real) // classes, len(synthetic) // classes
    of_real = class_gradients(network, real, labels_of(classes, sizes[0]), classes)
    of_synthetic = class_gradients(network, synthetic, labels_of(classes, sizes[1]), classes, create_graph=True)
    loss = gradient_distance(of_real, of_synthetic)
    return loss, *torch.autograd.grad(loss, synthetic)


def published_gradient(network, real, synthetic, classes):
    """Return the same by the published loop over the classes, under autograd alone."""
    synthetic = synthetic.detach().requires_grad_()
    pairs = zip(real.chunk(classes), synthetic.chunk(classes), strict=True)
    plain = _Plain(network)
    loss = sum(dc.class_matching_loss(plain, a, b, label) for label, (a, b) in enumerate(pairs))
    return loss, *torch.autograd.grad(loss, synthetic)


class _Plain(torch.nn.Module):
    """The network, module by module: nothing of this project's operations."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        embedding, _ = self.network.features(images)
        return self.network.classifier(embedding)


@pytest.mark.parametrize("norm", ["instance", "none", "group"])
@pytest.mark.parametrize("batch, ipc", [(5, 3), (1, 1)])
def test_equals_the_published_loop(batch, ipc, norm):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        network, real, synthetic = network_and_images(3, batch, ipc, dtype, norm)
        loss, gradient = image_gradient(network, real, synthetic, 3)
        double, *parts = network_and_images(3, batch, ipc, torch.float64, norm)
        expected = published_gradient(double, *parts, 3)
        torch.testing.assert_close(loss.double(), expected[0], rtol=tolerance, atol=0)
        assert (gradient.double() - expected[1]).norm() <= tolerance * expected[1].norm()


@settings(max_examples=10, deadline=None)
@given(classes=st.integers(1, 4), batch=st.integers(1, 4), seed=st.integers(0, 99))
def test_gradients_of_all_classes_at_once_are_those_of_each(classes, batch, seed):
    network, images, _ = network_and_images(classes, batch, 1, torch.float64, seed=seed)
    found = class_gradients(network, images, labels_of(classes, batch), classes)
    weights = [*(block.convolution.weight for block in network.blocks), network.classifier.weight]
    for label, own in enumerate(images.chunk(classes)):
        loss = F.cross_entropy(_Plain(network)(own), torch.full((batch,), label))
        for expected, got in zip(torch.autograd.grad(loss, weights), found, strict=True):
            torch.testing.assert_close(got[label], expected.flatten(1), rtol=1e-9, atol=1e-12)


def test_the_distance_ignores_lengths():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert gradient_distance([a], [5 * a]).abs() < 1e-3
    torch.testing.assert_close(gradient_distance([a], [b]), gradient_distance([a], [7 * b]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["dc", "dsa", "dcc", "dsac"])
def test_twenty_steps_lower_the_loss(method, data):
    found = losses(run_of(method, data, image_lr=1.0, rounds=1), 20)
    assert sum(found[-5:]) < 0.95 * sum(found[:5])


@pytest.mark.parametrize("method, more", [("dsa", {}), ("dc", {"ipc": 2, "rounds": 2, "network_epochs": 2})])
def test_a_resumed_run_has_the_same_bits(method, more, data, tmp_path):
    assert_resumes(method, tmp_path, data, **more)


def test_the_network_learns_from_the_images_between_rounds(data):
    run = run_of("dsa", data, rounds=3, network_epochs=4)
    learnt = []
    step = run.trainer.train_epoch
    run.trainer.train_epoch = lambda epoch: (learnt.append(epoch), step(epoch))
    run.step(1)
    assert learnt == [0, 1, 2, 3] * 2  # not after the last round


def test_contrastive_gradients_are_those_of_all_classes_together(data):
    run = run_of("dsac", data, rounds=1, augmentation="none")
    assert not run._is_contrastive(0) and run._is_contrastive(10)
    run.iteration = 251
    assert run._is_contrastive(0)
    before = run.images.clone()
    run.trainer.restart(5)
    run.generator.manual_seed(3)
    run.trainer.restart = lambda seed: None
    run._step()
    run.generator.manual_seed(3)
    drawn = draw_stages(10, run.generator, strategy="none")
    run.generator.manual_seed(3)
    real = augment_stages(run._real_images(), drawn)
    images = before.requires_grad_()
    weights = [*(block.convolution.weight for block in run.network.blocks), run.network.classifier.weight]
    plain, distances = _Plain(run.network), []
    of_real = torch.autograd.grad(F.cross_entropy(plain(real), run._real_labels), weights)
    of_synthetic = torch.autograd.grad(F.cross_entropy(plain(images), run.labels), weights, create_graph=True)
    for a, b in zip(of_real, of_synthetic, strict=True):
        distances.append((1 - F.cosine_similarity(a.flatten(1), b.flatten(1), eps=1e-6)).sum())
    (expected,) = torch.autograd.grad(torch.stack(distances).sum(), images)
    assert (run.momentum - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize(
    "more, message",
    [
        ({"norm": "batch"}, "method 'dsa' needs a norm of each sample"),
        ({"partition": 2}, "method 'dsa' has no partition; got 2: leave it at 1"),
        ({"spatial_power": 2.0}, "method 'dsa' has no spatial_power; got 2.0"),
        ({"class_chunk": 2}, "method 'dsa' has no class_chunk"),
        ({"student_steps": 2}, "method 'dsa' has no student_steps"),
    ],
)
def test_settings_of_other_methods_are_refused_before_work_starts(more, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill(data, preset(method="dsa", **more), tmp_path / "run", progress=False, device="cpu")
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(ValueError, match="method 'dsa' runs in one process; got 2: start it without torchrun"):
        distill(data, preset(method="dsa"), tmp_path / "run", progress=False, device="cpu")


def test_a_preset_of_another_method_is_refused():
    with pytest.raises(ValueError, match="the preset 'best' is for the method 'matching'; method 'dsa' has its own"):
        preset("best", method="dsa")
    with pytest.raises(ValueError, match="method must be one of matching, dc, .*; got 'dsb'; did you mean 'dsa'"):
        preset(method="dsb")
