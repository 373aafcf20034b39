"""Training and testing a network in fewer passes over memory than its modules take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atom_fast.networks.convnet import ConvBlock, ConvNet
from atom_fast.ops.batch_norm import batch_norm, is_fused
from atom_fast.ops.instance_norm import instance_norm


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """``network(images)``, to rounding, with gradients for every parameter that the logits depend on.

    A ConvNet's blocks of InstanceNorm or BatchNorm, ReLU and 2×2 average pooling run as one operation after a
    convolution without bias, which the norm takes away. What hooks on these modules would see is never computed, and
    gradients cannot be differentiated again; hence this function beside the network's own ``forward``. Other networks
    run as they are.
    """
    if isinstance(network, ConvNet):
        return network.classifier(embed(network, images))
    return network(images)


def embed(network: nn.Module, images: Tensor) -> Tensor:
    """What the classifier of ``network`` gets for images: [B, C, H, W] -> [B, embedding_size]; see :func:`logits`."""
    if not isinstance(network, ConvNet):
        return network.embed(images)
    x = images
    for block in network.blocks:
        x = _block(block, x)
    return x.flatten(1)


def _block(block: ConvBlock, x: Tensor) -> Tensor:
    norm, pool = block.norm, block.pool
    # Without the kernels BatchNorm is PyTorch's, which is what the block itself calls.
    batch = isinstance(norm, nn.BatchNorm2d) and norm.momentum is not None and is_fused(x, norm.training)
    if not ((batch or _is_instance_norm(norm)) and isinstance(block.activation, nn.ReLU)):
        return block(x)
    convolved = F.conv2d(x, block.convolution.weight, padding=block.convolution.padding)
    pooled = isinstance(pool, nn.AvgPool2d) and pool.kernel_size == 2 and not (x.shape[2] % 2 or x.shape[3] % 2)
    if batch:
        x = _batch_norm(norm, convolved, block.convolution.bias, pooled)
    else:
        x = instance_norm(convolved, norm.weight, norm.bias, norm.eps, rectify=True, pool=pooled)
    return x if pooled else pool(x)


def _batch_norm(norm: nn.BatchNorm2d, convolved: Tensor, offset: Tensor, pooled: bool) -> Tensor:
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return batch_norm(
        convolved, norm.weight, norm.bias, norm.running_mean, norm.running_var, offset=offset,
        training=norm.training, momentum=norm.momentum, eps=norm.eps, rectify=True, pool=pooled,
    )  # fmt: skip


def _is_instance_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels


def memory_format(network: nn.Module, device: torch.device) -> torch.memory_format:
    """The layout of weights and images that trains a network fastest.

    Convolutions want the channels of a place adjacent, on a CPU as on tensor cores; but PyTorch's norms over several
    channels at once are many times slower in that layout on a CPU.
    """
    joint = any(
        (isinstance(module, nn.GroupNorm) and not _is_instance_norm(module))
        or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 3)
        for module in network.modules()
    )
    return torch.contiguous_format if joint and device.type == "cpu" else torch.channels_last
