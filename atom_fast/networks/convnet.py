"""The ConvNet of the distillation literature: logits, embeddings, feature maps and attention maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atom_fast.names import INITIALIZATIONS, NORMS, POOLINGS
from atom_fast.networks.blocks import ConvBlock
from atom_fast.ops.attention import attention_maps
from atom_fast.ops.conv_block import conv_block
from atom_fast.ops.norm_block import check_powers, norm_block

ACTIVATIONS = ("relu", "leakyrelu", "sigmoid")
_ALIGNMENT = 64  # values: parameters in one buffer begin at multiples of 256 bytes, as allocations of their own do
GROUPS = 4  # of norm "group", as in the DC and DM code
LEAKY_SLOPE = 0.01  # as in the DC and DM code

# Half the width of the uniform interval, or the standard deviation of the normal: PyTorch's default (He uniform with
# a = √5), and He et al. (2015) for ReLU.
_INITIAL_SCALES = {
    "default": lambda fan_in: 1 / math.sqrt(fan_in),
    "uniform": lambda fan_in: math.sqrt(6 / fan_in),
    "normal": lambda fan_in: math.sqrt(2 / fan_in),
}


class ConvNet(nn.Module):
    """``depth`` blocks of convolution, normalisation, activation and pooling, then a linear classifier.

    The default is the network of DC, DM, DataDAM and ATOM: 3×3 convolutions of 128 channels, InstanceNorm, ReLU,
    2×2 average pooling; depth 3 at 32×32 and 4 at 64×64. Every point of the search space of the ATOM paper's Table 6
    is a setting of this class.

    Operations are fused where the blocks allow it: the same results to rounding, in fewer passes over memory. Fused
    results are differentiable once; run under ``atom_fast.backend("reference")`` for second derivatives.

    Args:
        channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width of the images in pixels; one number for a square.
        width: channels of every block.
        depth: number of blocks.
        activation: ``"relu"``, ``"leakyrelu"`` (slope 0.01) or ``"sigmoid"``.
        norm: ``"instance"`` (one group per channel), ``"batch"``, ``"layer"`` (over C, H and W), ``"group"``
            (4 groups), all with scale and shift, or ``"none"``.
        pooling: ``"avg2"`` (2×2 mean), ``"avg3"`` (3×3 mean, stride 2, padding 1, as the ATOM paper describes),
            ``"max2"`` or ``"none"``.
        initialization: ``"default"`` (PyTorch's: uniform within ±1/√fan_in, biases too), ``"normal"`` (He normal, zero
            biases) or ``"uniform"`` (He uniform, zero biases).

    Raises:
        ValueError: a name or number is not accepted, or the images are too small for that many blocks.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        image_size: int | tuple[int, int],
        *,
        width: int = 128,
        depth: int = 3,
        activation: str = "relu",
        norm: str = "instance",
        pooling: str = "avg2",
        initialization: str = "default",
    ):
        super().__init__()
        for name, value in (("channels", channels), ("num_classes", num_classes), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        _check_choice("activation", activation, ACTIVATIONS)
        _check_choice("norm", norm, NORMS)
        _check_choice("pooling", pooling, POOLINGS)
        _check_choice("initialization", initialization, INITIALIZATIONS)
        if norm == "group" and width % GROUPS:
            raise ValueError(f"norm 'group' needs a width divisible by {GROUPS}; got {width}")
        self.initialization = initialization

        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        blocks = []
        for index, block_size in enumerate(_block_sizes(size, depth, pooling, norm)):
            blocks.append(
                ConvBlock(
                    nn.Conv2d(channels if index == 0 else width, width, kernel_size=3, padding=1),
                    _make_norm(norm, width, block_size),
                    _make_activation(activation),
                    _make_pool(pooling),
                )
            )
        height, breadth = _pooled(block_size, pooling)
        self.blocks: Any = nn.ModuleList(blocks)
        self.embedding_size = width * height * breadth
        self.classifier = nn.Linear(self.embedding_size, num_classes)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, channels, H, W].

        If InstanceNorm follows a convolution, the convolution's bias gets no gradient (None): the norm subtracts it.
        """
        return self.classifier(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """Return the flattened pooled output of the last block [B, embedding_size]."""
        for block in self.blocks:
            x = block(x)
        return x.flatten(1)

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the embedding and the feature maps of images [B, channels, H, W], module by module.

        Returns:
            The flattened pooled output of the last block [B, embedding_size], and the activations of every block before
            pooling, [B, width, H_l, W_l] each.
        """
        maps = []
        for block in self.blocks:
            maps.append(block.feature_map(x))
            x = block.pool(maps[-1])
        return x.flatten(1), maps

    def attention(
        self,
        x: Tensor,
        spatial_power: float | None = 4.0,
        channel_power: float | None = 4.0,
        *,
        ordered: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the embedding and the normalised attention maps of images [B, channels, H, W].

        If `unfused_reason` returns None, no feature map is written to memory, and BatchNorm uses the statistics of the
        batch without updating its running statistics. Otherwise the maps are computed from `features`.

        Args:
            spatial_power: exponent p_s of the spatial maps, in [1, 16]; None leaves them out.
            channel_power: exponent p_c of the channel maps, likewise.
            ordered: False leaves an embedding's values in another order than `embed`'s, the same for all images, where
                that saves a copy.

        Returns:
            The embedding [B, embedding_size], and for every block but the last the maps [B, M] that
            `atom_fast.attention_matching_from_maps` compares: the spatial map (H_l W_l values), then the channel map
            (width values), each of L2 norm 1. Differentiable once.

        Raises:
            ValueError: a power is not accepted.
        """
        check_powers(spatial_power, channel_power)
        if self.unfused_reason() is not None:
            embedding, features = self.features(x)
            return embedding, [attention_maps(feature, spatial_power, channel_power) for feature in features[:-1]]
        maps = []
        for index, block in enumerate(self.blocks):
            last = index == len(self.blocks) - 1
            norm, filters = block.norm, block.convolution.weight
            options = {
                "eps": norm.eps,
                "spatial_power": None if last else spatial_power,
                "channel_power": None if last else channel_power,
                "norm": "batch" if isinstance(norm, nn.BatchNorm2d) else "instance",
            }
            if index == 0:  # few input channels: cheaper to recompute than to store
                x, attention = conv_block(x, filters, norm.weight, norm.bias, **options)
            else:
                x, attention = norm_block(F.conv2d(x, filters, padding=1), norm.weight, norm.bias, **options)
            maps.append(attention)
        return (x if ordered else x.permute(0, 2, 3, 1)).flatten(1), maps[:-1]

    def unfused_reason(self) -> str | None:
        """Return why `attention` cannot run fused with the current parameters and mode; None if it can."""
        for index, block in enumerate(self.blocks, start=1):
            reason = block.attention_refusal()
            if reason:
                return f"block {index} cannot be fused: {reason}"
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return "a parameter requires a gradient, but fused blocks differentiate only with respect to their images"
        return None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new parameters in place, from ``initialization``, on the parameters' device.

        One draw in float32 serves all parameters, so that a call is a handful of kernels, reads nothing back, can be
        captured in a CUDA graph, and gives the same network in every dtype. It also resets the running statistics of
        BatchNorm.

        Args:
            generator: on the parameters' device; None draws from PyTorch's default generator.
        """
        drawn, scales = zip(*self._drawn_parameters(), strict=True)
        zeros, ones = [], []
        if self.initialization != "default":
            zeros += [layer.bias for layer in self._linear_layers()]
        for block in self.blocks:
            for name, tensor in (*block.norm.named_parameters(), *block.norm.named_buffers()):
                (ones if name in ("weight", "running_var") else zeros).append(tensor)

        flat = self._draw(sum(p.numel() for p in drawn), generator)
        values = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in drawn]), drawn, strict=True)]
        torch._foreach_mul_(values, scales)
        torch._foreach_copy_(drawn, values)
        if zeros or ones:
            torch._foreach_zero_(zeros + ones)
        if ones:
            torch._foreach_add_(ones, 1.0)

    @torch.no_grad()
    def drawer(self) -> Callable[[torch.Generator], None]:
        """Move the random parameters into one buffer, and return a function that draws them there.

        The function draws what `reset_parameters` draws, in three kernels instead of one for every parameter and more,
        and leaves the other parameters as they are.
        """
        parameters = self._drawn_parameters()
        start, drawn, sources, scales = 0, 0, [], []
        for parameter, scale in parameters:
            in_memory = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
            numbers = torch.arange(drawn, drawn + parameter.numel()).view(parameter.shape).permute(in_memory)
            gap = -parameter.numel() % _ALIGNMENT
            sources.append(F.pad(numbers.flatten(), (0, gap)))
            scales.append(F.pad(torch.full((parameter.numel(),), scale), (0, gap)))
            drawn += parameter.numel()
        device = self.classifier.weight.device
        source, scale = torch.cat(sources).to(device), torch.cat(scales).to(device)
        buffer = torch.empty_like(scale)
        for (parameter, _), part in zip(parameters, sources, strict=True):
            own = torch.as_strided(buffer, parameter.shape, parameter.stride(), start)
            parameter.data = own.copy_(parameter)
            start += len(part)

        def draw(generator: torch.Generator) -> None:
            torch.index_select(self._draw(drawn, generator), 0, source, out=buffer).mul_(scale)

        return draw

    def _linear_layers(self) -> list[Any]:
        return [*(block.convolution for block in self.blocks), self.classifier]

    def _drawn_parameters(self) -> list[tuple[Tensor, float]]:
        """Return the random parameters in the order of their draw, each with its scale."""
        drawn = []
        for layer in self._linear_layers():
            scale = _INITIAL_SCALES[self.initialization](layer.weight[0].numel())
            drawn.append((layer.weight, scale))
            if self.initialization == "default":
                drawn.append((layer.bias, scale))
        return drawn

    def _draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Draw float32 [count] of scale 1."""
        flat = torch.empty(count, device=self.classifier.weight.device)
        if self.initialization == "normal":
            return flat.normal_(generator=generator)
        return flat.uniform_(-1, 1, generator=generator)


def default_depth(height: int, width: int) -> int:
    """Return the depth of the literature for an image size: 3 blocks up to 32×32, 4 at 64×64, one more per doubling."""
    return max(3, round(math.log2(min(height, width))) - 2)


def _check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")


def _pooled(size: tuple[int, int], pooling: str) -> tuple[int, int]:
    """Return height and width after one pooling."""
    if pooling == "none":
        return size
    if pooling == "avg3":
        return (size[0] + 1) // 2, (size[1] + 1) // 2
    return size[0] // 2, size[1] // 2


def _block_sizes(size: tuple[int, int], depth: int, pooling: str, norm: str) -> list[tuple[int, int]]:
    """Return height and width of every block's feature map."""
    sizes = [size]
    for _ in range(depth - 1):
        sizes.append(_pooled(sizes[-1], pooling))
    for index, (height, width) in enumerate(sizes):
        unpoolable = pooling in ("avg2", "max2") and min(height, width) < 2
        constant = norm == "instance" and height * width < 2  # InstanceNorm of one pixel is zero for every image
        if unpoolable or constant:
            shallower = f"depth {index} or less, or " if index else ""
            raise ValueError(
                f"images of {size[0]}x{size[1]} are too small for depth {depth} with pooling {pooling!r} and norm "
                f"{norm!r}: block {index + 1} would see {height}x{width}; use {shallower}larger images"
            )
    return sizes


def _make_norm(norm: str, width: int, size: tuple[int, int]) -> nn.Module:
    if norm == "instance":
        return nn.GroupNorm(width, width)
    if norm == "batch":
        return nn.BatchNorm2d(width)
    if norm == "layer":
        return nn.LayerNorm([width, *size])
    if norm == "group":
        return nn.GroupNorm(GROUPS, width)
    return nn.Identity()


def _make_activation(activation: str) -> nn.Module:
    if activation == "relu":
        return nn.ReLU()
    if activation == "leakyrelu":
        return nn.LeakyReLU(LEAKY_SLOPE)
    return nn.Sigmoid()


def _make_pool(pooling: str) -> nn.Module:
    if pooling == "avg2":
        return nn.AvgPool2d(2)
    if pooling == "avg3":
        return nn.AvgPool2d(3, stride=2, padding=1)
    if pooling == "max2":
        return nn.MaxPool2d(2)
    return nn.Identity()
