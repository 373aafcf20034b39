"""Drawing a network's weights anew, in place and on its device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def draw_parameters(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Give every layer of a network PyTorch's default initialisation, and standard normal values to its own parameters.

    Convolutions and linear layers are uniform within ±1/√fan_in, biases too; norms get scale 1 and shift 0, and
    BatchNorm its initial running statistics. Parameters that belong to no such layer, such as a class token, are
    standard normal. The draws of a kind are one, in float32, so that the network is the same in every dtype; nothing
    is read back to the host.

    Args:
        module: on any device, drawn in place.
        generator: on the same device; None draws from PyTorch's default generator.
    """
    uniform, bounds, normal = [], [], []
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            parameters = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
            uniform += parameters
            bounds += [1 / math.sqrt(layer.weight[0].numel())] * len(parameters)
        elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
            layer.reset_parameters()  # constants: nothing is drawn
        else:
            normal += layer.parameters(recurse=False)
    device = next(module.parameters()).device
    _fill(uniform, torch.empty(_size(uniform), device=device).uniform_(-1, 1, generator=generator), bounds)
    if normal:
        ones = [1.0] * len(normal)
        _fill(normal, torch.empty(_size(normal), device=device).normal_(generator=generator), ones)


def _size(parameters: list[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _fill(parameters: list[Tensor], values: Tensor, scales: list[float]) -> None:
    """Write the values, in float32 times their parameter's scale, into the parameters."""
    pieces = values.split([parameter.numel() for parameter in parameters])
    pieces = [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]
    torch._foreach_mul_(pieces, scales)
    torch._foreach_copy_(parameters, pieces)
