"""Attention maps (equations 1 and 2 of the ATOM paper) as an operator with an analytic gradient.

The backward pass keeps only the features, the maps and three numbers per sample. A second derivative is not implemented
and raises. There is no kernel in C: on a CPU, and on GPUs without Triton, PyTorch's operators run in chunks, several
times faster than the equations under autograd.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from .dispatch import dispatch, register
from .launching import accumulation_dtype, constant_power, device_of, triton_dtype

# Bytes of features per chunk of "eager" on a CPU: passes over a chunk hit the second-level cache.
CHUNK_BYTES = 1 << 20


def attention_maps(
    features: Tensor, spatial_power: float | None, channel_power: float | None, normalize: bool = True
) -> Tensor:
    """Return the spatial map (equation 1) followed by the channel map (equation 2) of each sample.

    Args:
        features: [B, C, H, W], floating point, any strides.
        spatial_power, channel_power: exponents in [1, 16]; None leaves the map out.
        normalize: divide each map by its L2 norm.

    Returns:
        [B, M], M = H*W (with ``spatial_power``) + C (with ``channel_power``), float64 for float64 features, otherwise
        float32. Differentiable once.
    """
    return dispatch("attention", features, spatial_power, channel_power, normalize)


def _run_triton(features, spatial_power, channel_power, normalize):
    return attention_maps_op(features, spatial_power, channel_power, normalize, "triton")[0]


def _run_eager(features, spatial_power, channel_power, normalize):
    return attention_maps_op(features, spatial_power, channel_power, normalize, "eager")[0]


register("attention", plain=("reference",), triton=_run_triton, eager=_run_eager, reference=reference.attention_maps)


def map_sizes(shape: tuple[int, ...], spatial_power: float | None, channel_power: float | None) -> tuple[int, int]:
    """Return the number of values of one sample's spatial and channel map; 0 for a map that is left out."""
    _, channels, height, width = shape
    return (0 if spatial_power is None else height * width), (0 if channel_power is None else channels)


@torch.library.custom_op("atom_fast::attention_maps", mutates_args=())
def attention_maps_op(
    features: Tensor, spatial_power: float | None, channel_power: float | None, normalize: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    """Compute the maps [B, M] and statistics [3, B] of features [B, C, H, W].

    The statistics are each sample's largest |f|, and for each map the factor that turns sums of (|f| / largest)^power
    into the result.

    Args:
        implementation: "triton" or "eager".
    """
    dtype = accumulation_dtype(features.dtype)
    batch = features.shape[0]
    maps = features.new_empty((batch, sum(map_sizes(features.shape, spatial_power, channel_power))), dtype=dtype)
    statistics = features.new_ones((3, batch), dtype=dtype)
    if features.numel() == 0:
        return maps.zero_(), statistics
    forward = _forward_triton if implementation == "triton" else _forward_eager
    forward(features, spatial_power, channel_power, normalize, maps, statistics)
    return maps, statistics


@attention_maps_op.register_fake
def _(features, spatial_power, channel_power, normalize, implementation):
    dtype = accumulation_dtype(features.dtype)
    batch = features.shape[0]
    maps = features.new_empty((batch, sum(map_sizes(features.shape, spatial_power, channel_power))), dtype=dtype)
    return maps, features.new_empty((3, batch), dtype=dtype)


@torch.library.custom_op("atom_fast::attention_maps_backward", mutates_args=())
def attention_maps_backward(
    features: Tensor,
    gradient: Tensor,
    maps: Tensor,
    statistics: Tensor,
    spatial_power: float | None,
    channel_power: float | None,
    normalize: bool,
    implementation: str,
) -> Tensor:
    """Return the gradient [B, C, H, W] of the features from the gradient [B, M] of their maps."""
    output = torch.empty_like(features)
    if features.numel() == 0:
        return output
    backward = _backward_triton if implementation == "triton" else _backward_eager
    backward(features, gradient.contiguous(), maps, statistics, spatial_power, channel_power, normalize, output)
    return output


@attention_maps_backward.register_fake
def _(features, gradient, maps, statistics, spatial_power, channel_power, normalize, implementation):
    return torch.empty_like(features)


def _setup_context(ctx, inputs, output):
    features, *ctx.options = inputs
    maps, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(features, maps, statistics)


def _backward(ctx, gradient, _):
    features, maps, statistics = ctx.saved_tensors
    return attention_maps_backward(features, gradient, maps, statistics, *ctx.options), None, None, None, None


attention_maps_op.register_autograd(_backward, setup_context=_setup_context)


# Triton: see kernels/attention.py.


def _forward_triton(features, spatial_power, channel_power, normalize, maps, statistics):
    import triton

    from ..kernels import attention as kernels

    batch, channels, height, width = features.shape
    positions = height * width
    n_spatial, _ = map_sizes(features.shape, spatial_power, channel_power)
    launch = kernels.forward_launch(channels, positions, features.element_size())
    tiles = triton.cdiv(positions, launch["BLOCK_P"])
    chunks = triton.cdiv(channels, launch["BLOCK_C"])
    spatial = maps.new_empty((batch, n_spatial))
    channel = maps.new_empty((batch, tiles, channels if channel_power is not None else 0))
    peak = maps.new_empty((batch, tiles, chunks))
    powers = {"SPATIAL": constant_power(spatial_power), "CHANNEL": constant_power(channel_power)}
    with device_of(features):
        kernels.attention_forward_kernel[(batch, tiles)](
            features, spatial, channel, peak, channels, positions, width, *features.stride(),
            **powers, FLAT=_is_flat(features), ACCUMULATE=triton_dtype(maps.dtype), **launch,
        )  # fmt: skip
        normalize_launch = kernels.normalize_launch(channels, positions, tiles)
        kernels.attention_normalize_kernel[(batch,)](
            spatial, channel, peak, maps, statistics, channels, positions, tiles, chunks,
            **powers, NORMALIZE=normalize, TILE_P=launch["BLOCK_P"], **normalize_launch,
        )  # fmt: skip


def _backward_triton(features, gradient, maps, statistics, spatial_power, channel_power, normalize, output):
    import triton

    from ..kernels import attention as kernels

    batch, channels, height, width = features.shape
    positions = height * width
    powers = {"SPATIAL": constant_power(spatial_power), "CHANNEL": constant_power(channel_power)}
    projection = maps.new_empty((2, batch))
    launch = kernels.backward_launch(channels, positions, features.stride(1) == 1)
    tiles = triton.cdiv(positions, launch["BLOCK_P"])
    with device_of(features):
        if normalize:
            blocks = kernels.normalize_launch(channels, positions, tiles)
            kernels.attention_projection_kernel[(batch,)](
                gradient, maps, projection, channels, positions,
                **powers, BLOCK_C=blocks["BLOCK_C"], BLOCK_P=blocks["BLOCK_P"], num_warps=blocks["num_warps"],
            )  # fmt: skip
        kernels.attention_backward_kernel[(batch, tiles)](
            features, gradient, maps, statistics, projection, output, channels, positions, width,
            *features.stride(), *output.stride(), **powers, NORMALIZE=normalize,
            FLAT=_is_flat(features), OUTPUT_FLAT=_is_flat(output), ACCUMULATE=triton_dtype(maps.dtype), **launch,
        )  # fmt: skip


def _is_flat(tensor: Tensor) -> bool:
    """Return True if flattened positions are one stride apart."""
    return tensor.shape[2] == 1 or tensor.stride(2) == tensor.shape[3] * tensor.stride(3)


# Eager: PyTorch's operators in chunks that stay in the cache, with products instead of pow. Every full pass writes to
# one of two buffers that are allocated once: fresh memory costs ten times as much as the pass that fills it.


def _forward_eager(features, spatial_power, channel_power, normalize, maps, statistics):
    n_spatial, _ = map_sizes(features.shape, spatial_power, channel_power)
    for rows, magnitude, raised in _chunks(features, maps.dtype):
        magnitude.copy_(features[rows]).abs_()
        peak = statistics[0, rows].copy_(magnitude.flatten(1).amax(1))
        peak.masked_fill_(peak < torch.finfo(peak.dtype).tiny, 1.0)  # zero, or its reciprocal would overflow
        magnitude.mul_(peak.reciprocal().view(-1, 1, 1, 1))
        for power in {spatial_power, channel_power} - {None}:
            _power(magnitude, power, raised)
            if power == spatial_power:
                factor = statistics[1, rows]
                _scale_map(raised.sum(1).flatten(1), power, peak, normalize, factor, maps[rows, :n_spatial])
            if power == channel_power:
                factor = statistics[2, rows]
                _scale_map(raised.sum((2, 3)), power, peak, normalize, factor, maps[rows, n_spatial:])


def _scale_map(attention, power, peak, normalize, factor, out):
    """Write the map with unit length, or multiplied by peak^power, and the factor that was applied."""
    if normalize:
        norm = torch.linalg.vector_norm(attention, dim=1)
        factor.copy_(norm.masked_fill_(norm == 0, 1.0).reciprocal_())
    else:
        factor.copy_(peak.pow(power))
    torch.mul(attention, factor[:, None], out=out)


def _backward_eager(features, gradient, maps, statistics, spatial_power, channel_power, normalize, output):
    n_spatial, _ = map_sizes(features.shape, spatial_power, channel_power)
    for rows, relative, raised in _chunks(features, maps.dtype):
        relative.copy_(features[rows]).mul_(statistics[0, rows].reciprocal().view(-1, 1, 1, 1))
        weights = {}
        for index, power, columns, shape in (
            (1, spatial_power, slice(0, n_spatial), (-1, 1, *features.shape[2:])),
            (2, channel_power, slice(n_spatial, None), (-1, features.shape[1], 1, 1)),
        ):
            if power is not None:
                factor = statistics[index, rows] * power / statistics[0, rows]
                weight = _map_gradient(gradient[rows, columns], maps[rows, columns], normalize) * factor[:, None]
                weights.setdefault(power, []).append(weight.view(shape))
        total = None
        for power, summands in weights.items():
            term = _signed_power(relative, power, raised)
            last = total is None and len(weights) == 1
            weight = torch.add(*summands, out=relative) if last and len(summands) == 2 else summands[0]
            term.mul_(weight)
            total = term if last else (term.clone() if total is None else total.add_(term))
        output[rows] = torch.zeros_like(relative) if total is None else total


def _map_gradient(gradient, attention, normalize):
    """Project a map's gradient through its L2 normalisation, without the division by the norm."""
    if not normalize:
        return gradient
    return gradient - attention * (gradient * attention).sum(1, keepdim=True)


def _chunks(features: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield runs of samples, with two buffers of their shape and memory format."""
    limit = CHUNK_BYTES if features.device.type == "cpu" else 128 * CHUNK_BYTES
    batch = features.shape[0]
    rows = max(1, limit * batch // (features.numel() * dtype.itemsize))
    first, second = (torch.empty_like(features[:rows], dtype=dtype) for _ in range(2))
    for start in range(0, batch, rows):
        end = min(start + rows, batch)
        yield slice(start, end), first[: end - start], second[: end - start]


def _power(magnitude: Tensor, power: float, out: Tensor) -> Tensor:
    """Compute |f|^p, by products where p is 2, 4 or 8."""
    if power not in (2, 4, 8):
        return torch.pow(magnitude, power, out=out)
    torch.mul(magnitude, magnitude, out=out)
    for _ in range({2: 0, 4: 1, 8: 2}[power]):
        out.mul_(out)
    return out


def _signed_power(value: Tensor, power: float, out: Tensor) -> Tensor:
    """Compute sign(f) |f|^(p - 1): an odd power of f itself where p is even."""
    if power == 1:
        return torch.sign(value, out=out)
    if power == 2:
        return out.copy_(value)
    if power == 4:
        return torch.mul(value, value, out=out).mul_(value)
    if power == 8:
        torch.mul(value, value, out=out).mul_(value)
        return out.mul_(out).mul_(value)
    return torch.abs(value, out=out).pow_(power - 1).mul_(value.sign())
