"""Attention maps (equations 1 and 2 of the ATOM paper) as an operator with an analytic gradient.

The backward pass of the kernels keeps only the features, the maps and three numbers per sample. A second derivative is
not implemented and raises.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import native
from .dispatch import dispatch, register
from .launching import KERNELS, accumulation_dtype, constant_power, device_of, is_traced, triton_dtype
from .operators import differentiate, fake, operator


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
    implementation = "successor" if KERNELS["attention"] == "successor" else "triton"
    return _run(features, spatial_power, channel_power, normalize, implementation)


def _run_c(features, spatial_power, channel_power, normalize):
    if not native.takes(features):
        return NotImplemented
    return _run(features, spatial_power, channel_power, normalize, "c")


def _run(features, *options):
    if is_traced():
        return attention_maps_op(features, *options)[0]
    return _AttentionMaps.apply(features.resolve_neg(), *options)


def _run_eager(features, spatial_power, channel_power, normalize):
    features = features.to(accumulation_dtype(features.dtype))
    if normalize and features.numel() > 0:  # relative to the largest feature, so that no power leaves the dtype's range
        peak = features.detach().abs().amax((1, 2, 3), keepdim=True)
        features = features / peak.masked_fill(peak < torch.finfo(peak.dtype).tiny, float("inf"))
    return reference.attention_maps(features, spatial_power, channel_power, normalize)


register(
    "attention", plain=("eager", "reference"), triton=_run_triton, c=_run_c, eager=_run_eager,
    reference=reference.attention_maps,
)  # fmt: skip


def map_sizes(shape: tuple[int, ...], spatial_power: float | None, channel_power: float | None) -> tuple[int, int]:
    """Return the number of values of one sample's spatial and channel map; 0 for a map that is left out."""
    _, channels, height, width = shape
    return (0 if spatial_power is None else height * width), (0 if channel_power is None else channels)


@operator("attention_maps", differentiable=True)
def attention_maps_op(
    features: Tensor, spatial_power: float | None, channel_power: float | None, normalize: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    """Compute the maps [B, M] and statistics [3, B] of features [B, C, H, W].

    The statistics are the number that each sample's features are divided by (its largest |f|; for "c" and "successor"
    1 where powers stay within the dtype's range), and for each map the factor that turns sums of (|f| / number)^power
    into the result.

    Args:
        implementation: "triton", its "successor" (see ``KERNELS`` in `launching`), or "c" on a CPU.
    """
    return _maps(features, spatial_power, channel_power, normalize, implementation)


def _maps(features, spatial_power, channel_power, normalize, implementation) -> tuple[Tensor, Tensor]:
    maps, statistics = _empty_results(features, spatial_power, channel_power)
    if features.numel() == 0 or maps.numel() == 0:
        return maps.zero_(), statistics.fill_(1)
    _FORWARD[implementation](features, spatial_power, channel_power, normalize, maps, statistics)
    return maps, statistics


def _empty_results(features, spatial_power, channel_power) -> tuple[Tensor, Tensor]:
    wide = {"dtype": accumulation_dtype(features.dtype), "device": features.device}
    batch, values = features.shape[0], sum(map_sizes(features.shape, spatial_power, channel_power))
    return torch.empty((batch, values), **wide), torch.empty((3, batch), **wide)


@fake(attention_maps_op)
def _(features, spatial_power, channel_power, normalize, implementation):
    return _empty_results(features, spatial_power, channel_power)


@operator("attention_maps_backward")
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
    return _gradient(features, gradient, maps, statistics, spatial_power, channel_power, normalize, implementation)


def _gradient(features, gradient, maps, statistics, spatial_power, channel_power, normalize, implementation) -> Tensor:
    output = torch.empty_like(features)
    if features.numel() == 0 or maps.numel() == 0:
        return output.zero_()
    backward = _BACKWARD[implementation]
    backward(features, gradient.contiguous(), maps, statistics, spatial_power, channel_power, normalize, output)
    return output


@fake(attention_maps_backward)
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


differentiate(attention_maps_op, _backward, _setup_context)


class _AttentionMaps(torch.autograd.Function):
    """`attention_maps_op` without the dispatch of an operator, which takes longer than the kernels of small maps."""

    @staticmethod
    def forward(ctx, features, *options):
        maps, statistics = _maps(features, *options)
        ctx.save_for_backward(features, maps, statistics)
        ctx.options = options
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # pyrefly: ignore[bad-override]
        features, maps, statistics = ctx.saved_tensors
        batched = torch._C._functorch.is_legacy_batchedtensor(gradient)  # `is_grads_batched`: without memory of its own
        function = attention_maps_backward if batched or is_traced() else _gradient
        return function(features, gradient, maps, statistics, *ctx.options), None, None, None, None


# C: see kernels/attention.c.

_ROWS = 4  # as in kernels/attention.c


def _forward_c(features, spatial_power, channel_power, normalize, maps, statistics):
    native.run(
        f"attention_forward_{native.suffix(features.dtype)}", len(features), features,
        torch.tensor(features.stride()), maps, statistics, _row_memory(features, _ROWS, features), *features.shape,
        *native.powers(spatial_power, channel_power), normalize,
    )  # fmt: skip


def _backward_c(features, gradient, maps, statistics, spatial_power, channel_power, normalize, output):
    weights = maps.new_empty((native.threads_for(len(features)), maps.shape[1]))
    native.run(
        f"attention_backward_{native.suffix(features.dtype)}", len(features), features,
        torch.tensor(features.stride()), gradient, maps, statistics, output, torch.tensor(output.stride()), weights,
        _row_memory(features, 2, features, output), *features.shape,
        *native.powers(spatial_power, channel_power), normalize,
    )  # fmt: skip


def _row_memory(features: Tensor, rows: int, *accessed: Tensor) -> Tensor | None:
    """Return memory for that many channels or positions per thread; None if the values of each are adjacent."""
    by_place = features.stride(1) == 1 and features.shape[1] > 1
    if all(tensor.stride(1) == 1 if by_place else _is_flat(tensor) and tensor.stride(3) == 1 for tensor in accessed):
        return None
    values = features.shape[1] if by_place else features.shape[2] * features.shape[3]
    return features.new_empty((native.threads_for(len(features)), rows, values))


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


# The successor of Triton's kernels: see kernels/attention_sums.py.


def _forward_successor(features, spatial_power, channel_power, normalize, maps, statistics):
    from ..kernels import attention_sums as kernels

    matrix = _Matrix(features if _Matrix.describes(features) else features.contiguous())
    launch = kernels.tile_launch(matrix.rows, matrix.columns, features.element_size())
    constants = matrix.constants(spatial_power, channel_power, launch)
    grid = matrix.grid(launch)
    row_sums = grid[2] * matrix.rows if constants["ROW_POWER"] else 0
    column_sums = grid[1] * matrix.columns if constants["COLUMN_POWER"] else 0
    sums = torch.empty((len(features), row_sums + column_sums), dtype=maps.dtype, device=maps.device)
    sizes = matrix.rows, matrix.columns, *matrix.strides
    with device_of(features):
        kernels.attention_sums_kernel[grid](matrix.features, sums, *sizes, **constants)
        constants |= kernels.map_launch(matrix.rows, matrix.columns)
        kernels.attention_maps_kernel[grid[:1]](
            matrix.features, sums, maps, statistics, *sizes,
            ROWS_ARE_POSITIONS=matrix.rows_are_positions, NORMALIZE=normalize, **constants,
        )  # fmt: skip


def _backward_successor(features, gradient, maps, statistics, spatial_power, channel_power, normalize, output):
    from ..kernels import attention_sums as kernels

    matrix, result = _Matrix(features), _Matrix(output)
    alike = matrix.rows_are_positions == result.rows_are_positions
    if not (alike and _Matrix.describes(features) and _Matrix.describes(output)):
        matrix = _Matrix(features.contiguous())
        result = _Matrix(torch.empty_like(matrix.features))
    launch = kernels.tile_launch(matrix.rows, matrix.columns, features.element_size())
    grid = matrix.grid(launch)
    weights = torch.empty_like(maps)
    with device_of(features):
        kernels.attention_weights_kernel[grid[:1]](
            gradient, maps, statistics, weights, features.shape[2] * features.shape[3], features.shape[1],
            SPATIAL=constant_power(spatial_power), CHANNEL=constant_power(channel_power), NORMALIZE=normalize,
            **kernels.map_launch(matrix.rows, matrix.columns),
        )  # fmt: skip
        kernels.attention_gradient_kernel[grid](
            matrix.features, weights, statistics, result.features, matrix.rows, matrix.columns,
            *matrix.strides, *result.strides, ROWS_ARE_POSITIONS=matrix.rows_are_positions,
            **matrix.constants(spatial_power, channel_power, launch),
        )  # fmt: skip
    if result.features is not output:
        output.copy_(result.features)


class _Matrix:
    """Features [B, C, H, W] as [B, rows, columns] with adjacent columns: channels if these are adjacent."""

    def __init__(self, features: Tensor):
        _, channels, height, width = features.shape
        self.features = features
        self.rows_are_positions = features.stride(1) == 1 and channels > 1
        if self.rows_are_positions:
            self.rows, self.columns, stride_row = height * width, channels, features.stride(3)
        else:
            self.rows, self.columns, stride_row = channels, height * width, features.stride(1)
        self.strides = features.stride(0), stride_row

    @staticmethod
    def describes(features: Tensor) -> bool:
        """Return True if neither rows nor columns have gaps that two strides do not express."""
        by_position = features.stride(1) == 1 and features.shape[1] > 1
        return _is_flat(features) and (by_position or features.stride(3) == 1)

    def grid(self, launch: dict[str, int]) -> tuple[int, int, int]:
        """Return the number of samples, of tiles of rows and of tiles of columns."""
        return len(self.features), -(-self.rows // launch["TILE_ROWS"]), -(-self.columns // launch["BLOCK_COLUMNS"])

    def constants(self, spatial_power: float | None, channel_power: float | None, launch: dict[str, int]) -> dict:
        """Add to a launch table the powers of sums along rows and along columns, and whether blocks are full."""
        spatial, channel = constant_power(spatial_power), constant_power(channel_power)
        row_power, column_power = (spatial, channel) if self.rows_are_positions else (channel, spatial)
        even = self.rows % launch["BLOCK_ROWS"] == 0 and self.columns % launch["BLOCK_COLUMNS"] == 0
        return {"ROW_POWER": row_power, "COLUMN_POWER": column_power, "EVEN": even, **launch}


_FORWARD = {"c": _forward_c, "triton": _forward_triton, "successor": _forward_successor}
_BACKWARD = {"c": _backward_c, "triton": _backward_triton, "successor": _backward_successor}
