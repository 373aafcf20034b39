"""Line 5 of Algorithm 1: what is matched of the images, and the loss terms that match it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from atom_fast._device import NARROW, chip_of
from atom_fast.distillation.config import DistillConfig
from atom_fast.functional import attention_matching_loss, mean_matching_loss
from atom_fast.networks.convnet import ConvNet
from atom_fast.ops.conv_block import launch_kind
from atom_fast.ops.dispatch import resolve_backend
from atom_fast.ops.matching import ClassGroups, class_mean_distance, class_mean_distances

LayersOf = tuple[Tensor, list[Tensor]]  # embedding [B, D]; attention maps [B, M], or feature maps, of each layer
FREQUENCIES = 1024  # of NCFM's paper; its figure 6 gains little from more
FUSED = "with fused blocks"
FIRST_BLOCK = {
    "planes": "",
    "tiles": ", the first in tiles (this GPU has {chip})",
    "apart": ", the first after PyTorch's convolution (its kernels do not support these images or this dtype)",
}


def make_extractor(network: ConvNet, config: DistillConfig) -> Callable[[Tensor], LayersOf]:
    """Return the function from images [B, C, H, W] to their embedding and what is matched of each layer."""
    if config.feature_maps:
        return network.features
    return functools.partial(
        network.attention,
        spatial_power=config.spatial_power,
        channel_power=config.channel_power,
        ordered=config.calibration_weight > 0,  # only the classifier depends on the order of an embedding's values
    )


def describe_fusion(network: ConvNet, config: DistillConfig, images: Tensor) -> str:
    """Describe how the blocks of the network run, in words for the log.

    Args:
        network: of constants (``requires_grad_(False)``).
        config: the powers, precision and feature maps.
        images: [B, C, H, W] on the device that computes.
    """
    if config.feature_maps:
        return "without fused blocks (they keep no feature maps, which feature_maps matches)"
    if reason := network.unfused_reason():
        return f"without fused blocks ({reason})"
    if resolve_backend(images) != "triton":
        return FUSED
    dtype = NARROW.get(config.precision, torch.float32)
    kind = launch_kind(tuple(images.shape[1:]), config.width, dtype, images.device)
    return FUSED + FIRST_BLOCK[kind].format(chip=chip_of(images.device))


def joint_refusal(network: ConvNet, config: DistillConfig) -> str | None:
    """Return why classes that do not run at once cannot share BatchNorm's batch; None if they can or need not.

    Only the fused blocks join the statistics (`atom_fast.ops.joint_batch`).
    """
    if config.norm != "batch":
        return None
    reason = "feature_maps keeps feature maps" if config.feature_maps else network.unfused_reason()
    if reason is None:
        return None
    return (
        f"norm 'batch' computes its statistics over all classes, and only fused blocks join them, but {reason}; use a "
        "norm of each sample (instance, layer, group)"
    )


def matching_terms(real: LayersOf, synthetic: LayersOf, config: DistillConfig, groups: ClassGroups) -> Tensor:
    """Compute equation 3 of every layer that is matched, and last L_MMD of the embedding: [L + 1].

    L_ATOM is the sum of the former. With ``config.feature_maps`` they also match the feature maps themselves, as in the
    paper's Table 4.

    Args:
        real: what `make_extractor`'s function returns for the real images; constants.
        synthetic: the same for the synthetic images, which receive the gradient.
        config: the powers of the attention.
        groups: the rows of each class (`atom_fast.functional.class_groups`).
    """
    (real_embedding, real_layers), (synthetic_embedding, synthetic_layers) = real, synthetic
    if config.feature_maps:
        powers = {"spatial_power": config.spatial_power, "channel_power": config.channel_power}
        layers = [
            attention_matching_loss(*pair, **powers, groups=groups) + feature_matching_loss(*pair, groups)
            for pair in zip(real_layers[:-1], synthetic_layers[:-1], strict=True)
        ]
        return torch.stack([*layers, class_mean_distance(real_embedding, synthetic_embedding, groups)])
    if config.spatial_power is None and config.channel_power is None:
        real_layers = synthetic_layers = []
    return class_mean_distances([*real_layers, real_embedding], [*synthetic_layers, synthetic_embedding], groups)


def weighted_terms(network: ConvNet, config: DistillConfig) -> list[tuple[str, float]]:
    """Return the terms of a step's loss, each with its weight in equation 4 before the loss's scale.

    They are those of `matching_terms`, then what the settings add. A layer is named ``attention_loss``, as their sum.
    """
    matched = config.feature_maps or config.spatial_power is not None or config.channel_power is not None
    terms = [("attention_loss", 1.0)] * (len(network.blocks) - 1 if matched else 0)
    # pyrefly: ignore[bad-argument-type]  a number in resolved settings
    terms.append(("mmd_loss", config.mmd_weight))
    added = ("characteristic_loss", config.characteristic_weight), ("calibration_loss", config.calibration_weight)
    return terms + [(name, weight) for name, weight in added if weight > 0]


def feature_matching_loss(real: Tensor, synthetic: Tensor, groups: ClassGroups) -> Tensor:
    """Compute equation 3 with z = vec(f), the feature map itself instead of its attention map; one layer, a scalar.

    The paper's Table 4 names this term without an equation; z is normalised as in equation 3.

    Args:
        real: [B, C, H, W], constants; synthetic: [B', C, H, W].
        groups: the rows of each class.
    """
    vectors = (F.normalize(features.flatten(1).float(), dim=1) for features in (real, synthetic))
    return mean_matching_loss(*vectors, groups=groups)


def draw_frequencies(size: int, generator: torch.Generator) -> Tensor:
    """Draw the frequencies of `characteristic_loss` for embeddings of ``size`` values: float32 [size, FREQUENCIES]."""
    return torch.randn(size, FREQUENCIES, generator=generator, device=generator.device)


def characteristic_loss(real: Tensor, synthetic: Tensor, frequencies: Tensor, classes: int) -> Tensor:
    """Compare the characteristic functions of real and synthetic embeddings (NCFM, Wang et al. 2025), a scalar.

    A class's function at a frequency t is the mean of exp(i <t, z>) over its embeddings z, each of length 1. It holds
    all moments of their distribution where mean matching compares the first. The loss is the mean over frequencies of
    |real - synthetic| / sqrt(2), NCFM's distance with equal weights of amplitude and phase, summed over classes.

    Args:
        real: [K * B, D], class by class, constants; synthetic: [K * B', D], likewise.
        frequencies: float32 [D, T].
        classes: K.
    """
    real, synthetic = (_mean_waves(embedding, frequencies, classes) for embedding in (real, synthetic))
    squared = (real - synthetic).square().sum(0)  # of cosine and sine
    return (0.5 * squared).clamp(min=1e-12).sqrt().mean(1).sum()


def _mean_waves(embedding: Tensor, frequencies: Tensor, classes: int) -> Tensor:
    """Return the mean cosine and sine of each class, [2, K, T]."""
    with torch.autocast(embedding.device.type, enabled=False):  # a sum over the embedding needs more than bfloat16
        angles = F.normalize(embedding.float(), dim=1) @ frequencies
    return torch.stack((angles.cos(), angles.sin())).unflatten(1, (classes, -1)).mean(2)
