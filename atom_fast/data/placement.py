"""Where training images live: on the device that computes, or, where they would crowd it, in host memory.

A GPU reads page-locked ("pinned") host memory by itself under unified addressing. The images then stay on the host and
have a second tensor, of the GPU's, on the same memory. PyTorch's kernels read it like any other, also within a CUDA
graph, and only the images that a step gathers cross the bus.
"""

from __future__ import annotations

import math
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHARE = 0.5  # of a device's free memory, the most that data may take; networks and activations need the rest
_WORD = torch.int64  # read at once from host memory


def device_memory(device: torch.device) -> float:
    """Return the bytes that are free on a device for data; infinite on a CPU, whose memory holds them already."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def keeps_on_device(size: int, device: torch.device) -> bool:
    """Return True if ``size`` bytes of data are kept on a device: they take at most half of its free memory."""
    return size <= SHARE * device_memory(device)


def describe_place(size: int, device: torch.device, *, on_host: bool) -> str:
    """Say where training images of ``size`` bytes live in work on a device, for a person to read."""
    free = readable(device_memory(device))
    if on_host:
        return f"in {host_memory(device)} ({readable(size)}; {device} has {free} free)"
    return f"in memory ({readable(size)})" if device.type == "cpu" else f"on {device} ({readable(size)} of {free} free)"


def host_memory(device: torch.device) -> str:
    """Name the host memory that a device reads."""
    return "host memory" if device.type == "cpu" else "pinned host memory"


def readable(size: float) -> str:
    """Write a number of bytes with a decimal unit, as in "154 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def readable_by(images: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of ``device`` on the memory of ``images``, which stay in host memory.

    For a GPU the memory is pinned where it is, without a copy, until ``images`` is freed.

    Args:
        images: contiguous, on the CPU.
        device: a GPU, or the CPU, which gets ``images`` themselves.

    Raises:
        RuntimeError: the memory cannot be pinned, or is pinned for another GPU.
    """
    if device.type == "cpu":
        return images
    with torch.cuda.device(device):
        if not images.is_pinned():
            _pin(images)
        # The namespace keeps `images` alive as long as the GPU's tensor.
        interface = {"shape": tuple(images.shape), "typestr": "|u1", "data": (images.data_ptr(), False), "version": 3}
        shared = types.SimpleNamespace(images=images, __cuda_array_interface__=interface)
        seen = torch.as_tensor(shared, device=device)
    if seen.data_ptr() != images.data_ptr():
        raise RuntimeError(f"the images in host memory are pinned for another GPU than {device}; use one per process")
    return seen


def _pin(images: Tensor) -> None:
    # Not `pin_memory`, which copies to a buffer rounded up to a power of two.
    runtime: Any = torch.cuda.cudart()
    address = images.data_ptr()
    try:
        torch.cuda.check_error(runtime.cudaHostRegister(address, images.nbytes, 0))
    except RuntimeError as error:
        raise RuntimeError(
            f"{readable(images.nbytes)} of training images are too many for the GPU's memory, and their host memory "
            f"cannot be pinned ({str(error).splitlines()[0]}); use fewer or smaller images, or device 'cpu'"
        ) from error
    weakref.finalize(images, runtime.cudaHostUnregister, address).atexit = False


def image_reader(images: Tensor, *, on_host: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that gathers images [N, C, H, W] by indices, int64 [B], on the device of both.

    Args:
        images: uint8 or float32.
        on_host: the memory of ``images`` is the host's. It is read in words of 8 bytes where they divide an image, so
            that a GPU's requests are 256 bytes long.
    """
    if on_host and images[0].nbytes % _WORD.itemsize == 0 and images.data_ptr() % _WORD.itemsize == 0:
        words = images.flatten(1).view(_WORD)
        return lambda indices: words.index_select(0, indices).view(images.dtype).view(-1, *images.shape[1:])
    return lambda indices: images.index_select(0, indices)
