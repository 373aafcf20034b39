"""Differentiable siamese augmentation: one operator for all classes against one class after the other.

    pytest benchmarks/test_augmentation.py --benchmark-only

On the GPU, or on the CPU where there is none; ``backward`` is the forward pass and the gradient of the images.
"""

import pytest
import torch

from atom_fast.data.augmentation import OPERATIONS, augment, draw_augmentation
from tests.ops.test_augmentation import reference_operation

REAL, SYNTHETIC = 1300, 500  # images of CIFAR's size in one step, of all classes together


def augment_by_class(images, parameters, groups):
    """The field's loop: the operation of each class read back to the host, then some ten small operators."""
    codes, uniforms = parameters.operation.tolist(), parameters.uniforms.tolist()
    classes = images.split(len(images) // len(codes))
    return torch.cat([
        reference_operation(part, OPERATIONS[code], drawn)
        for part, code, drawn in zip(classes, codes, uniforms, strict=True)
    ])  # fmt: skip


def setting(count, classes):
    """Images, a gradient, every operation at least once, and class-major groups."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(count, 3, 32, 32, device=device, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    parameters = draw_augmentation(classes, generator)
    parameters.operation.copy_(torch.arange(classes) % len(OPERATIONS))
    groups = torch.arange(classes, device=device).repeat_interleave(count // classes)
    return images, torch.randn_like(images), parameters, groups


def finished(function, images):
    def run():
        result = function()
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return result

    return run


@pytest.mark.parametrize("function", [augment_by_class, augment], ids=["by_class", "atom_fast"])
@pytest.mark.parametrize("classes", [10, 100])
def test_forward(benchmark, classes, function):
    images, _, parameters, groups = setting(REAL, classes)
    benchmark.group = f"augmentation forward, {REAL} images of {classes} classes"
    result = benchmark(finished(lambda: function(images, parameters, groups), images))
    assert result.shape == images.shape


@pytest.mark.parametrize("function", [augment_by_class, augment], ids=["by_class", "atom_fast"])
@pytest.mark.parametrize("classes", [10, 100])
def test_backward(benchmark, classes, function):
    images, gradient, parameters, groups = setting(SYNTHETIC, classes)
    images.requires_grad_()
    benchmark.group = f"augmentation backward, {SYNTHETIC} images of {classes} classes"
    run = finished(lambda: torch.autograd.grad(function(images, parameters, groups), images, gradient), images)
    assert benchmark(run)[0].shape == images.shape
