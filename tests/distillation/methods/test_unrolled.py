"""The gradient through unrolled steps: of every step, of the whole training, and the memory that it takes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

import atom_fast as af
from atom_fast.distillation.methods import dd, directional
from atom_fast.distillation.methods.trajectories import draw_batches, trajectory_gradients
from atom_fast.networks.convnet import ConvNet
from benchmarks.live_bytes import count_peak


def make_network(side=8, width=8, depth=2, dtype=torch.float64, seed=0, **options):
    """Return a network whose norms have scales and shifts of their own, and a generator."""
    generator = torch.Generator().manual_seed(seed)
    network = ConvNet(3, 4, side, width=width, depth=depth, **options)
    network.reset_parameters(generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.to(dtype, memory_format=torch.channels_last), generator


def weights_of(network):
    return directional.flatten([p.detach() for p in network.parameters()], list(network.parameters())).clone()


def logits(network, flat, images):
    named = dict(network.named_parameters())
    parts = flat.split([p.numel() for p in named.values()])
    weights = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
    with af.backend("reference"):
        return functional_call(network, weights, (images,))


def plainly(network, start, images, batch, rates, loss_of):
    """The loss of the trained weights and its gradients, by autograd through all steps at once."""
    images, rates = images.detach().requires_grad_(), rates.detach().requires_grad_()
    flat = start.clone().requires_grad_()
    for number, rate in enumerate(rates.unbind()):
        chosen, labels = batch(number, images)
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(logits(network, flat, chosen), labels), flat, create_graph=True
        )
        flat = flat - rate * gradient
    loss = loss_of(flat)
    return loss, *torch.autograd.grad(loss, (images, rates))


def task(dtype=torch.float64, steps=4, size=None, augmentation="color_crop_cutout_flip_scale_rotate", **options):
    """Return a network, start, target, images, batches and rates."""
    network, generator = make_network(dtype=dtype, **options)
    start = weights_of(network)
    target = start + 0.05 * torch.randn(start.shape, generator=generator, dtype=dtype)
    images = torch.randn(8, 3, 8, 8, generator=generator, dtype=dtype).contiguous(memory_format=torch.channels_last)
    batch = draw_batches(torch.arange(4).repeat(2), steps, size, augmentation, generator)
    rates = 0.05 + 0.1 * torch.rand(steps, generator=generator, dtype=dtype)
    return network, start, target, images, batch, rates


def distance(start, target):
    return lambda flat: (flat - target).square().sum() / (start - target).square().sum()


@pytest.mark.parametrize("options", [{}, {"size": 3}, {"norm": "layer"}, {"norm": "none", "pooling": "max2"}])
def test_gradients_are_those_of_autograd_through_all_steps(options):
    network, start, target, images, batch, rates = task(**options)
    expected = plainly(network, start, images, batch, rates, distance(start, target))
    found = trajectory_gradients(network, start, target, images, batch, rates)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm() and theirs.norm() > 0


def test_the_truncated_gradient_is_teslas():
    network, start, target, images, batch, rates = task(size=3)
    rates = rates[:1].expand(4)
    loss, of_images, of_rates = trajectory_gradients(network, start, target, images, batch, rates, truncated=True)
    flat, path, leaf = start, [], images.clone().requires_grad_()
    for number in range(4):  # w_N = w_0 - b G, all w_i constants
        weights = flat.clone().requires_grad_()
        chosen, labels = batch(number, leaf)
        value = F.cross_entropy(logits(network, weights, chosen), labels)
        path.append(torch.autograd.grad(value, weights, create_graph=True)[0])
        flat = flat - rates[0] * path[-1].detach()
    rate = rates[0].clone().requires_grad_()
    expected = distance(start, target)(start - rate * torch.stack(path).sum(0))
    of_leaf, of_rate = torch.autograd.grad(expected, (leaf, rate))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(of_images, of_leaf, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(of_rates.sum(), of_rate, rtol=1e-8, atol=0)
    exact = trajectory_gradients(network, start, target, images, batch, rates)[1]
    assert (exact - of_images).norm() > 1e-3 * exact.norm()


def test_gradients_of_dd_are_those_of_autograd_through_all_steps():
    network, start, _, images, _, rates = task()
    real, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3, 0])
    batch = dd.in_turn(4, 2)
    assert torch.equal(batch(3, images)[0], images[1::2]) and torch.equal(batch(3, images)[1], torch.arange(4))
    loss_of = lambda flat: F.cross_entropy(logits(network, flat, real), labels)  # noqa: E731
    expected = plainly(network, start, images, batch, rates, loss_of)
    found = dd.training_gradients(network, start, images, batch, rates, real, labels)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm() and theirs.norm() > 0


def test_second_derivatives_are_those_of_finite_differences():
    network, generator = make_network()
    images, labels = torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    at, direction = (
        weights_of(network),
        torch.randn(weights_of(network).shape, generator=generator, dtype=torch.float64),
    )
    found = directional.mixed_derivatives(network, images, labels, direction)
    h, sides = 1e-6, []
    for sign in (1, -1):
        flat, leaf = (at + sign * h * direction).requires_grad_(), images.clone().requires_grad_()
        loss = F.cross_entropy(logits(network, flat, leaf), labels)
        sides.append([loss.detach(), *torch.autograd.grad(loss, (leaf, flat))])
    for ours, after, before in zip(found, *sides, strict=True):
        slope = (after - before) / (2 * h)
        assert (ours - slope).norm() <= 1e-5 * slope.norm()


@settings(max_examples=12, deadline=None)
@given(
    side=st.integers(6, 13), width=st.sampled_from([1, 7, 16, 21]), batch=st.integers(1, 5), seed=st.integers(0, 99),
    of_weights=st.booleans(),
)  # fmt: skip
def test_fused_second_derivatives_are_those_of_autograd(side, width, batch, seed, of_weights):
    network, generator = make_network(side, width, dtype=torch.float32, seed=seed)
    images, labels = torch.randn(batch, 3, side, side, generator=generator), torch.arange(batch) % 4
    direction = torch.randn(sum(p.numel() for p in network.parameters()), generator=generator)
    assert directional._is_fused(network, images)
    found = directional.mixed_derivatives(network, images, labels, direction, of_weights=of_weights)
    assert (found.of_weights is None) == (not of_weights)
    network, (images, direction) = network.double(), (images.double(), direction.double())
    expected = directional.mixed_derivatives(network, images, labels, direction, of_weights=of_weights)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_other_norms_are_not_fused(norm):
    network, _ = make_network(dtype=torch.float32, norm=norm)
    assert not directional._is_fused(network, torch.zeros(1, 3, 8, 8))


def test_memory_grows_by_no_more_than_the_weights_of_a_step():
    peaks = {}
    for steps in (3, 12):
        arguments = task(dtype=torch.float32, steps=steps, width=16)
        peaks[steps] = count_peak(lambda arguments=arguments: trajectory_gradients(*arguments))
    network, _, _, images, *_ = arguments
    weights = 4 * sum(p.numel() for p in network.parameters())
    first_map = 4 * len(images) * 16 * 8 * 8
    assert peaks[12] - peaks[3] <= 9 * 1.05 * weights + 4096
    assert peaks[3] > 3 * weights + 2 * first_map, "a step's activations must count for this to mean anything"


def test_batches_show_every_image_before_any_comes_again():
    labels = torch.arange(7)
    batch = draw_batches(labels, 7, 2, "none", torch.Generator().manual_seed(0))
    images = torch.arange(7.0)[:, None, None, None].expand(7, 1, 2, 2)
    seen = [batch(number, images) for number in range(7)]
    shown = torch.cat([chosen[:, 0, 0, 0] for chosen, _ in seen])
    assert sorted(shown[:7].tolist()) == sorted(shown[7:].tolist()) == list(range(7))
    assert torch.equal(shown, torch.cat([own for _, own in seen]).float())
    whole = draw_batches(labels, 2, 99, "none", torch.Generator())
    assert torch.equal(whole(1, images)[0], images)
