"""Draw new parameters of a network in place, on its device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def draw_parameters(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw every layer of a network from PyTorch's default initialisation, other parameters from a standard normal.

    Weights and biases of convolutions and linear layers are uniform within ±1/√fan_in. Norms get scale 1 and shift 0,
    and BatchNorm its initial running statistics. Parameters outside such layers, such as a class token, are standard
    normal. One draw in float32 serves all uniform parameters, and one all normal ones, so that the network is the same
    in every dtype. Nothing is read back to the host.

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
    """Write float32 values, scaled per parameter, into the parameters."""
    parts = values.split([parameter.numel() for parameter in parameters])
    parts = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
    torch._foreach_mul_(parts, scales)
    torch._foreach_copy_(parameters, parts)
