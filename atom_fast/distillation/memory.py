"""How many bytes a step allocates, from the sizes of its tensors, and how many classes at once fit; nothing is run."""

from __future__ import annotations

import bisect
import dataclasses
import re
from pathlib import Path

import torch

from atom_fast._device import NARROW
from atom_fast.data.dataset import ImageData
from atom_fast.data.placement import device_memory, readable
from atom_fast.distillation.config import DistillConfig
from atom_fast.networks.convnet import ConvNet
from atom_fast.ops import native
from atom_fast.ops.attention import map_sizes
from atom_fast.ops.conv_block import launch_kind
from atom_fast.ops.dispatch import resolve_backend
from atom_fast.ops.norm_block import is_tiled, spatial_sums

_FLOAT = 4  # bytes
WORTH_SAYING = 10**9  # bytes; of smaller steps nothing is said


def step_memory(config: DistillConfig, data: ImageData, classes: int | None = None) -> int | None:
    """Return the most bytes that a step allocates at once, beside the tensors that are there before it.

    They grow with the pixels, the width, and the images of the classes that run at once (``config.class_chunk``). One
    of two moments decides, the first unless there are nearly as many synthetic images as real ones:

    - the second block of the real images. There are the images, and a convolution's input, output and pooled output,
      together 9/16 of ``width`` values per pixel. Where the first block is not fused with its convolution (images above
      32x32 on a GPU) it is that one, with 5/4 of ``width`` values per pixel.
    - the gradient of the second block of the synthetic images, with 13/16 of ``width`` values per pixel, or 33/16.

    Args:
        config: resolved settings.
        data: on the device that computes.
        classes: number of this process's classes; None: all.

    Returns:
        Bytes, within 10 % of what is counted at every operation. None where the network does not run in fused blocks,
        or on a CPU not in float32: there it is not known. On a GPU cuDNN's workspaces come on top.
    """
    device, (channels, *side) = data.train_images.device, data.image_shape
    on_cpu = resolve_backend(data.train_images) != "triton"
    with torch.device("meta"):
        network = ConvNet(channels, data.num_classes, (side[0], side[1]), **config.convnet_settings())
    if network.requires_grad_(False).unfused_reason() or config.feature_maps:
        return None
    if on_cpu and not NARROW.keys().isdisjoint((config.precision, config.precision_of_real)):
        return None
    classes = data.num_classes if classes is None else classes
    chunk = min(config.class_chunk or classes, classes)
    held = config.ipc * config.partition**2
    # At least two, as `atom_fast.distillation.step.pad_batch_of_one` has it.
    real, synthetic = (max(chunk * each, 2) for each in (config.real_batch, min(config.synthetic_batch or held, held)))
    joined = config.norm == "batch" and (device.type == "cpu" or chunk < data.num_classes)
    gpu, depth = None if on_cpu else device, len(network.blocks)
    sizes = _Sizes(config, data, depth, gpu, joined, config.precision_of_real)
    of_real, matched = sizes.of_real(real), sizes.matched
    sizes = _Sizes(config, data, depth, gpu, joined, config.precision)
    forward, backward = sizes.of_synthetic(synthetic)
    earlier = (classes // chunk - 1) * chunk  # classes of the chunks before the last whole one
    gradients = earlier * config.ipc * sizes.image
    if joined:  # all real images run first
        held = config.real_batch * matched
        return max(of_real + earlier * held, gradients + classes * held + max(forward, backward))
    return gradients + max(of_real, real * matched + forward, backward)


class _Sizes:
    """Bytes of one image's tensors, and of a thread's scratch memory on a CPU."""

    def __init__(
        self,
        config: DistillConfig,
        data: ImageData,
        depth: int,
        gpu: torch.device | None,
        joined: bool,
        precision: str,
    ):
        channels, *side = data.image_shape
        dtype = NARROW.get(precision, torch.float32)
        sides = [tuple(side)]
        for _ in range(depth):
            sides.append((sides[-1][0] // 2, sides[-1][1] // 2))
        planes = [height * breadth for height, breadth in sides]
        powers = config.spatial_power, config.channel_power
        self.image = _FLOAT * channels * planes[0]
        self.convolved = [dtype.itemsize * config.width * plane for plane in planes[:-1]]
        self.pooled = [dtype.itemsize * config.width * plane for plane in planes[1:]]
        self.maps = [*(_FLOAT * sum(map_sizes((1, config.width, *size), *powers)) for size in sides[:-2]), 0]
        self.matched = sum(self.maps) + self.pooled[-1]
        # In float32, its gradient before and after the loss's factor; and in the dtype.
        wide = _FLOAT * config.width * planes[-1]
        self.embedding_gradients = 2 * wide + (self.pooled[-1] if dtype.itemsize < _FLOAT else 0)
        # Autocast copies a convolution's filters.
        self.filters = dtype.itemsize * 9 * config.width**2 if dtype.itemsize < _FLOAT else 0
        # What is written to memory of the first convolution, and kept of its input: a copy in its dtype.
        apart = gpu is not None and launch_kind(data.image_shape, config.width, dtype, gpu) == "apart"
        self.first = self.convolved[0] if apart else 0
        self.taken = dtype.itemsize * channels * planes[0] if apart else self.image
        # Where it is fused: gradients of the neighbourhoods and sums of tiles of 16 quads.
        fused = gpu is not None and not apart
        self.columns = 9 * self.image + _FLOAT * 2 * config.width * -(-planes[0] // 64) if fused else 0
        # Joined statistics are computed from a copy in float32.
        copies = _FLOAT // dtype.itemsize if joined and gpu is not None and dtype.itemsize < _FLOAT else 0
        tiled = [gpu is not None and is_tiled((config.width, *size), dtype) for size in sides[:-1]]
        self.copied, self.weighted = [], []
        for block, (size, convolved) in enumerate(zip(sides, (self.first, *self.convolved[1:]), strict=False)):
            parts = spatial_sums((config.width, *size), dtype) if tiled[block] and convolved and self.maps[block] else 0
            self.copied.append(max(copies * convolved, _FLOAT * parts))
            # The gradient of a map, and in most kernels of a GPU a factor for each of its values.
            self.weighted.append((3 if tiled[block] or (fused and block == 0) else 2) * self.maps[block])
        # Of a thread: the framed image and the convolution's output; backward also its framed gradient.
        framed = (side[0] + 2) * (side[1] + 2)
        padded = config.width + -config.width % native.LANES
        self.scratch = _FLOAT * (channels * framed + padded * planes[0]) if gpu is None else 0
        self.scratch_backward = self.scratch + _FLOAT * padded * framed if gpu is None else 0

    def of_real(self, images: int) -> int:
        """Return the most bytes that real images take, from their pixels to embedding and maps."""
        first = self.image + self.first + self.copied[0] + self.pooled[0] + self.maps[0]
        moments = [2 * self.image * images, first * images + native.threads_for(images) * self.scratch]
        held = self.image + self.maps[0]
        for block in range(1, len(self.maps)):
            held += self.maps[block]
            convolution = (held + self.pooled[block - 1] + self.convolved[block]) * images
            moments += [convolution + self.filters, convolution + (self.copied[block] + self.pooled[block]) * images]
        return max(moments)

    def of_synthetic(self, images: int) -> tuple[int, int]:
        """Return the most bytes that synthetic images take in the forward and in the backward pass.

        Kept between the two: the images, each convolution's input, output and narrow filters, the maps, and a gradient
        of each map.
        """
        kept = self.taken + self.first + self.maps[0]
        forward = [(self.image + self.first + self.copied[0] + self.pooled[0] + self.maps[0]) * images]
        gradient = self.first or self.image
        first = self.taken + self.first + gradient + self.columns + self.pooled[0] + self.weighted[0]
        backward = [first * images + native.threads_for(images) * self.scratch_backward]
        later, earlier = sum(self.maps[1:]), self.maps[0]  # maps, and the gradients of those of earlier blocks
        for block in range(1, len(self.maps)):
            kept += self.pooled[block - 1] + self.convolved[block] + self.maps[block]
            later -= self.maps[block]
            filters = block * self.filters
            forward.append((kept + self.copied[block] + self.pooled[block]) * images + filters)
            gradients = self.pooled[block] + self.convolved[block] + earlier + self.weighted[block] - self.maps[block]
            backward.append((kept + later + gradients) * images + filters)
            earlier += self.maps[block]
        end = kept + 2 * sum(self.maps) + self.embedding_gradients
        forward.append(end * images + (len(self.maps) - 1) * self.filters)
        return max(forward), max(backward)


def fitting_chunk(config: DistillConfig, data: ImageData, available: int, classes: int | None = None) -> int:
    """Return the most classes that may run at once for a step to take at most ``available`` bytes; 0 if none do.

    Args:
        config, data, classes: as in `step_memory`, which knows the network.
    """
    numbers = range(1, (data.num_classes if classes is None else classes) + 1)

    def needed(chunk: int) -> int:
        return step_memory(dataclasses.replace(config, class_chunk=chunk), data, classes) or 0

    return bisect.bisect_right(numbers, available, key=needed)


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a GPU, or of this machine for a CPU; None where they are not known."""
    if device.type == "cuda":
        return int(device_memory(device))
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:  # not on Linux
        return None
    return int(found[1]) * 1024 if found else None


def describe_memory(config: DistillConfig, data: ImageData, classes: int | None = None) -> str | None:
    """Say how much memory a step takes, and how many classes at once fit if it does not; None below 1 GB.

    Args:
        config, data, classes: as in `step_memory`.
    """
    needed, available = step_memory(config, data, classes), free_memory(data.train_images.device)
    if needed is None or needed < WORTH_SAYING:
        return None
    text = f"a step takes about {readable(needed)} of memory"
    if available is None or needed <= available:
        return text
    text += f", but {readable(available)} are free"
    if chunk := fitting_chunk(config, data, available, classes):
        return f"{text}: with class_chunk {chunk} (--class-chunk {chunk}) it fits"
    return f"{text}, too few for one class at a time: lower real_batch (--real-batch) or width (--width)"
