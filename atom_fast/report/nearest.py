"""The real image that is nearest to a synthetic one, pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

_REAL_AT_ONCE = 2048  # images: those of 32x32 take 50 MB in float64


def nearest_images(pixels: Tensor, real: Tensor, *, progress: bool = True) -> Tensor:
    """Find for each image the real one with the smallest mean squared difference of pixels.

    Args:
        pixels: float32 [N, C, H, W] in [0, 1].
        real: uint8 [M, C, H, W], 0 to 255; read in chunks.
        progress: show a progress bar on standard error.

    Returns:
        int64 [N], positions in ``real``; on its device.
    """
    # |r|^2 - 2 p.r sorts like the distance |p - r|^2, at the speed of a matrix product; in float64, because float32
    # rounds away the difference of nearly equal images.
    wanted = pixels.to(real.device).flatten(1).double()
    best = torch.full((len(wanted),), torch.inf, dtype=torch.float64, device=real.device)
    found = torch.zeros(len(wanted), dtype=torch.int64, device=real.device)
    chunks = range(0, len(real), _REAL_AT_ONCE)
    for start in tqdm(chunks, desc="nearest real images", unit="chunk", disable=not progress):
        some = real[start : start + _REAL_AT_ONCE].flatten(1).double() / 255
        distance, position = torch.addmm(some.square().sum(1), wanted, some.T, alpha=-2).min(1)
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        found = torch.where(nearer, start + position, found)
    return found
