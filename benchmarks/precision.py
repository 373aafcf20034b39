"""Error of a step's image gradient by the precision of the convolutions, against float64, without a GPU.

What a GPU rounds is rounded here: the operands of every convolution, forward and backward, to the mantissa of TF32,
float16 or bfloat16; and with 16 bits the tensors between kernels, forward and backward. Products of such numbers are
exact in float32, in which a GPU also adds them. Everything else is float32, as in the fused kernels. TF32 rounds to the
nearest number, as cuDNN does; Triton's products cut it off.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from atom_fast import reference
from atom_fast._device import NARROW
from atom_fast._seeds import derive_seed
from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import sample_class_indices
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.matching import LayersOf, matching_terms, weighted_terms
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import FLOAT16_FACTOR, Distillation
from atom_fast.functional import class_groups
from benchmarks.harness import environment, save_results


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Where a pass through the network rounds.

    Attributes:
        operand: rounds the operands of convolutions.
        stored: rounds the tensors between kernels.
        dtype: of everything else.
    """

    operand: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute the gradient.

    Attributes:
        precision, real_precision: of the synthetic and the real images' convolutions.
        factor: factor of the gradient while it is computed.
    """

    precision: str
    real_precision: str
    factor: float = 1.0


WAYS = {
    "float32": Way("float32", "float32"),
    "tf32": Way("tf32", "tf32"),
    "tf32, real images in float16": Way("tf32", "float16"),
    "tf32, real images in bfloat16": Way("tf32", "bfloat16"),
    "float16": Way("float16", "float16", FLOAT16_FACTOR),
    "float16, without the factor": Way("float16", "float16"),
    "bfloat16": Way("bfloat16", "bfloat16"),
}


def run(configs: Sequence[DistillConfig], data: ImageData, *, networks: int = 2, out: Path | None = None) -> list[dict]:
    """Compute the gradient in every way, print a line each, and return the records.

    Args:
        configs: settings, of which precisions, scale and augmentation do not matter.
        data: the real images, on a CPU.
        networks: networks to draw; each gives one error.
        out: JSON file of the records.

    Returns:
        A record for each way and configuration: ``errors``, the Euclidean distance of the images' gradient from the one
        in float64, relative to its length, by network; ``largest`` and ``smallest``, the largest magnitude of a
        gradient that a kernel stores, and the share of those that float16 rounds to zero, in the worst network.
    """
    records = []
    for config in configs:
        run = _prepare(config, data)
        names = {"ipc": config.ipc, "real_batch": config.real_batch, "norm": run.config.norm, "width": config.width}
        print(", ".join(f"{name} {value}" for name, value in names.items()), flush=True)
        found = {name: [] for name in WAYS}
        for number in range(networks):
            for name, figures in _compare(run, number):
                found[name].append(figures)
        for name, figures in found.items():
            errors, largest, lost = zip(*figures, strict=True)
            records.append({**names, "way": name, "errors": errors, "largest": max(largest), "lost": max(lost)})
            print(f"  {name:32} {statistics.fmean(errors):.2e}  largest {max(largest):.1e}, lost {max(lost):.1%}")
    if out:
        save_results(out, {"environment": environment("cpu"), "data": data.name, "cells": records})
    return records


def _prepare(config: DistillConfig, data: ImageData) -> Distillation:
    config = dataclasses.replace(config, precision="float32", real_precision=None)
    config = config.resolve(data.image_shape, data.name, torch.device("cpu"))
    preprocessing = fit_preprocessing(data.train_images, config.preprocessing, progress=False)
    return Distillation(config, data, preprocessing, initial_images(config, data, preprocessing))


def _compare(run: Distillation, number: int) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Yield error, largest stored gradient and lost share of every way, for one network and batch."""
    generator = torch.Generator().manual_seed(derive_seed(run.config.seed, number + 1))
    run.network.reset_parameters(generator)
    indices = sample_class_indices(run.data, run.config.real_batch, generator)
    real = run.gather_real(indices.flatten())
    numbers = torch.arange(run.data.num_classes)
    groups = class_groups(numbers.repeat_interleave(run.config.real_batch), run.labels)
    exact = Rounding(_unchanged, _unchanged, torch.float64)
    kept = {}  # of the real images, by precision
    (expected, *_) = _gradient(run, _extract(run, real, exact), exact, groups)
    for name, way in WAYS.items():
        if way.real_precision not in kept:
            kept[way.real_precision] = _extract(run, real, rounding(way.real_precision))
        gradient, stored = _gradient(run, kept[way.real_precision], rounding(way.precision), groups, way.factor)
        error = (gradient.double() - expected).norm() / expected.norm()
        nonzero = torch.cat([part[part != 0].abs() for part in stored])
        lost = (nonzero.half() == 0).double().mean()
        yield name, (error.item(), nonzero.max().item(), lost.item())


def _gradient(
    run: Distillation, real: LayersOf, form: Rounding, groups, factor: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Return the images' gradient, and the gradients that kernels store on the way, times the factor, unrounded."""
    stored: list[Tensor] = []
    images = run.images.detach().requires_grad_()
    synthetic = _extract(run, images, form, stored.append)
    terms = matching_terms(real, synthetic, run.config, groups)
    weights = torch.tensor([weight for _, weight in weighted_terms(run.network, run.config)], dtype=terms.dtype)
    (gradient,) = torch.autograd.grad(terms, images, weights * run.config.loss_scale * factor)
    return gradient / factor, stored


def _extract(run: Distillation, images: Tensor, form: Rounding, watch: Callable = lambda gradient: None) -> LayersOf:
    """Return embedding and maps as the fused network computes them; ``watch`` gets the gradients that are stored."""
    config, maps = run.config, []
    options = {"spatial_power": config.spatial_power, "channel_power": config.channel_power, "norm": config.norm}
    x = images.to(form.dtype)
    for index, block in enumerate(run.network.blocks):
        convolved = _Convolution.apply(x, block.convolution.weight.to(form.dtype), form.operand, watch)
        if index > 0:  # the first block's is not stored
            convolved = _Stored.apply(convolved, form.stored, watch)
        affine = block.norm.weight.to(form.dtype), block.norm.bias.to(form.dtype)
        x, attention = reference.norm_block(convolved, *affine, block.norm.eps, **options)
        x = _Stored.apply(x, form.stored, watch)
        maps.append(attention)
    return x.flatten(1), maps[:-1]


def rounding(precision: str) -> Rounding:
    """Return where a GPU rounds in one of `DistillConfig`'s precisions."""
    if precision in NARROW:
        return Rounding(*[lambda x: x.to(NARROW[precision]).float()] * 2)
    return Rounding(to_tf32 if precision == "tf32" else _unchanged, _unchanged)


def to_tf32(x: Tensor) -> Tensor:
    """Round float32 to the 10 bits of mantissa of TF32, to the nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


def _unchanged(x: Tensor) -> Tensor:
    return x


class _Convolution(torch.autograd.Function):
    """3x3 convolution with padding 1, whose operands are rounded forward and backward."""

    @staticmethod
    def forward(ctx, x, filters, operand, watch):
        ctx.filters, ctx.operand, ctx.watch = operand(filters), operand, watch
        return F.conv2d(operand(x), ctx.filters, padding=1)

    @staticmethod
    def backward(ctx, gradient):
        ctx.watch(gradient)
        return F.conv_transpose2d(ctx.operand(gradient), ctx.filters, padding=1), None, None, None


class _Stored(torch.autograd.Function):
    """A tensor that one kernel writes and another reads, forward and backward."""

    @staticmethod
    def forward(ctx, x, stored, watch):
        ctx.stored, ctx.watch = stored, watch
        return stored(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.watch(gradient)
        return ctx.stored(gradient), None, None
