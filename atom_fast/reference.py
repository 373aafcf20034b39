"""The equations of the ATOM paper, and the layers around them, in plain PyTorch.

This is the oracle of the tests, the eager baseline of the benchmarks, the implementation of backend "reference", and
the fallback of operations that no kernel computes. Everything is differentiable by autograd, to every order and in
forward mode. One departure from the paper: a sample whose attention map is exactly zero keeps a zero map, where the
equations would divide zero by zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def spatial_attention(features: Tensor, power: float, normalize: bool = True) -> Tensor:
    """Compute equation 1, the sum of |f|^p over channels: [B, C, H, W] -> [B, H*W]."""
    attention = features.abs().pow(power).sum(dim=1).flatten(1)
    return _unit_length(attention) if normalize else attention


def channel_attention(features: Tensor, power: float, normalize: bool = True) -> Tensor:
    """Compute equation 2, the sum of |f|^p over positions: [B, C, H, W] -> [B, C]."""
    attention = features.abs().pow(power).sum(dim=(2, 3))
    return _unit_length(attention) if normalize else attention


def attention_maps(
    features: Tensor, spatial_power: float | None, channel_power: float | None, normalize: bool = True
) -> Tensor:
    """Compute equations 1 and 2 and concatenate them, in float32 or float64: [B, C, H, W] -> [B, M].

    M = H*W (with ``spatial_power``) + C (with ``channel_power``).
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    maps = [features.new_empty((features.shape[0], 0))]
    if spatial_power is not None:
        maps.append(spatial_attention(features, spatial_power, normalize))
    if channel_power is not None:
        maps.append(channel_attention(features, channel_power, normalize))
    return torch.cat(maps, dim=1)


def class_mean_distance(
    real: Tensor, synthetic: Tensor, real_labels: Tensor | None = None, synthetic_labels: Tensor | None = None
) -> Tensor:
    """Compute the squared distance between class means, summed over classes: [B, D], [B', D] -> scalar."""
    if real_labels is None or synthetic_labels is None:
        return (real.mean(dim=0) - synthetic.mean(dim=0)).square().sum()
    loss = synthetic.new_zeros(())
    for label in synthetic_labels.unique():
        difference = real[real_labels == label].mean(dim=0) - synthetic[synthetic_labels == label].mean(dim=0)
        loss = loss + difference.square().sum()
    return loss


def attention_matching_loss(
    real: Tensor,
    synthetic: Tensor,
    spatial_power: float | None,
    channel_power: float | None,
    real_labels: Tensor | None = None,
    synthetic_labels: Tensor | None = None,
) -> Tensor:
    """Compute equation 3 for one layer: [B, C, H, W], [B', C, H, W] -> scalar."""
    loss = synthetic.new_zeros(())
    for attention, power in ((spatial_attention, spatial_power), (channel_attention, channel_power)):
        if power is not None:
            loss = loss + class_mean_distance(
                attention(real, power), attention(synthetic, power), real_labels, synthetic_labels
            )
    return loss


def atom_loss(
    real_features: Sequence[Tensor],
    synthetic_features: Sequence[Tensor],
    real_embedding: Tensor | None = None,
    synthetic_embedding: Tensor | None = None,
    real_labels: Tensor | None = None,
    synthetic_labels: Tensor | None = None,
    *,
    spatial_power: float | None = 4.0,
    channel_power: float | None = 4.0,
    mmd_weight: float = 0.01,
    scale: float = 1.0,
) -> Tensor:
    """Compute equation 4: attention matching over the layers, plus the weighted distance of the mean embeddings."""
    loss = torch.zeros((), device=synthetic_features[0].device, dtype=synthetic_features[0].dtype)
    for real, synthetic in zip(real_features, synthetic_features, strict=True):
        loss = loss + attention_matching_loss(
            real, synthetic, spatial_power, channel_power, real_labels, synthetic_labels
        )
    if real_embedding is not None:
        assert synthetic_embedding is not None
        loss = loss + mmd_weight * class_mean_distance(
            real_embedding, synthetic_embedding, real_labels, synthetic_labels
        )
    return scale * loss


def norm_block(
    convolved: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    spatial_power: float | None = 4.0,
    channel_power: float | None = 4.0,
    norm: str = "instance",
) -> tuple[Tensor, Tensor]:
    """Apply InstanceNorm or BatchNorm, ReLU and 2x2 average pooling: [B, C, H, W] -> pooled features, attention maps.

    See `atom_fast.ops.norm_block.norm_block`.
    """
    dtype = convolved.dtype
    weight, bias = (None if parameter is None else parameter.to(dtype) for parameter in (weight, bias))
    if norm == "batch":
        features = F.batch_norm(convolved, None, None, weight, bias, training=True, eps=eps)
    else:
        features = F.group_norm(convolved, convolved.shape[1], weight, bias, eps)
    return rectified_block(features, spatial_power, channel_power)


def rectified_block(
    normalised: Tensor, spatial_power: float | None, channel_power: float | None
) -> tuple[Tensor, Tensor]:
    """Apply what follows the norm in `norm_block`: ReLU, attention maps and 2x2 average pooling."""
    features = F.relu(normalised)
    return F.avg_pool2d(features, 2), attention_maps(features, spatial_power, channel_power)


def conv_block(
    images: Tensor,
    filters: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    spatial_power: float | None = 4.0,
    channel_power: float | None = 4.0,
    norm: str = "instance",
) -> tuple[Tensor, Tensor]:
    """Apply a 3x3 convolution with padding 1, then `norm_block`. See `atom_fast.ops.conv_block.conv_block`."""
    convolved = F.conv2d(images.to(filters.dtype), filters, padding=1)
    return norm_block(convolved, weight, bias, eps, spatial_power, channel_power, norm)


def instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool, pool: bool) -> Tensor:
    """Apply InstanceNorm and, if asked for, ReLU and 2x2 average pooling to [B, C, H, W]."""
    return _relu_and_pool(F.group_norm(x, x.shape[1], weight.to(x.dtype), bias.to(x.dtype), eps), relu, pool)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    offset: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
    pool: bool,
) -> Tensor:
    """Apply BatchNorm to ``x + offset`` [B, C, H, W] and, if asked for, ReLU and 2x2 average pooling."""
    x = x if offset is None else x + offset.to(x.dtype)[:, None, None]
    x = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _relu_and_pool(x, relu, pool)


def _relu_and_pool(x: Tensor, relu: bool, pool: bool) -> Tensor:
    x = F.relu(x) if relu else x
    return F.avg_pool2d(x, 2) if pool else x


def _unit_length(attention: Tensor) -> Tensor:
    norm = attention.norm(dim=1, keepdim=True)
    return attention / torch.where(norm > 0, norm, torch.ones_like(norm))
