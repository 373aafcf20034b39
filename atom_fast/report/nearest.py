"""The real image that is nearest to a synthetic one, pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

_REAL_AT_ONCE, _WANTED_AT_ONCE = 4096, 256  # images: the real ones of 32x32 take 50 MB in float32
_COMPARED = 4  # candidates in each chunk that are compared exactly


def nearest_images(pixels: Tensor, real: Tensor, *, progress: bool = True) -> Tensor:
    """Find for each image the real one with the smallest mean squared difference of pixels.

    Args:
        pixels: float32 [N, C, H, W] in [0, 1].
        real: uint8 [M, C, H, W], 0 to 255; read in chunks.
        progress: show a progress bar on standard error.

    Returns:
        int64 [N], positions in ``real``; on its device.
    """
    wanted = pixels.to(real.device).flatten(1)
    best = torch.full((len(wanted),), torch.inf, dtype=torch.float64, device=real.device)
    found = torch.zeros(len(wanted), dtype=torch.int64, device=real.device)
    chunks = range(0, len(real), _REAL_AT_ONCE)
    for start in tqdm(chunks, desc="nearest real images", unit="chunk", disable=not progress):
        some = real[start : start + _REAL_AT_ONCE].flatten(1).float() / 255
        lengths = some.square().sum(1)
        for rows in torch.arange(len(wanted), device=real.device).split(_WANTED_AT_ONCE):
            # |r|^2 - 2 p.r sorts like the distance, at the speed of a matrix product, but is rounded: ties are settled
            # by the differences themselves.
            rough = torch.addmm(lengths, wanted[rows], some.T, alpha=-2)
            candidates = rough.topk(min(_COMPARED, len(some)), largest=False).indices.sort().values
            differences = wanted[rows, None].double() - some[candidates].double()
            distance, position = differences.square().mean(2).min(1)
            nearer = distance < best[rows]
            chosen = start + candidates.gather(1, position[:, None]).squeeze(1)
            best[rows] = torch.where(nearer, distance, best[rows])
            found[rows] = torch.where(nearer, chosen, found[rows])
    return found
