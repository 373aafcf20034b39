"""The gradient of a loss of trained weights in what they were trained on, through all steps of plain SGD.

A step is w_{i+1} = w_i - b_i g_i, with g_i the gradient of the cross-entropy of the step's images at w_i. From the
loss's gradient v_N in w_N the steps are run through in reverse, v_i = v_{i+1} - b_i H_i v_{i+1}, and the loss has the
gradients -b_i d(v_{i+1}.g_i)/dx_i in the images of step i and -v_{i+1}.g_i in its rate. Kept are the weights before
every step, one vector each; of activations there are never more than those of one step. TESLA (Cui et al. 2023) leaves
v constant, which drops what images do to later steps' gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atom_fast.distillation.methods.directional import loss_and_gradient, mixed_derivatives
from atom_fast.distillation.network_cache import set_parameters
from atom_fast.networks.convnet import ConvNet

#: From a step's number and all synthetic images to the images of the step [B, C, H, W], differentiably, and their
#: labels int64 [B]; the same at every call.
Batch = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def train(network: ConvNet, start: Tensor, images: Tensor, batch: Batch, rates: Tensor) -> list[Tensor]:
    """Take steps of plain SGD; return the weights [P] before each of them, and after the last.

    Args:
        network: in training mode; its weights are overwritten.
        start: flat weights [P], in the network's order.
        images: all synthetic images.
        batch: the images and labels of each step.
        rates: [N], learning rate of each step.
    """
    weights = [start]
    for number, rate in enumerate(rates.unbind()):
        set_parameters(network, weights[-1])
        with torch.no_grad():
            chosen, labels = batch(number, images)
        _, gradient = loss_and_gradient(network, chosen, labels)
        weights.append(torch.addcmul(weights[-1], gradient, rate, value=-1))
    return weights


def differentiate(
    network: ConvNet,
    weights: list[Tensor],
    adjoint: Tensor,
    images: Tensor,
    batch: Batch,
    rates: Tensor,
    *,
    truncated: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a loss of the last weights.

    Args:
        network, images, batch, rates: as in `train`.
        weights: as it returned them; emptied, so that each vector's memory is free after its step.
        adjoint: v_N [P], the loss's gradient in the last weights.
        truncated: keep v constant, as TESLA does.

    Returns:
        The gradients in the images, of their shape, and in the rates [N].
    """
    of_images, of_rates = torch.zeros_like(images), torch.empty_like(rates)
    weights.pop()
    for number in reversed(range(len(rates))):
        set_parameters(network, weights.pop())
        leaf = images.detach().requires_grad_()
        chosen, labels = batch(number, leaf)
        exact = not truncated and number > 0  # the first weights are constants
        derivatives = mixed_derivatives(network, chosen.detach(), labels, adjoint, of_weights=exact)
        (part,) = torch.autograd.grad(chosen, leaf, derivatives.of_images)
        of_images.addcmul_(part, rates[number], value=-1)
        of_rates[number] = -derivatives.value
        if derivatives.of_weights is not None:
            adjoint = torch.addcmul(adjoint, derivatives.of_weights, rates[number], value=-1)
    return of_images, of_rates
