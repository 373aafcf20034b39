"""Lines 4 to 6 of Algorithm 1: features of both sides, and the terms of the loss that matches them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atom_fast._backend import resolve_backend
from atom_fast._device import chip_of
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.stages import stage
from atom_fast.functional import (
    attention_matching_from_maps,
    attention_matching_loss,
    mean_matching_loss,
)
from atom_fast.networks.convnet import ConvNet
from atom_fast.networks.fused_convnet import FusedConvNet
from atom_fast.ops.conv_block import launch_kind
from atom_fast.ops.matching import ClassGroups

FUSED = "with fused blocks"
FIRST_BLOCK = {
    "planes": "",
    "tiles": ", the first in tiles (this GPU has {chip})",
    "apart": ", the first after a convolution of its own (larger images or another type than its kernels take)",
}


def fused_if_possible(network: ConvNet, config: DistillConfig, images: Tensor) -> tuple[ConvNet | FusedConvNet, str]:
    """The network with fused blocks where they compute what it does, otherwise itself; and which, in words.

    Args:
        network, config: what runs.
        images: [B, C, H, W] on the device that computes.
    """
    if config.feature_maps:
        return network, "without fused blocks (they keep no feature maps, which feature_maps matches)"
    try:
        fused = network.fused(config.spatial_power, config.channel_power)
    except ValueError as refusal:
        return network, f"without fused blocks ({refusal})"
    if resolve_backend(images) == "triton":
        narrow = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        kind = launch_kind(tuple(images.shape[1:]), config.width, narrow, images.device)
        return fused, f"with fused blocks{FIRST_BLOCK[kind].format(chip=chip_of(images.device))}"
    return fused, FUSED


def matching_terms(
    extractor: ConvNet | FusedConvNet, real: Tensor, synthetic: Tensor, config: DistillConfig, groups: ClassGroups
) -> tuple[Tensor, Tensor]:
    """L_ATOM over layers 1 to L-1 and L_MMD of the embedding: equations 3 and 4, both scalars.

    With ``config.feature_maps`` the former has, as in the paper's Table 4, also the feature maps themselves.

    Args:
        extractor: gives the embedding, and the feature maps or, fused, their attention maps.
        real: [B, C, H, W], constants; synthetic: [B', C, H, W], to which the gradient flows.
        config: the powers of the attention.
        groups: which rows belong to one class (`atom_fast.functional.class_groups`).
    """
    with stage("real"), torch.no_grad():
        real_embedding, real_layers = extractor.features(real)
    with stage("synthetic"):
        synthetic_embedding, synthetic_layers = extractor.features(synthetic)
    with stage("loss"):
        mmd = mean_matching_loss(real_embedding, synthetic_embedding, groups=groups)
        if config.spatial_power is None and config.channel_power is None and not config.feature_maps:
            return torch.zeros_like(mmd), mmd
        if isinstance(extractor, FusedConvNet):
            pairs = zip(real_layers, synthetic_layers, strict=True)
            layers = [attention_matching_from_maps(*pair, groups=groups) for pair in pairs]
        else:
            powers = {"spatial_power": config.spatial_power, "channel_power": config.channel_power}
            pairs = zip(real_layers[:-1], synthetic_layers[:-1], strict=True)
            layers = [
                attention_matching_loss(*pair, **powers, groups=groups)
                + (feature_matching_loss(*pair, groups) if config.feature_maps else 0.0)
                for pair in pairs
            ]
        return sum(layers, torch.zeros_like(mmd)), mmd


def feature_matching_loss(real: Tensor, synthetic: Tensor, groups: ClassGroups) -> Tensor:
    """Equation 3 with the feature map itself in place of its attention map, z = vec(f); one layer, a scalar.

    The paper's Table 4 names this term and gives no equation for it; the norm of z is equation 3's.

    Args:
        real: [B, C, H, W], constants; synthetic: [B', C, H, W].
        groups: which rows belong to one class.
    """
    vectors = (F.normalize(features.flatten(1).float(), dim=1) for features in (real, synthetic))
    return mean_matching_loss(*vectors, groups=groups)
