"""The block of the ConvNet, and the conditions for running it fused."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from atom_fast.networks.layers import is_instance_norm
from atom_fast.ops.batch_norm import batch_norm
from atom_fast.ops.instance_norm import instance_norm


class ConvBlock(nn.Module):
    """3×3 convolution, normalisation, activation, pooling.

    Attributes:
        convolution, norm, activation, pool: the four modules; ``nn.Identity`` for one that a setting leaves out.
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.Module, activation: nn.Module, pool: nn.Module):
        super().__init__()
        self.convolution = convolution
        self.norm: Any = norm  # which attributes it has depends on its type
        self.activation = activation
        self.pool = pool

    def feature_map(self, x: Tensor) -> Tensor:
        """Return the activation's output before pooling, module by module: [B, C_in, H, W] -> [B, C, H, W]."""
        return self.activation(self.norm(self.convolution(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled feature map; what `_trains_fused` names runs as one operation."""
        if not self._trains_fused():
            return self.pool(self.feature_map(x))
        c = self.convolution
        return self.after_convolution(F.conv2d(x, c.weight, None, c.stride, c.padding, c.dilation, c.groups))

    def after_convolution(self, x: Tensor) -> Tensor:
        """Return the pooled feature map, given what the convolution returns without its bias."""
        norm, offset, fused = self.norm, self.convolution.bias, self._trains_fused()
        if not fused:
            x = x if offset is None else x + offset[:, None, None]
            return self.pool(self.activation(norm(x)))
        # The norm subtracts the convolution's bias; BatchNorm's running mean needs it.
        if fused == "norm":
            return self.pool(self.activation(instance_norm(x, norm.weight, norm.bias, norm.eps)))
        pool = _is_2x2_average(self.pool) and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
        if isinstance(norm, nn.GroupNorm):
            x = instance_norm(x, norm.weight, norm.bias, norm.eps, relu=True, pool=pool)
        else:
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            x = batch_norm(
                x, norm.weight, norm.bias, norm.running_mean, norm.running_var, offset=offset,
                training=norm.training, momentum=norm.momentum, eps=norm.eps, relu=True, pool=pool,
            )  # fmt: skip
        return x if pool else self.pool(x)

    def _trains_fused(self) -> str:
        """Return what one operation computes: "block" for norm, ReLU and pooling, "norm", or "" for nothing.

        PyTorch's InstanceNorm is slow in channels_last, so that it is worth replacing before other activations too.
        """
        norm = self.norm
        if any(map(_has_hooks, self.children())):
            return ""
        if isinstance(self.activation, nn.ReLU):
            batch = isinstance(norm, nn.BatchNorm2d) and norm.momentum is not None and norm.track_running_stats
            return "block" if (batch or is_instance_norm(norm)) and norm.affine else ""
        return "norm" if is_instance_norm(norm) and norm.affine else ""

    def attention_refusal(self) -> str | None:
        """Return why `ConvNet.attention` cannot run this block fused; None if it can."""
        convolution, norm, pool = self.convolution, self.norm, self.pool
        geometry = convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation
        if geometry != ((3, 3), (1, 1), (1, 1), (1, 1)) or convolution.groups != 1:
            return f"its convolution is not 3x3 with stride 1 and padding 1, but {convolution}"
        if not is_instance_norm(norm) and not isinstance(norm, nn.BatchNorm2d):
            return f"its norm is not InstanceNorm (a GroupNorm with one group per channel) or BatchNorm2d, but {norm}"
        if isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None:
            return "its BatchNorm is in evaluation mode and uses running statistics"
        if not isinstance(self.activation, nn.ReLU):
            return f"its activation is not ReLU, but {self.activation}"
        if not _is_2x2_average(pool):
            return f"its pooling is not 2x2 average pooling, but {pool}"
        if any(map(_has_hooks, self.children())):
            return "its modules have hooks"
        return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_2x2_average(pool: nn.Module) -> bool:
    if not isinstance(pool, nn.AvgPool2d) or pool.ceil_mode or pool.divisor_override:
        return False
    pair = nn.modules.utils._pair
    return (pair(pool.kernel_size), pair(pool.stride), pair(pool.padding)) == ((2, 2), (2, 2), (0, 0))
