"""Every fused kernel against the bandwidth of a copy, on a GPU: ``python -m benchmarks.kernels --out FILE.json``.

A kernel's bytes are the fewest it must move: each input read once, each output written once. Their share of what a
device-to-device copy reaches in the same run is the figure that matters; a kernel near 100 % cannot get faster without
moving less. Times are medians with quantiles of ``triton.testing.do_bench``, which empties the cache between calls.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import atom_fast as af
from atom_fast import reference
from atom_fast.data.augmentation import augment, draw_augmentation
from atom_fast.functional import _attention_maps
from atom_fast.ops.block import attention_block

from .harness import environment, save_results

# Feature maps of a step at 50 synthetic and 128 real images in each of ten classes, CIFAR-10 and Tiny ImageNet.
SHAPES = {
    "cifar layer 1, real": (1280, 128, 32, 32),
    "cifar layer 1, synthetic": (500, 128, 32, 32),
    "cifar layer 2, real": (1280, 128, 16, 16),
    "cifar layer 2, synthetic": (500, 128, 16, 16),
    "tiny layer 1, synthetic": (500, 128, 64, 64),
}
QUANTILES = (0.5, 0.2, 0.8)


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time: what it is, the fewest bytes it must move, and the call."""

    operator: str
    direction: str
    provider: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    bytes: int
    call: Callable[[], object]


def attention_cases(shape, dtype, channels_last) -> Iterator[Case]:
    """Both maps of one feature map: the operator of the drop-in loss, and the equations in eager PyTorch."""
    features = _features(shape, dtype, channels_last).requires_grad_()
    size, maps = _bytes(features), 4 * shape[0] * (shape[1] + shape[2] * shape[3])

    def fused(x):
        return _attention_maps(x, 4.0, 4.0, True, "triton")

    def eager(x):
        return torch.cat([reference.spatial_attention(x, 4.0), reference.channel_attention(x, 4.0)], dim=1)

    for provider, function in (("eager", eager), ("fused", fused)):
        yield from _both_directions("attention", provider, function, features, size + maps, 2 * size + 2 * maps)


def matching_cases(shape) -> Iterator[Case]:
    """Class means and their squared distance for ten classes, with the gradient that comes with them."""
    rows, columns = shape
    real, synthetic = (torch.randn(n, columns, device="cuda") for n in (rows, rows // 2))
    labels = [torch.arange(10, device="cuda").repeat_interleave(n // 10) for n in (rows, rows // 2)]
    groups = af.class_groups(*labels)
    size = _bytes(real) + 2 * _bytes(synthetic)
    yield Case(
        "matching", "forward", "fused", shape, "float32", "rows", size,
        lambda: af.mean_matching_loss(real, synthetic, groups=groups),
    )  # fmt: skip


def augmentation_cases(batch, channels_last) -> Iterator[Case]:
    """Siamese augmentation of a batch of ten classes."""
    images = _features((batch, 3, 32, 32), torch.float32, channels_last).requires_grad_()
    parameters = draw_augmentation(10, torch.Generator("cuda").manual_seed(0), device=images.device)
    groups = torch.arange(10, device="cuda").repeat_interleave(batch // 10)
    size = 2 * _bytes(images)
    yield from _both_directions("augment", "fused", lambda x: augment(x, parameters, groups), images, size, size)


def block_cases(shape, dtype, channels_last) -> Iterator[Case]:
    """InstanceNorm, ReLU, both maps and pooling of a convolution's output: fused, and in eager PyTorch."""
    x = _features(shape, dtype, channels_last).requires_grad_()
    weight, bias = torch.ones(shape[1], device="cuda"), torch.zeros(shape[1], device="cuda")
    size = _bytes(x)
    small = size // 4 + 4 * shape[0] * (3 * shape[1] + shape[2] * shape[3])

    def fused(x):
        return tuple(attention_block(x, weight, bias))

    def eager(x):
        f = torch.nn.functional.group_norm(x, shape[1], weight.to(dtype), bias.to(dtype)).relu()
        pooled = torch.nn.functional.avg_pool2d(f, 2)
        return pooled, reference.spatial_attention(f, 4.0), reference.channel_attention(f, 4.0)

    for provider, function in (("eager", eager), ("fused", fused)):
        yield from _both_directions("block", provider, function, x, size + small, 2 * size + small)


def copy_case() -> Case:
    """The copy whose bandwidth the others are compared with: bytes read and written."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return Case(
        "copy", "forward", "copy", tuple(source.shape), "float32", "flat", 2 * _bytes(source),
        lambda: target.copy_(source),
    )  # fmt: skip


def measure(case: Case) -> dict:
    """Median and quantiles of one case, in milliseconds, and its bytes per second."""
    import triton.testing

    median, low, high = triton.testing.do_bench(case.call, warmup=10, rep=40, quantiles=list(QUANTILES))
    record = {key: value for key, value in dataclasses.asdict(case).items() if key != "call"}
    return record | {
        "milliseconds": median,
        "quantile_20": low,
        "quantile_80": high,
        "bytes_per_second": case.bytes / (median / 1e3),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure every case, print a line each, and keep them all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--operator", choices=["attention", "matching", "augment", "block"], help="only this one")
    options = parser.parse_args(arguments)
    record = {"environment": environment("cuda"), "cases": []}
    copy = measure(copy_case())
    record["copy"] = copy
    print(f"copy: {copy['bytes_per_second'] / 1e12:.2f} TB/s")
    for case in _all_cases(options.operator):
        result = measure(case)
        result["share_of_copy"] = result["bytes_per_second"] / copy["bytes_per_second"]
        record["cases"].append(result)
        save_results(options.out, record)
        print(
            f"{case.operator:10} {case.direction:8} {case.provider:6} {case.shape!s:22} {case.dtype:9} "
            f"{case.layout:13} {result['milliseconds'] * 1e3:9.1f} us {100 * result['share_of_copy']:5.1f} % of copy"
        )


def _all_cases(operator: str | None) -> Iterator[Case]:
    for shape in SHAPES.values():
        for dtype in (torch.float32, torch.bfloat16):
            for channels_last in (True, False):
                if operator in (None, "attention"):
                    yield from attention_cases(shape, dtype, channels_last)
                if operator in (None, "block"):
                    yield from block_cases(shape, dtype, channels_last)
    for batch in (1280, 500):
        for channels_last in (True, False):
            if operator in (None, "augment"):
                yield from augmentation_cases(batch, channels_last)
    if operator in (None, "matching"):
        for shape in ((1280, 1152), (1280, 2048)):
            yield from matching_cases(shape)


def _both_directions(operator, provider, function, x: Tensor, forward_bytes, backward_bytes) -> Iterator[Case]:
    about = (tuple(x.shape), str(x.dtype).removeprefix("torch."), _layout(x))
    with torch.no_grad():
        detached = x.detach()
    yield Case(operator, "forward", provider, *about, forward_bytes, lambda: function(detached))
    outputs = function(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.randn_like(output) for output in outputs]
    yield Case(
        operator, "backward", provider, *about, backward_bytes,
        lambda: torch.autograd.grad(outputs, x, gradients, retain_graph=True),
    )  # fmt: skip


def _features(shape, dtype, channels_last) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    values = torch.randn(shape, generator=generator, device="cuda", dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _layout(x: Tensor) -> str:
    return "channels_last" if x.is_contiguous(memory_format=torch.channels_last) else "nchw"


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


if __name__ == "__main__":
    main()
