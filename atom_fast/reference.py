"""Equations 1 to 4 of the ATOM paper in plain PyTorch.

The oracle of every test and the eager baseline of every benchmark: nothing here is clever, everything is
differentiable by autograd. One departure: a sample whose map is exactly zero keeps a zero map, where the equations
would divide zero by zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def spatial_attention(features: Tensor, power: float, normalize: bool = True) -> Tensor:
    """Equation 1: sum of |f|^p over channels, [B, C, H, W] -> [B, H*W]."""
    attention = features.abs().pow(power).sum(dim=1).flatten(1)
    return _unit_length(attention) if normalize else attention


def channel_attention(features: Tensor, power: float, normalize: bool = True) -> Tensor:
    """Equation 2: sum of |f|^p over positions, [B, C, H, W] -> [B, C]."""
    attention = features.abs().pow(power).sum(dim=(2, 3))
    return _unit_length(attention) if normalize else attention


def class_mean_distance(
    real: Tensor, synthetic: Tensor, real_labels: Tensor | None = None, synthetic_labels: Tensor | None = None
) -> Tensor:
    """Squared distance between class means, summed over classes: [B, D], [B', D] -> scalar."""
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
    """Equation 3 for one layer: [B, C, H, W], [B', C, H, W] -> scalar."""
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
    """Equation 4: attention matching over the layers, plus the weighted distance of the mean embeddings."""
    loss = torch.zeros((), device=synthetic_features[0].device, dtype=synthetic_features[0].dtype)
    for real, synthetic in zip(real_features, synthetic_features, strict=True):
        loss = loss + attention_matching_loss(
            real, synthetic, spatial_power, channel_power, real_labels, synthetic_labels
        )
    if real_embedding is not None:
        loss = loss + mmd_weight * class_mean_distance(
            real_embedding, synthetic_embedding, real_labels, synthetic_labels
        )
    return scale * loss


def _unit_length(attention: Tensor) -> Tensor:
    norm = attention.norm(dim=1, keepdim=True)
    return attention / torch.where(norm > 0, norm, torch.ones_like(norm))
