"""Attention maps and matching losses as functions: what a distillation or attention-transfer loop calls."""

from __future__ import annotations

import functools
import warnings
from numbers import Real

import torch
from torch import Tensor

from . import reference
from ._backend import resolve_backend
from .ops.attention import attention_maps
from .ops.launching import accumulation_dtype
from .ops.matching import ClassGroups, class_groups_op, class_mean_distance

POWERS = (1.0, 16.0)


def spatial_attention(features: Tensor, power: float = 4.0, normalize: bool = True) -> Tensor:
    """Spatial attention, equation 1 of the ATOM paper: the sum of |f|^power over channels.

    Args:
        features: [B, C, H, W], float64, float32, float16 or bfloat16, any strides.
        power: the exponent p_s, in [1, 16].
        normalize: divide each sample's map by its L2 norm (equation 3); finite and accurate for any finite features.
            A zero sample keeps a zero map, as does one whose largest feature is a subnormal number.

    Returns:
        [B, H*W], float64 for float64 features, float32 otherwise. Differentiable once.

    Raises:
        TypeError: the features are no floating-point tensor.
        ValueError: the features are not four-dimensional, or the power is outside [1, 16].
    """
    return _attention(features, power, None, normalize)


def channel_attention(features: Tensor, power: float = 4.0, normalize: bool = True) -> Tensor:
    """Channel attention, equation 2 of the ATOM paper: the sum of |f|^power over positions, [B, C, H, W] -> [B, C].

    Arguments, dtypes and errors are those of `spatial_attention`.
    """
    return _attention(features, None, power, normalize)


def attention_matching_loss(
    real: Tensor,
    synthetic: Tensor,
    *,
    spatial_power: float | None = 4.0,
    channel_power: float | None = 4.0,
    real_labels: Tensor | None = None,
    synthetic_labels: Tensor | None = None,
    groups: ClassGroups | None = None,
) -> Tensor:
    """One layer's term of the ATOM loss, equation 3 of the paper.

    For each class, the squared distance between the mean normalised map of its real samples and of its synthetic
    samples, for the spatial and for the channel map; summed over maps and classes.

    Args:
        real: [B, C, H, W] features of real samples; a constant, to which no gradient flows. Where it requires one, a
            UserWarning says so, once in a process; ``real.detach()`` says that none is expected.
        synthetic: [B', C, H, W] features of synthetic samples, same channels, height and width, same device.
        spatial_power: p_s in [1, 16], or None to leave the spatial maps out (ATOM with channel attention only).
        channel_power: p_c in [1, 16], or None to leave the channel maps out (DataDAM).
        real_labels: int64 [B], in any order, classes of any size. None, for both sides: one class.
        synthetic_labels: int64 [B'], holding the same classes.
        groups: in place of labels, what `class_groups` made of them. Checking labels waits for the device; a loop
            whose labels do not change makes the groups once and never waits.

    Returns:
        A scalar, float64 for float64 features, float32 otherwise. Differentiable once, with respect to ``synthetic``.

    Raises:
        TypeError: features are no floating-point tensors, or labels are not int64.
        ValueError: shapes, devices, powers or classes do not fit; the message names them.
    """
    _check_features(real, "real")
    _check_features(synthetic, "synthetic")
    if real.shape[1:] != synthetic.shape[1:]:
        raise ValueError(
            "real and synthetic features must agree in channels, height and width; "
            f"got {tuple(real.shape)} and {tuple(synthetic.shape)}"
        )
    powers = _check_power(spatial_power, "spatial_power"), _check_power(channel_power, "channel_power")
    groups = _resolve_groups(real, synthetic, real_labels, synthetic_labels, groups)
    backend = resolve_backend(synthetic)
    real_maps = _attention_maps(_constant(real), *powers, True, backend)
    synthetic_maps = _attention_maps(synthetic, *powers, True, backend)
    return _class_mean_distance(real_maps, synthetic_maps, groups, backend)


def attention_matching_from_maps(
    real_maps: Tensor,
    synthetic_maps: Tensor,
    *,
    real_labels: Tensor | None = None,
    synthetic_labels: Tensor | None = None,
    groups: ClassGroups | None = None,
) -> Tensor:
    """The matching loss of equation 3 given normalised maps, for networks that take them while computing features.

    Args:
        real_maps: [B, D] maps divided by their L2 norm per sample; a constant, as in `attention_matching_loss`.
        synthetic_maps: [B', D].
        real_labels, synthetic_labels, groups: as in `attention_matching_loss`.

    Returns:
        A scalar: the squared distance of the class means, summed over classes.
    """
    return mean_matching_loss(
        real_maps, synthetic_maps, real_labels=real_labels, synthetic_labels=synthetic_labels, groups=groups
    )


def mean_matching_loss(
    real: Tensor,
    synthetic: Tensor,
    *,
    real_labels: Tensor | None = None,
    synthetic_labels: Tensor | None = None,
    groups: ClassGroups | None = None,
) -> Tensor:
    """Squared distance between the class means of two sets of vectors: L_MMD of equation 4, and the loss of DM.

    Args:
        real: [B, D] embeddings of real samples; a constant, as in `attention_matching_loss`.
        synthetic: [B', D] embeddings of synthetic samples.
        real_labels, synthetic_labels, groups: as in `attention_matching_loss`.

    Returns:
        A scalar, float64 for float64 embeddings, float32 otherwise, summed over classes. Differentiable once.

    Raises:
        TypeError: embeddings are no floating-point tensors, or labels are not int64.
        ValueError: shapes, devices or classes do not fit; the message names them.
    """
    for side, name in ((real, "real"), (synthetic, "synthetic")):
        _check_floating(side, name)
        if side.dim() != 2:
            raise ValueError(f"{name} embeddings must be [B, D]; got shape {tuple(side.shape)}")
    if real.shape[1] != synthetic.shape[1]:
        raise ValueError(
            f"real and synthetic embeddings must agree in size; got {tuple(real.shape)} and {tuple(synthetic.shape)}"
        )
    groups = _resolve_groups(real, synthetic, real_labels, synthetic_labels, groups)
    return _class_mean_distance(_constant(real), synthetic, groups, resolve_backend(synthetic))


def class_groups(real_labels: Tensor, synthetic_labels: Tensor) -> ClassGroups:
    """Group the samples of two sides by class, once, for a loop whose labels stay the same.

    Args:
        real_labels: int64 [B]; synthetic_labels: int64 [B'], on one device, holding the same classes.

    Raises:
        TypeError: labels are not int64.
        ValueError: labels are not one-dimensional, or a class stands on one side only.
    """
    for labels, name in ((real_labels, "real_labels"), (synthetic_labels, "synthetic_labels")):
        _check_labels(labels, None, name)
    return ClassGroups(*class_groups_op(real_labels, synthetic_labels))


def _constant(real: Tensor) -> Tensor:
    """The real side without its graph; says so, once, to a caller who may expect a gradient of it."""
    if real.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _warn_that_real_is_constant()
    return real.detach()


@functools.cache
def _warn_that_real_is_constant() -> None:
    warnings.warn(
        "the real side of a matching loss is a constant: no gradient flows to it, although it requires one. Pass "
        "real.detach(), or compute it under torch.no_grad(); for gradients of both sides write the loss in PyTorch",
        stacklevel=4,
    )


def _attention(features: Tensor, spatial_power: float | None, channel_power: float | None, normalize: bool) -> Tensor:
    _check_features(features, "features")
    power = _check_power(spatial_power if channel_power is None else channel_power, "power")
    if power is None:
        raise ValueError("power must be a number in [1, 16]; got None")
    powers = (power, None) if channel_power is None else (None, power)
    return _attention_maps(features, *powers, normalize, resolve_backend(features))


def _attention_maps(
    features: Tensor, spatial_power: float | None, channel_power: float | None, normalize: bool, backend: str
) -> Tensor:
    """[B, M]: the spatial map followed by the channel map."""
    if backend != "reference":
        maps, _ = attention_maps(features, spatial_power, channel_power, normalize, backend)
        return maps
    features = features.to(accumulation_dtype(features.dtype))
    maps = []
    if spatial_power is not None:
        maps.append(reference.spatial_attention(features, spatial_power, normalize))
    if channel_power is not None:
        maps.append(reference.channel_attention(features, channel_power, normalize))
    return torch.cat(maps, dim=1) if maps else features.new_zeros((features.shape[0], 0))


def _class_mean_distance(real: Tensor, synthetic: Tensor, groups: ClassGroups | None, backend: str) -> Tensor:
    if backend != "reference":
        distance, _ = class_mean_distance(real, synthetic, *(groups or (None,) * 4), backend)
        return distance
    dtype = accumulation_dtype(synthetic.dtype)
    real, synthetic = real.to(dtype), synthetic.to(dtype)
    if groups is None:
        return reference.class_mean_distance(real, synthetic) if len(synthetic) else synthetic.sum()
    labels = (
        _labels(groups.real_order, groups.real_offsets),
        _labels(groups.synthetic_order, groups.synthetic_offsets),
    )
    return reference.class_mean_distance(real, synthetic, *labels)


def _labels(order: Tensor, offsets: Tensor) -> Tensor:
    """The label of each row, from the rows sorted by class."""
    places = torch.arange(order.shape[0], device=order.device)
    labels = torch.empty_like(order)
    labels[order] = torch.searchsorted(offsets, places, right=True) - 1
    return labels


def _resolve_groups(
    real: Tensor,
    synthetic: Tensor,
    real_labels: Tensor | None,
    synthetic_labels: Tensor | None,
    groups: ClassGroups | None,
) -> ClassGroups | None:
    if real.device != synthetic.device:
        raise ValueError(f"real and synthetic must be on one device; got {real.device} and {synthetic.device}")
    if (real_labels is None) != (synthetic_labels is None):
        given = "real_labels" if synthetic_labels is None else "synthetic_labels"
        raise ValueError(f"labels must be given for both sides or for neither; got only {given}")
    if groups is not None:
        if real_labels is not None:
            raise ValueError("give labels or groups, not both")
        sizes = groups.real_order.shape[0], groups.synthetic_order.shape[0]
        if sizes != (real.shape[0], synthetic.shape[0]):
            raise ValueError(
                f"groups were made for {sizes[0]} real and {sizes[1]} synthetic samples; "
                f"got {real.shape[0]} and {synthetic.shape[0]}"
            )
        return groups
    if real_labels is None:
        if (real.shape[0] == 0) != (synthetic.shape[0] == 0):
            raise ValueError(
                f"a class is on one side only: {real.shape[0]} real and {synthetic.shape[0]} synthetic samples"
            )
        return None
    _check_labels(real_labels, real, "real_labels")
    _check_labels(synthetic_labels, synthetic, "synthetic_labels")
    return ClassGroups(*class_groups_op(real_labels, synthetic_labels))


def _check_labels(labels: Tensor, samples: Tensor | None, name: str) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} must be an int64 tensor; got {found}")
    if labels.dim() != 1 or (samples is not None and labels.shape[0] != samples.shape[0]):
        expected = f"[{samples.shape[0]}], one per sample" if samples is not None else "one-dimensional"
        raise ValueError(f"{name} must be {expected}; got shape {tuple(labels.shape)}")
    if samples is not None and labels.device != samples.device:
        raise ValueError(f"{name} must be on the samples' device {samples.device}; got {labels.device}")


def _check_features(features: Tensor, name: str) -> None:
    _check_floating(features, name)
    if features.dim() != 4:
        raise ValueError(f"{name} must be [B, C, H, W]; got {features.dim()} dimensions, shape {tuple(features.shape)}")


def _check_floating(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ):
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a float64, float32, float16 or bfloat16 tensor; got {found}")


def _check_power(power: float | None, name: str) -> float | None:
    if power is None:
        return None
    if isinstance(power, bool) or not isinstance(power, Real) or not POWERS[0] <= power <= POWERS[1]:
        raise ValueError(f"{name} must be a number in [{POWERS[0]:g}, {POWERS[1]:g}]; got {power!r}")
    return float(power)
