"""A ConvNet that takes its attention maps while it computes, and never writes a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.conv_block import conv_block
from ..ops.norm_block import check_powers, norm_block
from .convnet import ConvBlock, ConvNet


class FusedConvNet(nn.Module):
    """The same weights and the same results as a `ConvNet`, for matching attention: its parameters are constants.

    The convolutions' biases are left out: the norm takes the mean of every plane or channel away, so nothing depends on
    them. BatchNorm takes its statistics from the images of each call, and leaves its running statistics as they are.

    Args:
        network: shared, not copied; drawing its weights anew draws these.
        spatial_power: exponent p_s of the spatial maps, in [1, 16], or None to leave them out.
        channel_power: exponent p_c of the channel maps, likewise.

    Raises:
        ValueError: a block is not 3×3 convolution, InstanceNorm or BatchNorm (in training mode), ReLU and 2×2 average
            pooling; the message says which part of which block. Or a power is not accepted.

    Attributes:
        network: the `ConvNet`.
    """

    def __init__(self, network: ConvNet, spatial_power: float | None = 4.0, channel_power: float | None = 4.0):
        super().__init__()
        check_powers(spatial_power, channel_power)
        for index, block in enumerate(network.blocks, start=1):
            reason = _refusal(block)
            if reason:
                raise ValueError(f"block {index} cannot be fused: {reason}")
        self.network = network
        self.spatial_power = spatial_power
        self.channel_power = channel_power

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, channels, H, W]."""
        return self.network.classifier(self._blocks(images, maps_of=0)[0])

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The embedding and the normalised attention maps of images [B, channels, H, W].

        Returns:
            The flattened pooled output of the last block [B, embedding_size], and of every block but the last the maps
            [B, M] that `atom_fast.attention_matching_from_maps` compares: the spatial map (H_l W_l values, with
            ``spatial_power``), then the channel map (width values, with ``channel_power``), each of L2 norm 1.
            Differentiable once, in the images.

        Raises:
            ValueError: gradients are recorded and a parameter requires one, or BatchNorm is not in training mode.
        """
        return self._blocks(images, maps_of=len(self.network.blocks) - 1)

    def _blocks(self, images: Tensor, maps_of: int) -> tuple[Tensor, list[Tensor]]:
        self._check_constants()
        x, maps = images, []
        for index, block in enumerate(self.network.blocks):
            takes_maps = index < maps_of
            if not _takes_own_statistics(block.norm):
                raise ValueError(f"block {index + 1} cannot be fused: {_RUNNING_STATISTICS}")
            options = {
                "eps": block.norm.eps,
                "spatial_power": self.spatial_power if takes_maps else None,
                "channel_power": self.channel_power if takes_maps else None,
                "norm": "batch" if isinstance(block.norm, nn.BatchNorm2d) else "instance",
            }
            filters, scale, shift = block.convolution.weight, block.norm.weight, block.norm.bias
            if index == 0:
                output = conv_block(x, filters, scale, shift, **options)
            else:
                output = norm_block(F.conv2d(x, filters, padding=1), scale, shift, **options)
            x = output.pooled
            if takes_maps:
                maps.append(output.maps)
        return x.flatten(1), maps

    def _check_constants(self) -> None:
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.network.parameters()):
            raise ValueError(
                "a parameter requires a gradient, but a fused network gives one to its images only; freeze it with "
                "network.requires_grad_(False), or use the ConvNet itself"
            )


_RUNNING_STATISTICS = (
    "its BatchNorm is in evaluation mode, in which it uses running statistics, but fused blocks use those of the "
    "batch; use network.train(), or the ConvNet itself"
)


def _takes_own_statistics(norm: nn.Module) -> bool:
    """Whether a norm takes its statistics from what it normalises."""
    return not isinstance(norm, nn.BatchNorm2d) or norm.training or norm.running_mean is None


def _refusal(block: ConvBlock) -> str | None:
    """Why a block cannot be fused; None if it can."""
    convolution, norm, activation, pool = block.convolution, block.norm, block.activation, block.pool
    geometry = convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation
    if geometry != ((3, 3), (1, 1), (1, 1), (1, 1)) or convolution.groups != 1:
        return f"its convolution is not 3x3 with stride 1 and padding 1, but {convolution}"
    instance = isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels
    if not instance and not isinstance(norm, nn.BatchNorm2d):
        return f"its norm is not InstanceNorm (a GroupNorm with one group per channel) or BatchNorm2d, but {norm}"
    if not _takes_own_statistics(norm):
        return _RUNNING_STATISTICS
    if not isinstance(activation, nn.ReLU):
        return f"its activation is not ReLU, but {activation}"
    if not isinstance(pool, nn.AvgPool2d) or _pooling(pool) != (2, 2, 0) or pool.ceil_mode or pool.divisor_override:
        return f"its pooling is not 2x2 average pooling, but {pool}"
    return None


def _pooling(pool: nn.AvgPool2d) -> tuple:
    """Kernel size, stride and padding, as single numbers where the sides agree."""
    values = (pool.kernel_size, pool.stride, pool.padding)
    return tuple(value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value for value in values)
