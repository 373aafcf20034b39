"""Workloads of the package, for recording their kernel launches without a GPU: distillation, evaluation, the loss."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import atom_fast as af
from atom_fast import _device
from atom_fast._device import SHARED_MEMORY, Chip, convolution_precision
from atom_fast.data.augmentation import augment, decode_and_augment, draw_augmentation
from atom_fast.networks.convnet import ConvNet, default_depth
from atom_fast.ops.attention import attention_maps
from atom_fast.ops.launching import chosen_kernels
from tests.launches import Launch, recorded

MODULES = (
    "attention", "attention_sums", "augmentation", "batch_norm", "norm", "norm_block", "conv_block",
    "folded_conv_block", "instance_norm", "matching", "partition",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Channels and side in pixels: digits, MNIST, CIFAR (in colour, grey, with alpha), Tiny ImageNet, subsets of ImageNet.
IMAGES = ((1, 8), (1, 28), (3, 32), (1, 32), (4, 32), (3, 64), (3, 96), (3, 128), (3, 224))
PRESETS = ((1, 8), (3, 32), (3, 64))  # the sizes of the data sets that have presets


@dataclasses.dataclass(frozen=True)
class Workload:
    """One use of the package, to run with recorded kernels."""

    name: str
    run: Callable[[], None]
    preset: bool  # True for a size and a dtype that presets use
    precision: str | None = None  # of a distillation's convolutions

    def of_presets(self, capability: int) -> bool:
        """Return True if presets run it on this chip: in TF32 if the chip has TF32."""
        return self.preset and self.precision in (None, "tf32" if Chip(capability, 0).has_tf32 else "float32")


@contextlib.contextmanager
def pretended(capability: int, shared: int | None = None) -> Iterator[Chip]:
    """Make operators choose the launches of another chip."""
    before = _device.INTERPRETED
    _device.INTERPRETED = Chip(capability, SHARED_MEMORY[capability] if shared is None else shared)
    try:
        yield _device.INTERPRETED
    finally:
        _device.INTERPRETED = before


def launches(workload: Workload, capability: int) -> list[Launch]:
    """Return a workload's launches on a chip; the kernels do not run."""
    modules = [importlib.import_module(f"atom_fast.kernels.{name}") for name in MODULES]
    with pretended(capability), recorded(*modules) as found, af.backend("triton"):
        workload.run()
    return found


def workloads(images=IMAGES) -> list[Workload]:
    """Return distillation, evaluation and the loss at these sizes, in every precision, norm and layout."""
    found = []
    for channels, side in images:
        size = f"{channels}x{side}x{side}"
        known = (channels, side) in PRESETS
        for precision in DTYPES:
            usual = known and precision in ("tf32", "float32")
            for norm in ("instance", "batch"):
                for kernels in ("measured", "successor"):
                    name = f"{size} {precision} {norm}" + " successor" * (kernels == "successor")
                    run = chosen_kernels(kernels)(_distillation(channels, side, precision, norm))
                    found.append(Workload(f"distill {name}", run, usual, precision))
                    if precision != "tf32":  # no kernel of an evaluation multiplies matrices
                        run = chosen_kernels(kernels)(_evaluation(channels, side, precision, norm))
                        found.append(Workload(f"evaluate {name}", run, usual))
        for layout in (torch.contiguous_format, torch.channels_last):
            name = f"{size} {'channels_last' if layout == torch.channels_last else 'NCHW'}"
            found.append(Workload(f"augment {name}", _augmentation(channels, side, layout), known))
            found.append(Workload(f"decode {name}", decoding(channels, side, layout), False))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layout in (torch.contiguous_format, torch.channels_last):
                name = f"{side}x{side} {str(dtype)[6:]} {'channels_last' if layout == torch.channels_last else 'NCHW'}"
                usual = known and dtype == torch.float32
                run = _loss(side, dtype, layout)
                found += [
                    Workload(f"loss {name}", chosen_kernels("measured")(run), usual),
                    Workload(f"loss {name} successor", chosen_kernels("successor")(run), usual),
                ]
    return found


def _network(channels: int, side: int, norm: str) -> ConvNet:
    network = ConvNet(channels, 10, (side, side), width=128, depth=default_depth(side, side), norm=norm)
    return network.to(memory_format=torch.channels_last)


def _images(channels: int, side: int) -> torch.Tensor:
    return torch.zeros(2, channels, side, side).contiguous(memory_format=torch.channels_last)


def _distillation(channels: int, side: int, precision: str, norm: str) -> Callable[[], None]:
    def run():
        network = _network(channels, side, norm).requires_grad_(False)
        cast = torch.autocast("cpu", DTYPES[precision], enabled=precision in ("bfloat16", "float16"))
        with convolution_precision("tf32" if precision == "tf32" else "float32", torch.device("cpu")), cast:
            embedding, maps = network.attention(_images(channels, side).requires_grad_())
            torch.autograd.backward([embedding, *maps], [torch.zeros_like(x) for x in (embedding, *maps)])

    return run


def _evaluation(channels: int, side: int, precision: str, norm: str) -> Callable[[], None]:
    def run():
        network = _network(channels, side, norm)
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "float32"):
            network(_images(channels, side)).sum().backward()
            with torch.no_grad():
                network.eval()(_images(channels, side))

    return run


def _augmentation(channels: int, side: int, layout: torch.memory_format) -> Callable[[], None]:
    def run():
        images = torch.zeros(4, channels, side, side).contiguous(memory_format=layout).requires_grad_()
        parameters = draw_augmentation(2, torch.Generator())
        augment(images, parameters, torch.tensor([0, 0, 1, 1])).backward(torch.zeros(4, channels, side, side))

    return run


def decoding(channels: int, side: int, layout: torch.memory_format, dtype=torch.float32) -> Callable[[], None]:
    """Return decoding and augmentation of chosen images from sheets of 2 x 2, and its gradient."""

    def run():
        sheets = torch.zeros(2, channels, side, side, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        chosen = torch.tensor([0, 5, 5, 7])
        images = decode_and_augment(
            sheets, draw_augmentation(2, torch.Generator()), chosen % 2, partition=2, chosen=chosen
        )
        images.backward(torch.zeros_like(images))

    return run


def _loss(side: int, dtype: torch.dtype, layout: torch.memory_format) -> Callable[[], None]:
    def run():
        real, synthetic = (torch.zeros(4, 128, side, side, dtype=dtype).contiguous(memory_format=layout) for _ in "ab")
        labels = torch.tensor([0, 0, 1, 1])
        af.attention_matching_loss(
            real, synthetic.requires_grad_(), real_labels=labels, synthetic_labels=labels
        ).backward()
        attention_maps(F.relu(real), 2.5, None, False)

    return run
