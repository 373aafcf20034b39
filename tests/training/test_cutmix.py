"""CutMix: its boxes and shares, the images and labels that it mixes, and a training step with it."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from atom_fast.data.augmentation import augment_stages, draw_stages
from atom_fast.networks import ConvNet
from atom_fast.training import PROTOCOLS
from atom_fast.training.cutmix import CutMix, draw_cutmix, mix_images, mixed_cross_entropy
from atom_fast.training.trainer import Trainer

HEIGHT, WIDTH = 12, 9
DRAWS = 2000


def seeded(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


def batch(device, count=6, seed=0):
    images = torch.randn(count, 3, 8, 8, generator=seeded("cpu", seed)).to(device)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count, device=device) % 3


@pytest.fixture(scope="module")
def drawn(device):
    generator = seeded(device)
    return [draw_cutmix((4, 3, HEIGHT, WIDTH), generator) for _ in range(DRAWS)]


def test_boxes_are_rectangles_and_lambda_is_the_share_that_they_leave(drawn):
    for box, other, kept in drawn:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)
        for lines in (rows, columns):
            assert lines.int().diff().abs().sum() <= 2  # no gap
        assert kept.item() == pytest.approx(1 - box.double().mean().item(), abs=1e-7)
        assert kept.dtype == torch.float32 and other.sort().values.tolist() == [0, 1, 2, 3]


def test_boxes_are_distributed_as_in_the_public_code(drawn, device):
    """Every pixel's share equals the exact one of int(side * sqrt(1 - lambda)) // 2 about a uniform centre, clipped."""
    steps = 20000
    cut = ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).sqrt()  # sqrt(1 - lambda)

    def covered(side):
        """[steps, side]: probability that a line of pixels is within the box, over centres."""
        reach = (side * cut).long() // 2
        distance = torch.arange(side)[:, None] - torch.arange(side)  # from each centre
        return ((distance >= -reach[:, None, None]) & (distance < reach[:, None, None])).double().mean(2)

    expected = covered(HEIGHT).T @ covered(WIDTH) / steps
    found = torch.stack([box for box, _, _ in drawn]).double().mean(0).cpu()
    spread = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() < 5 * spread).all()
    for axis, side in enumerate((HEIGHT, WIDTH)):
        assert max(box.sum(axis).max().item() for box, _, _ in drawn) == (side - 1) // 2 * 2


def test_a_box_takes_pixels_from_the_other_image(device):
    images, _ = batch(device)
    box, other, kept = mixture = draw_cutmix(images.shape, seeded(device, 3))
    assert 0 < kept < 1
    mixed = mix_images(images, mixture)
    for index, source in enumerate(other.tolist()):
        assert torch.equal(mixed[index][:, box], images[source][:, box])
        assert torch.equal(mixed[index][:, ~box], images[index][:, ~box])
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert mix_images(images.contiguous(), mixture).is_contiguous()


def test_the_gradient_of_a_pixel_goes_to_where_it_came_from(device):
    images, _ = batch(device, 4)
    images = images.double().requires_grad_()
    mixture = draw_cutmix(images.shape, seeded(device, 3))
    assert torch.autograd.gradcheck(lambda x: mix_images(x, mixture), images)


def test_the_loss_weighs_both_labels(device):
    logits, labels = torch.randn(6, 3, generator=seeded("cpu")).to(device), batch(device)[1]
    other = torch.tensor([1, 2, 0, 4, 5, 3], device=device)
    box = torch.zeros(8, 8, dtype=torch.bool, device=device)
    mixture = CutMix(box, other, torch.tensor(0.75, device=device))
    shares = 0.75 * F.one_hot(labels, 3) + 0.25 * F.one_hot(labels[other], 3)
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, mixture), F.cross_entropy(logits, shares))


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_a_share_of_the_batches_is_mixed(probability, device):
    always, generator = seeded(device), seeded(device)
    mixed = []
    for _ in range(600):
        (box, other, _), (found, same, kept) = (
            draw_cutmix((4, 1, 32, 32), always),
            draw_cutmix((4, 1, 32, 32), generator, probability),
        )
        applied = found.any().item()
        assert torch.equal(found, box) if applied else kept == 1
        assert torch.equal(other, same)  # as many numbers are drawn
        mixed += [applied] if box.any() else []
    share = sum(mixed) / len(mixed)
    assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / len(mixed))


def test_a_batch_that_is_not_mixed_has_the_plain_loss(device):
    images, labels = batch(device)
    mixture = draw_cutmix(images.shape, seeded(device), 0.0)
    assert torch.equal(mix_images(images, mixture), images)
    logits = torch.randn(6, 3, generator=seeded("cpu")).to(device).requires_grad_()
    losses = mixed_cross_entropy(logits, labels, mixture), F.cross_entropy(logits, labels)
    assert losses[0] == losses[1]
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def trainer_of(protocol, device):
    images, labels = batch(device, 10)
    network = ConvNet(3, 3, 8, width=8, depth=2).to(device, memory_format=torch.channels_last)
    trainer = Trainer(network, images, labels, dataclasses.replace(protocol, batch_size=4, epochs=3))
    trainer.restart(5)
    return trainer


def weights_after_training(protocol, device):
    trainer = trainer_of(protocol, device)
    for epoch in range(3):
        trainer.train_epoch(epoch)
    return torch.cat([parameter.detach().flatten() for parameter in trainer.network.parameters()])


def test_training_repeats_to_the_bit(device):
    idc = PROTOCOLS["idc"]
    first, again = (weights_after_training(idc, device) for _ in range(2))
    assert torch.equal(first, again) and first.isfinite().all()
    assert not torch.equal(first, weights_after_training(dataclasses.replace(idc, cutmix=0.0), device))


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_a_step_augments_mixes_and_learns_both_labels(cutmix, device):
    """What the network sees and how its weights change, drawn again from a copy of the generator."""
    protocol = dataclasses.replace(PROTOCOLS["idc"], cutmix=cutmix)
    trainer, seen = trainer_of(protocol, device), []
    generator = trainer.generator.clone_state()
    indices = torch.tensor([7, 2, 4, 0], device=device)
    images, labels = trainer.images[indices], trainer.labels[indices]
    drawn = draw_stages(4, generator, strategy=protocol.augmentation, shared_operation=True)
    expected = augment_stages(images, drawn)
    loss = torch.nn.CrossEntropyLoss()
    if cutmix:
        mixture = draw_cutmix(images.shape, generator)
        expected = mix_images(expected, mixture)
        loss = lambda logits, labels: mixed_cross_entropy(logits, labels, mixture)  # noqa: E731
    last = [*trainer.network.parameters()][-1]
    before = last.detach().clone()
    trainer.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = trainer.step(indices).float().requires_grad_()
    assert torch.equal(seen[0], expected)
    assert torch.equal(generator.get_state(), trainer.generator.get_state())
    (slope,) = torch.autograd.grad(loss(logits, labels), logits)  # the classifier's bias adds up the logits' gradients
    change = protocol.learning_rate * (slope.sum(0) + protocol.weight_decay * before)
    torch.testing.assert_close(last.detach(), before - change, rtol=1e-5, atol=1e-7)


class Operators(TorchDispatchMode):
    """Lists the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back(device):
    trainer = trainer_of(PROTOCOLS["idc"], device)
    indices = torch.arange(4, device=device)
    trainer.step(indices)
    with Operators() as operators:
        trainer.step(indices)
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "item", "is_nonzero", "equal"}
    assert "where" in operators.names and not waiting & operators.names


@pytest.mark.gpu
def test_a_captured_step_draws_anew(device):
    images, labels = batch(device)
    logits = torch.randn(6, 3, generator=seeded("cpu")).to(device)

    def step(generator):
        mixture = draw_cutmix(images.shape, generator, 0.5)
        return mix_images(images, mixture), mixed_cross_entropy(logits, labels, mixture)

    step(seeded(device))
    torch.cuda.synchronize()
    generator, graph = seeded(device, 3), torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager_generator = seeded(device, 3)
        eager = [step(eager_generator) for _ in range(8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        captured = step(generator)
    for expected in eager:
        graph.replay()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected, strict=True))
    assert any(not torch.equal(eager[0][0], other[0]) for other in eager)
