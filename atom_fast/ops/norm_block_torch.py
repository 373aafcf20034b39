"""The block of `atom_fast.ops.norm_block` in PyTorch operators: in pieces of samples that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import map_sizes

# Bytes of convolution output that a thread works on at once: a second-level cache's worth.
PIECE_BYTES = 1 << 20
# Between these, a map's norm was taken, and its values raised to their power, within float32's range.
SAFE_NORMS = 1e-15, 1e15


def piece_bytes(device: torch.device) -> int:
    """Bytes of convolution output worked on at once."""
    return PIECE_BYTES * (torch.get_num_threads() if device.type == "cpu" else 128)


def is_channels_last(x: Tensor) -> bool:
    """Whether a position's channels are adjacent in memory, and its neighbours in the plane are not."""
    return x.stride(1) == 1 and x.stride(3) != 1


def forward_torch(
    pieces: Callable[[], Iterable[tuple[slice, Tensor]]],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    spatial_power: float | None,
    channel_power: float | None,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """`norm_block_op` into given memory, of pieces of a convolution's output and the rows that they are.

    The level that features are divided by before they are raised to a power is the largest feature. On a CPU, where a
    number can be looked at without waiting, it is 1, which saves passes, unless the maps' norms show that too large.
    """
    pooled, maps, mean, rstd, statistics = outputs
    constants = weight, bias, eps, spatial_power, channel_power
    for scaled in (False, True):
        if not scaled and maps.device.type != "cpu":
            continue
        statistics.fill_(1.0)
        for rows, x in pieces():
            level = forward_piece(x, *constants, scaled, pooled[rows], maps[rows], mean[rows], rstd[rows])
            if level is not None:
                statistics[rows, 0] = level
        parts = maps.split(map_sizes(x.shape, spatial_power, channel_power), 1)
        taken = [(place, part) for place, part in enumerate(parts, 1) if part.numel() > 0]
        norms = [unit_length(part, statistics[:, place], part) for place, part in taken]
        if not scaled and all(_is_safe(norm) for norm in norms):
            break


def _is_safe(norm: Tensor) -> bool:
    least, most = SAFE_NORMS
    low, high = norm.aminmax()
    return bool(low >= least) and bool(high <= most)


def forward_piece(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    spatial_power: float | None,
    channel_power: float | None,
    scaled: bool,
    pooled: Tensor,
    maps: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Tensor | None:
    """Write the pooled features, both maps, not of unit length, mean and 1 / standard deviation of some samples.

    With ``scaled`` the maps are those of the features divided by the level, which is returned.
    """
    x = x.to(mean.dtype)
    own_mean = x.mean((2, 3))
    centred = x - own_mean[:, :, None, None]
    own_rstd = torch.rsqrt((centred * centred).mean((2, 3)) + eps)
    scale, shift = _scale_and_shift(own_rstd, weight, bias)
    features = torch.addcmul(shift, centred, scale, out=centred).relu_()
    for output, value in ((mean, own_mean), (rstd, own_rstd), (pooled, F.avg_pool2d(features, 2))):
        output.copy_(value)
    level = None
    if scaled:
        level = features.amax((1, 2, 3))
        level = level.masked_fill(level == 0, 1.0)
        features = features / level.view(-1, 1, 1, 1)
    spatial = channel = None
    if spatial_power is not None:
        spatial = _raise(features, spatial_power)
    if channel_power is not None:
        channel = spatial if channel_power == spatial_power else _raise(features, channel_power)
    n_spatial, _ = map_sizes(x.shape, spatial_power, channel_power)
    if spatial is not None:
        maps[:, :n_spatial] = spatial.sum(1).flatten(1)
    if channel is not None:
        maps[:, n_spatial:] = channel.sum((2, 3))
    return level


def unit_length(attention: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Write the maps [B, M] with L2 norm 1, and 1 / norm (1 for a zero map) into ``factor`` [B]; returns the norm."""
    norm = torch.linalg.vector_norm(attention, dim=1)
    factor.copy_(norm.masked_fill(norm == 0, 1.0).reciprocal_())
    torch.mul(attention, factor[:, None], out=out)
    return norm


def backward_torch(
    pieces: Iterable[tuple[slice, Tensor, Tensor | None]],
    grad_pooled: Tensor,
    grad_maps: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    maps: Tensor,
    mean: Tensor,
    rstd: Tensor,
    statistics: Tensor,
    spatial_power: float | None,
    channel_power: float | None,
) -> Iterator[tuple[slice, Tensor]]:
    """`norm_block_backward_op` of pieces of a convolution's output: the rows that each is, and its gradient.

    A piece comes with its rows, and with memory for its gradient or None.
    """
    level = statistics[:, 0]
    scaled = level.device.type != "cpu" or bool((level != 1).any())
    powers = spatial_power, channel_power
    factors = None
    for rows, x, out in pieces:
        if factors is None:
            factors = _map_factors(grad_maps, maps, statistics, x.shape, *powers)
        own = (None if factor is None else factor[rows] for factor in factors)
        saved = mean[rows], rstd[rows], weight, bias
        yield rows, backward_piece(x, *saved, grad_pooled[rows], *own, level[rows], *powers, scaled, out)


def backward_piece(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_pooled: Tensor,
    spatial_factor: Tensor | None,
    channel_factor: Tensor | None,
    level: Tensor,
    spatial_power: float | None,
    channel_power: float | None,
    scaled: bool,
    out: Tensor | None,
) -> Tensor:
    """Gradient of the convolution's output of some samples, in ``out`` if given; see `_map_factors`."""
    centred = x.to(mean.dtype) - mean[:, :, None, None]
    scale, shift = _scale_and_shift(rstd, weight, bias)
    features = torch.addcmul(shift, centred, scale).relu_()
    gradient = _upsample(grad_pooled.to(mean.dtype), features)
    relative = features / level.view(-1, 1, 1, 1) if scaled else features
    derivative = None
    for power, factor, before in (
        (spatial_power, spatial_factor, None),
        (channel_power, channel_factor, spatial_power),
    ):
        if power is not None:
            derivative = derivative if power == before else _raise(relative, power - 1)
            gradient.addcmul_(derivative, factor)
    del relative, derivative
    torch.ops.aten.threshold_backward.grad_input(gradient, features, 0.0, grad_input=gradient)
    slope = torch.mul(gradient, centred, out=features).mean((2, 3), keepdim=True) * (rstd * rstd)[:, :, None, None]
    constant = gradient.mean((2, 3), keepdim=True)
    result = torch.addcmul(constant * -scale, centred, slope * -scale, out=centred).addcmul_(gradient, scale)
    return result.to(x.dtype) if out is None else out.copy_(result)


def _scale_and_shift(rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factor and summand [B, C, 1, 1] that take centred planes to the norm's output."""
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    shift = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype).expand_as(rstd)
    return scale[:, :, None, None], shift[:, :, None, None]


def _map_factors(
    grad_maps: Tensor | None,
    maps: Tensor,
    statistics: Tensor,
    shape: tuple[int, ...],
    spatial_power: float | None,
    channel_power: float | None,
) -> tuple[Tensor | None, Tensor | None]:
    """What multiplies (f / level)^(p - 1) in the gradient of each feature: [B, 1, H, W] and [B, C, 1, 1]."""
    _, channels, height, width = shape
    n_spatial, _ = map_sizes(shape, spatial_power, channel_power)
    factors: list[Tensor | None] = []
    for power, columns, index, view in (
        (spatial_power, slice(n_spatial), 1, (-1, 1, height, width)),
        (channel_power, slice(n_spatial, None), 2, (-1, channels, 1, 1)),
    ):
        if power is None:
            factors.append(None)
            continue
        factor = power * statistics[:, index] / statistics[:, 0]
        projected = _project(grad_maps[:, columns], maps[:, columns])
        factors.append(projected.mul_(factor[:, None]).view(view))
    return tuple(factors)


def _project(gradient: Tensor, unit: Tensor) -> Tensor:
    """The gradient [B, M] without its part along the maps, which L2 normalisation takes out."""
    return torch.addcmul(gradient, unit, (gradient * unit).sum(1, keepdim=True), value=-1.0)


def _raise(features: Tensor, power: float) -> Tensor:
    """features^power for features >= 0, by products where the power is a small whole number."""
    if power == 0:
        return torch.ones_like(features)
    if power == 1:
        return features
    if power in (2, 4, 8):
        square = features * features
        return square if power == 2 else _raise(square, power / 2)
    if power == 7:
        return _raise(features, 3).square().mul(features)
    return features.pow(power)  # a cube is two products to PyTorch too


def _upsample(grad_pooled: Tensor, like: Tensor) -> Tensor:
    """Backward of 2x2 average pooling, in the shape of the features."""
    upsampled = F.interpolate(grad_pooled * 0.25, scale_factor=2)
    height, width = (size % 2 for size in like.shape[2:])
    return F.pad(upsampled, (0, width, 0, height)) if height or width else upsampled
