"""Attention maps and matching losses as functions, for distillation and attention-transfer loops."""

from __future__ import annotations

import functools
import warnings
from numbers import Real

import torch
from torch import Tensor

from .ops.attention import attention_maps
from .ops.matching import ClassGroups, class_groups_op, class_mean_distance

POWERS = (1.0, 16.0)


def spatial_attention(features: Tensor, power: float = 4.0, normalize: bool = True) -> Tensor:
    """Compute spatial attention, equation 1 of the ATOM paper: the sum of |f|^power over channels.

    Args:
        features: [B, C, H, W], float64, float32, float16 or bfloat16, any strides.
        power: the exponent p_s, in [1, 16].
        normalize: divide each sample's map by its L2 norm (equation 3); finite and accurate for any finite features.
            A zero sample keeps a zero map, as does one whose largest feature is a subnormal number.

    Returns:
        [B, H*W], float64 for float64 features, float32 otherwise. Differentiable once, in reverse mode.

    Raises:
        TypeError: the features are not a floating-point tensor.
        ValueError: the features are not four-dimensional, or the power is outside [1, 16].
        NotImplementedError: a forward-mode derivative is asked for (torch.func.jvp, torch.func.jacfwd).
    """
    return _attention(features, power, None, normalize)


def channel_attention(features: Tensor, power: float = 4.0, normalize: bool = True) -> Tensor:
    """Compute channel attention, equation 2 of the ATOM paper: the sum of |f|^power over positions.

    Arguments, dtypes and errors are as in `spatial_attention`; [B, C, H, W] -> [B, C].
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
    """Compute one layer's term of the ATOM loss, equation 3 of the paper.

    The term is the squared distance between the mean normalised maps of the real and of the synthetic samples of a
    class, summed over classes and over the spatial and the channel map.

    Args:
        real: [B, C, H, W] features of real samples; a constant, which receives no gradient. If it requires one, a
            UserWarning is issued once per process; pass ``real.detach()`` to avoid it.
        synthetic: [B', C, H, W] features of synthetic samples, same channels, height and width, same device.
        spatial_power: p_s in [1, 16], or None to leave the spatial maps out (ATOM with channel attention only).
        channel_power: p_c in [1, 16], or None to leave the channel maps out (DataDAM).
        real_labels: int64 [B], in any order, classes of any size. None for both sides: all samples are one class.
        synthetic_labels: int64 [B'], holding the same classes.
        groups: instead of labels, the result of `class_groups`. Checking labels waits for the device; a loop whose
            labels do not change makes the groups once and never waits.

    Returns:
        A scalar, float64 for float64 features, float32 otherwise. Differentiable once, in reverse mode, with
        respect to ``synthetic``.

    Raises:
        TypeError: features are not floating-point tensors, or labels are not int64.
        ValueError: shapes, devices, powers or classes do not fit; the message names them.
        NotImplementedError: a forward-mode derivative is asked for.
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
    return class_mean_distance(attention_maps(_constant(real), *powers), attention_maps(synthetic, *powers), groups)


def attention_matching_from_maps(
    real_maps: Tensor,
    synthetic_maps: Tensor,
    *,
    real_labels: Tensor | None = None,
    synthetic_labels: Tensor | None = None,
    groups: ClassGroups | None = None,
) -> Tensor:
    """Compute the matching loss of equation 3 from normalised maps, such as `ConvNet.attention` returns.

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
    """Compute the squared distance between the class means of two sets of vectors: L_MMD of equation 4, the loss of DM.

    Args:
        real: [B, D] embeddings of real samples; a constant, as in `attention_matching_loss`.
        synthetic: [B', D] embeddings of synthetic samples.
        real_labels, synthetic_labels, groups: as in `attention_matching_loss`.

    Returns:
        A scalar, float64 for float64 embeddings, float32 otherwise, summed over classes. Differentiable
        once, in reverse mode.

    Raises:
        TypeError: embeddings are not floating-point tensors, or labels are not int64.
        ValueError: shapes, devices or classes do not fit; the message names them.
        NotImplementedError: a forward-mode derivative is asked for.
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
    return class_mean_distance(_constant(real), synthetic, groups)


def class_groups(real_labels: Tensor, synthetic_labels: Tensor) -> ClassGroups:
    """Group the samples of two sides by class, once, for a loop whose labels do not change.

    Args:
        real_labels: int64 [B]; synthetic_labels: int64 [B'], on one device, holding the same classes.

    Raises:
        TypeError: labels are not int64.
        ValueError: labels are not one-dimensional, or a class is on one side only.
    """
    for labels, name in ((real_labels, "real_labels"), (synthetic_labels, "synthetic_labels")):
        _check_labels(labels, None, name)
    return ClassGroups(*class_groups_op(real_labels, synthetic_labels))


def _constant(real: Tensor) -> Tensor:
    """Detach the real side; warn once if it requires a gradient."""
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
    return attention_maps(features, *powers, normalize)


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
    if real_labels is None or synthetic_labels is None:
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
