"""Benchmark cases of every fused operator: sizes, implementations, and the minimum number of bytes to move.

The minimum is one read per input and one write per output. Bytes per second are computed from the minimum, so compared
with a copy's bytes per second they show how close an operator is to the memory bandwidth.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import atom_fast as af
from atom_fast import reference
from atom_fast.data.augmentation import AugmentationParameters, augment, decode_and_augment, draw_augmentation
from atom_fast.ops.attention import attention_maps
from atom_fast.ops.batch_norm import batch_norm
from atom_fast.ops.conv_block import conv_block
from atom_fast.ops.instance_norm import instance_norm
from atom_fast.ops.launching import KERNELS, chosen_kernels
from atom_fast.ops.norm_block import norm_block

from .methods.batched_augmentation import augment as batched_augmentation

CLASSES = 10
WIDTH = 128
DIRECTIONS = ("forward", "backward", "both")
IMPLEMENTATIONS = ("eager", "compile", "fused")
LAYOUTS = ("nchw", "channels_last")


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        operator: a key of ``OPERATORS``.
        shape: shape of the largest input.
        dtype: "float32" or "bfloat16".
        layout: layout of the input, "nchw" or "channels_last"; "rows" for matrices.
        implementation: "eager" (the equations in PyTorch), "compile" (under torch.compile), "fused" (this project) or
            "successor" (this project with the kernels that are to follow; `atom_fast.ops.launching.KERNELS`).
        direction: "forward", "backward" (without the forward pass), or "both".
    """

    operator: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    implementation: str
    direction: str

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return "-".join((self.operator, self.direction, size, self.dtype, self.layout, self.implementation))


@dataclasses.dataclass(frozen=True)
class Work:
    """A prepared case.

    Attributes:
        call: function to time; returns the outputs, or the gradient.
        bytes: minimum number of bytes to move.
    """

    call: Callable[[], object]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator and its implementations.

    Attributes:
        eager, fused: functions from an input to a tuple of outputs.
        parameters: bytes of the other tensors that are read or get a gradient.
    """

    eager: Callable[[Tensor], tuple[Tensor, ...]]
    fused: Callable[[Tensor], tuple[Tensor, ...]]
    parameters: int = 0


def cases(
    device: str, operators: Sequence[str] | None = None, implementations: Sequence[str] = IMPLEMENTATIONS
) -> list[Case]:
    """Return all cases for a device: layers of the ConvNet on CIFAR-10 and Tiny ImageNet, images, and class means.

    On a GPU: batches of 1,280 real and 500 synthetic images, float32 and bfloat16; on a CPU: batches of 40, float32.
    """
    batches, dtypes = ((1280, 500), ("float32", "bfloat16")) if device == "cuda" else ((40,), ("float32",))
    # All layers of Tiny ImageNet except the first have the shapes of CIFAR-10's layers.
    layers = [(batch, WIDTH, side, side) for side in (64, 32, 16, 8) for batch in batches]
    sizes = {
        "attention": layers,
        "norm_block": layers,
        "instance_norm": layers,
        "batch_norm": layers,
        "conv_block": [(batch, 3, 32, 32) for batch in batches],
        "augment": [(batch, 3, side, side) for side in (64, 32) for batch in batches],
        "decode": [(batch // 4, 3, side, side) for side in (64, 32) for batch in batches],
        "matching": [(batch, columns) for columns in (32 * 32 + WIDTH, 16 * 16 + WIDTH, 2048) for batch in batches],
    }
    return [
        Case(operator, shape, dtype, layout, implementation, direction)
        for operator in operators or OPERATORS
        for shape in sizes[operator]
        for dtype in (dtypes if operator not in ("augment", "decode", "matching") else ("float32",))
        for layout in (LAYOUTS if len(shape) == 4 else ("rows",))
        for direction in DIRECTIONS
        for implementation in implementations
        if implementation != "successor" or operator in KERNELS
    ]


def prepare(case: Case, device: str) -> Work:
    """Make the inputs of a case, and return the call to time."""
    x = _random(case.shape, getattr(torch, case.dtype), device)
    if case.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    operator = OPERATORS[case.operator](x)
    function = operator.fused if case.implementation in ("fused", "successor") else operator.eager
    if case.implementation == "compile":
        function = torch.compile(function)
    if case.implementation == "successor":
        function = chosen_kernels("successor")(function)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        outputs = operator.fused(x)
    # In the layout of the outputs, as the next layer's backward pass returns them.
    gradients = [torch.empty_like(output).copy_(_random(output.shape, output.dtype, device)) for output in outputs]
    written = sum(map(_bytes, outputs))
    forward = _bytes(x) + written + operator.parameters
    backward = 2 * _bytes(x) + written + operator.parameters
    if case.direction == "forward":
        return Work(lambda: function(x), forward)
    if case.direction == "both":
        return Work(lambda: torch.autograd.grad(function(leaf), leaf, gradients), forward + backward)
    graph = function(leaf)
    return Work(lambda: torch.autograd.grad(graph, leaf, gradients, retain_graph=True), backward)


def _attention(x: Tensor) -> Operator:
    """Return the computation of both maps of a feature map, as in the drop-in loss."""

    def fused(x):
        return (attention_maps(x, 4.0, 4.0),)

    def eager(x):
        return (torch.cat([reference.spatial_attention(x, 4.0), reference.channel_attention(x, 4.0)], dim=1),)

    return Operator(eager, fused)


def _block(x: Tensor) -> Operator:
    """Return InstanceNorm, ReLU, both maps and pooling of a convolution's output."""
    weight, bias = _affine(x)
    return Operator(
        lambda x: reference.norm_block(x, weight, bias),
        lambda x: tuple(norm_block(x, weight, bias)),
    )


def _conv_block(x: Tensor) -> Operator:
    """Return the convolution of an image, then `_block`."""
    filters = _random((WIDTH, x.shape[1], 3, 3), x.dtype, x.device)
    weight = torch.ones(WIDTH, device=x.device)
    bias = torch.zeros_like(weight)

    return Operator(
        lambda x: reference.conv_block(x, filters, weight, bias),
        lambda x: tuple(conv_block(x, filters, weight, bias)),
        _bytes(filters),
    )


def _instance_norm(x: Tensor) -> Operator:
    """Return InstanceNorm, ReLU and pooling, as in training of a network."""
    weight, bias = _affine(x)
    return Operator(
        lambda x: (reference.instance_norm(x, weight, bias, 1e-5, True, True),),
        lambda x: (instance_norm(x, weight, bias, relu=True, pool=True),),
    )


def _batch_norm(x: Tensor) -> Operator:
    """Return BatchNorm, ReLU and pooling, as in training of a network."""
    weight, bias = _affine(x)
    return Operator(
        lambda x: (reference.batch_norm(x, weight, bias, None, None, None, True, 0.1, 1e-5, True, True),),
        lambda x: (batch_norm(x, weight, bias, relu=True, pool=True),),
    )


def _augment(x: Tensor) -> Operator:
    """Return siamese augmentation of a batch of ten classes with all six operations."""
    parameters, groups = _parameters(x.device), _labels(x)
    return Operator(lambda x: (batched_augmentation(x, *parameters),), lambda x: (augment(x, parameters, groups),))


def _decode(x: Tensor) -> Operator:
    """Return decoding of four images from each sheet, and their siamese augmentation as in `_augment`."""
    images = x.new_empty(4 * x.shape[0], *x.shape[1:])
    augmentation, groups, parameters = _augment(images), _labels(images), _parameters(x.device)

    def eager(x):
        small = x.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return augmentation.eager(F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False))

    return Operator(eager, lambda x: (decode_and_augment(x, parameters, groups, partition=2),))


def _matching(synthetic: Tensor) -> Operator:
    """Return the squared distance of the class means of maps or embeddings, for ten classes."""
    real = _random(synthetic.shape, synthetic.dtype, synthetic.device)
    labels = _labels(synthetic)
    groups = af.class_groups(labels, labels)

    def eager(x):
        per_class = real.shape[0] // CLASSES
        means = (rows.view(CLASSES, per_class, -1).mean(1) for rows in (real, x))
        return ((next(means) - next(means)).square().sum(),)

    return Operator(eager, lambda x: (af.mean_matching_loss(real, x, groups=groups),), _bytes(real))


OPERATORS: dict[str, Callable[[Tensor], Operator]] = {
    "attention": _attention,
    "norm_block": _block,
    "conv_block": _conv_block,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "augment": _augment,
    "decode": _decode,
    "matching": _matching,
}


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Measure the bandwidth of a copy of 1 GiB (on a CPU 256 MiB): bytes read and written per second, best of ten."""
    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * _bytes(source) / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(call: Callable[[], object], device: str) -> float:
    import timeit

    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    return min(timeit.repeat(run, number=1, repeat=10))


def _parameters(device: torch.device) -> AugmentationParameters:
    """Return parameters of ten classes with all six operations."""
    uniforms = draw_augmentation(CLASSES, torch.Generator(device).manual_seed(0)).uniforms
    return AugmentationParameters(torch.arange(CLASSES, device=device) % 6, uniforms)


def _labels(x: Tensor) -> Tensor:
    return torch.arange(CLASSES, device=x.device).repeat_interleave(x.shape[0] // CLASSES)


def _affine(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones(x.shape[1], device=x.device), torch.zeros(x.shape[1], device=x.device)


def _random(shape: Sequence[int], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(tuple(shape), generator=generator, device=device).to(dtype)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
