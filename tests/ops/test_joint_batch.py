"""BatchNorm over classes that do not run at once: the blocks and their gradients are those of the whole batch."""

import pytest
import torch

import atom_fast as af
from atom_fast import reference
from atom_fast.distillation import ranks
from atom_fast.distillation.joint_passes import JointPasses
from atom_fast.ops.conv_block import conv_block
from atom_fast.ops.joint_batch import JointBatch, JointBatchNorm, is_joint, joint_batch
from atom_fast.ops.norm_block import norm_block

CLASSES, EACH = 3, 2
POWERS = {"spatial_power": 3.0, "channel_power": 2.0}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def operands(operation, dtype):
    """Rows [6, C, 6, 4], the other arguments of a block, and weights of its outputs for a loss."""
    rows = torch.randn(CLASSES * EACH, 3, 6, 4, generator=seeded(0), dtype=torch.float64) * 2 + 1
    affine = tuple(torch.randn(size, generator=seeded(1), dtype=torch.float64) for size in (5, 5))
    filters = torch.randn(5, 3, 3, 3, generator=seeded(2), dtype=torch.float64)
    if operation == "norm_block":
        rows = torch.nn.functional.conv2d(rows, filters, padding=1)
    weights = torch.randn(CLASSES * EACH, 5, 3, 2, generator=seeded(3), dtype=torch.float64)
    map_weights = torch.randn(CLASSES * EACH, 24 + 5, generator=seeded(4), dtype=torch.float64)
    others = (filters, *affine) if operation == "conv_block" else affine
    rows, weights = (tensor.to(dtype, memory_format=torch.channels_last) for tensor in (rows, weights))
    return rows, [tensor.to(dtype) for tensor in others], weights, map_weights.to(dtype)


def run(operation, rows, others, weights, map_weights):
    """Pooled features, maps and the gradient of the rows."""
    rows = rows.detach().requires_grad_()
    pooled, maps = {"norm_block": norm_block, "conv_block": conv_block}[operation](
        rows, *others, **POWERS, norm="batch"
    )
    (gradient,) = torch.autograd.grad((pooled * weights).sum() + (maps * map_weights).sum(), rows)
    return pooled.detach(), maps.detach(), gradient


def run_all(passes, parts, sizes, work):
    """Return ``work`` of each part."""
    found = []
    for number, part in passes.over(list(enumerate(parts))):
        with passes.part(sizes[number]):
            passes.begin("all")
            found.append(work(part))
    return found


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("torch", torch.float32), ("triton", torch.float32)]
)
@pytest.mark.parametrize("operation", ["norm_block", "conv_block"])
def test_chunks_of_classes_are_normalised_as_the_whole_batch(operation, backend, dtype, chunk, place):
    oracle = reference_run(operation)
    rows, others, *weights = operands(operation, dtype)
    rows, others, weights = rows.to(place), [other.to(place) for other in others], [w.to(place) for w in weights]
    parts = [slice(first * EACH, (first + chunk) * EACH) for first in range(0, CLASSES, chunk)]
    sizes = [len(rows[part]) // EACH for part in parts]
    with af.backend(backend):
        found = run_all(
            JointPasses(CLASSES),
            parts,
            sizes,
            lambda part: run(operation, rows[part], others, *(weight[part] for weight in weights)),
        )
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    for expected, pieces in zip(oracle, zip(*found, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces).double().cpu(), expected, **tolerance)
    assert not is_joint()


def reference_run(operation):
    """The same of the whole batch, in PyTorch's own operators and float64."""
    rows, others, weights, map_weights = operands(operation, torch.float64)
    rows.requires_grad_()
    block = {"norm_block": reference.norm_block, "conv_block": reference.conv_block}[operation]
    pooled, maps = block(rows, *others, spatial_power=3.0, channel_power=2.0, norm="batch")
    (gradient,) = torch.autograd.grad((pooled * weights).sum() + (maps * map_weights).sum(), rows)
    return pooled.detach(), maps.detach(), gradient


def test_the_gradient_is_that_of_finite_differences():
    x = torch.randn(4, 2, 3, 2, generator=seeded(5), dtype=torch.float64, requires_grad=True)
    with joint_batch(JointBatch(2, lambda values: values)):
        assert torch.autograd.gradcheck(lambda x: JointBatchNorm.apply(x, 1e-5), x)
        expected = torch.nn.functional.batch_norm(x, None, None, training=True)
        torch.testing.assert_close(JointBatchNorm.apply(x, 1e-5), expected)


def test_repeated_rows_weigh_as_one():
    """A call with one image of a class holds it twice, with half of its gradient each; another call has two images."""
    rows, others, weights, map_weights = operands("norm_block", torch.float64)
    expected = run("norm_block", rows[:3], others, weights[:3], map_weights[:3])
    parts = [[0, 0], [1, 2]]
    halves = [[0.5, 0.5], [1.0, 1.0]]

    def work(number):
        index, half = parts[number], torch.tensor(halves[number], dtype=torch.float64)
        own = weights[index] * half[:, None, None, None], map_weights[index] * half[:, None]
        return run("norm_block", rows[index], others, *own)[2]

    with af.backend("reference"):
        repeated, once = run_all(JointPasses(3), [0, 1], [1, 2], work)
    torch.testing.assert_close(torch.stack((repeated.sum(0), *once)), expected[2])


def test_a_step_that_is_tried_again_gathers_nothing_again(monkeypatch):
    """As after running out of memory with all classes at once: the totals are known, and the chunks go on from them."""
    gathered = []
    monkeypatch.setattr(ranks, "all_gather", lambda values, classes: gathered.append(values) or values)
    rows, others, *weights = operands("norm_block", torch.float64)
    parts = [slice(0, CLASSES * EACH), slice(0, EACH), slice(EACH, CLASSES * EACH)]

    def work(part):
        return run("norm_block", rows[part], others, *(weight[part] for weight in weights))

    passes = JointPasses(CLASSES)
    with af.backend("reference"):
        [whole] = run_all(passes, parts[:1], [CLASSES], work)
        assert len(gathered) == 2  # once forward, once backward
        pieces = run_all(passes, parts[1:], [1, CLASSES - 1], work)
        assert len(gathered) == 2
        passes.forget()
        run_all(passes, parts[1:], [1, CLASSES - 1], work)
        assert len(gathered) == 4
    for expected, some in zip(whole, zip(*pieces, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(some), expected)


def test_chunks_that_are_not_joined_run_once():
    passes, seen = JointPasses(2, joined=False), []
    for chunk in passes.over(["a", "b"]):
        with passes.part(1):
            assert not is_joint()
            seen.append(chunk)
    assert seen == ["a", "b"] and not passes.repeats
