"""This project's step of MTT in Table 3 has the gradient of the published one."""

import torch

from atom_fast.distillation.methods.trajectories import draw_batches, trajectory_gradients
from atom_fast.networks.convnet import ConvNet
from benchmarks.methods import build_step, mtt, published
from tests.benchmarks.workloads import SMALL, small


def test_both_steps_have_the_same_gradient():
    torch.manual_seed(0)
    plain = published.fresh_network(SMALL)
    network = ConvNet(3, SMALL.classes, SMALL.resolution, width=SMALL.width).to(memory_format=torch.channels_last)
    start, target = mtt.synthesised_expert(plain, 0)[:2]
    images, labels = torch.randn(6, 3, SMALL.resolution, SMALL.resolution), torch.arange(3).repeat(2)
    batch = draw_batches(labels, 4, None, "none", torch.Generator())
    found = trajectory_gradients(network, start, target, images, batch, torch.full((4,), 0.05))
    leaf, rate = images.double().requires_grad_(), torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    student = mtt.unroll(plain.double(), start.double(), leaf, labels, rate, [None] * 4)
    loss = mtt.trajectory_distance(student, start.double(), target.double())
    expected = loss, *torch.autograd.grad(loss, (leaf, rate))
    for ours, theirs in zip((*found[:2], found[2].sum()), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() and theirs.norm() > 0


def test_the_fused_step_learns_from_the_same_images_towards_the_same_expert():
    step = build_step(small("mtt", "fused", ipc=2, class_images=16))
    losses = [step()() for _ in range(3)]
    torch.manual_seed(0)
    eager = build_step(small("mtt", "eager", ipc=2, class_images=16))
    expected = [eager().item() for _ in range(3)]
    assert all(0.5 < ours / theirs < 2 for ours, theirs in zip(losses, expected, strict=True))
