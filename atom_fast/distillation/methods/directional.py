"""Derivatives of a network's gradient along a direction of its weights: what a step of SGD passes on to its past.

With g the gradient of the mean cross-entropy of some images in a network's weights and v a direction of the weights,
the derivatives of the number v.g are H v in the weights, with H the Hessian, and the mixed second derivative in the
images. They are also the derivatives along v of the two gradients, of weights and of images: one pass forward and one
backward that carry a tangent beside every value. `mixed_derivatives` does that in fused passes for the ConvNet of the
literature on a CPU, and differentiates twice by autograd otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atom_fast.networks.blocks import ConvBlock
from atom_fast.networks.convnet import ConvNet
from atom_fast.networks.layers import is_instance_norm
from atom_fast.ops import native
from atom_fast.ops.dispatch import resolve_backend, twice_differentiable
from atom_fast.ops.instance_norm import instance_norm_tangent, instance_norm_tangent_backward


class MixedDerivatives(NamedTuple):
    """Derivatives of v.g.

    Attributes:
        value: v.g, a scalar.
        of_images: [B, C, H, W].
        of_weights: [P], H v; None where it was not asked for.
    """

    value: Tensor
    of_images: Tensor
    of_weights: Tensor | None


def loss_and_gradient(network: ConvNet, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean cross-entropy, and its gradient [P] in all weights, flattened in the network's order.

    Args:
        network: in training mode; its parameters require gradients.
        images: [B, C, H, W].
        labels: int64 [B].
    """
    weights = list(network.parameters())
    loss = F.cross_entropy(network(images), labels)
    return loss.detach(), flatten(torch.autograd.grad(loss, weights, allow_unused=True), weights)


def flatten(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors of the shapes of ``like``, where None stands for zeros, to [P]."""
    pairs = zip(parts, like, strict=True)
    return torch.cat([other.new_zeros(other.numel()) if part is None else part.reshape(-1) for part, other in pairs])


def mixed_derivatives(
    network: ConvNet, images: Tensor, labels: Tensor, direction: Tensor, *, of_weights: bool = True
) -> MixedDerivatives:
    """Compute v.g and its derivatives.

    Args:
        network, images, labels: as `loss_and_gradient` takes them.
        direction: v, [P], in the network's order.
        of_weights: False to leave H v out.
    """
    if _is_fused(network, images):
        return _fused(network, images, labels, direction, of_weights)
    weights = list(network.parameters())
    images = images.detach().requires_grad_()
    with twice_differentiable(images.device):
        loss = F.cross_entropy(network(images), labels)
        parts = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        value = torch.dot(flatten(parts, weights), direction)
        wanted = [images, *weights] if of_weights else [images]
        of_images, *others = torch.autograd.grad(value, wanted, allow_unused=True)
    return MixedDerivatives(value.detach(), of_images, flatten(others, weights) if of_weights else None)


def _is_fused(network: ConvNet, images: Tensor) -> bool:
    """Return True if the kernels in C compute every block."""
    if resolve_backend(images) == "reference" or not native.supports(images, *network.parameters()):
        return False
    blocks = (block for block in network.blocks)
    return all(block.attention_refusal() is None and is_instance_norm(block.norm) for block in blocks)


def _fused(network: ConvNet, images: Tensor, labels: Tensor, direction: Tensor, of_weights: bool) -> MixedDerivatives:
    """Carry values and tangents through the network and back; tensors [2B, ...] hold both, one after the other."""
    weights: list[Tensor] = list(network.parameters())
    shaped = zip(direction.split([weight.numel() for weight in weights]), weights, strict=True)
    tangents = {weight: _in_layout(part.view_as(weight), weight) for part, weight in shaped}
    count, passes, pair = len(images), [], images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for block in network.blocks:
            passes.append(_Pass(block, pair, tangents, count))
            pair = passes[-1].pooled
        classifier = network.classifier
        matrix, along = classifier.weight, tangents[classifier.weight]
        embedding, embedding_tangent = pair.flatten(1).split(count)
        logits = torch.addmm(classifier.bias, embedding, matrix.mT)
        logits_tangent = torch.addmm(tangents[classifier.bias], embedding, along.mT).addmm_(
            embedding_tangent, matrix.mT
        )
        probabilities = logits.softmax(1)
        of_logits = (probabilities - F.one_hot(labels, logits.shape[1])).div_(count)
        value = (of_logits * logits_tangent).sum()
        centred = logits_tangent - (probabilities * logits_tangent).sum(1, keepdim=True)
        of_logits_tangent = (probabilities * centred).div_(count)
        found: dict[Tensor, Tensor] = {}
        if of_weights:
            found[matrix] = (of_logits_tangent.mT @ embedding).addmm_(of_logits.mT, embedding_tangent)
            found[classifier.bias] = of_logits_tangent.sum(0)
        both = torch.cat([of_logits_tangent, of_logits])
        upstream = both @ matrix
        upstream[:count].addmm_(of_logits, along)
        upstream = upstream.view(2 * count, *pair.shape[1:]).contiguous(memory_format=torch.channels_last)
        for one in reversed(passes):
            upstream = one.backward(upstream, found, of_weights)
        of_all = flatten([found.get(weight) for weight in weights], weights) if of_weights else None
    return MixedDerivatives(value, upstream, of_all)


class _Pass:
    """One block, forward and back, for values and tangents.

    Attributes:
        pooled: [2B, C, H // 2, W // 2], the block's outputs, then their tangents.
    """

    def __init__(self, block: ConvBlock, inputs: Tensor, tangents: dict[Tensor, Tensor], count: int):
        """Run the block forward.

        Args:
            block: one that `_is_fused` accepts.
            inputs: [2B, C, H, W], values, then tangents; or [B, C, H, W], images, whose tangents are zero.
            tangents: of every weight.
            count: B.
        """
        norm = block.norm
        self.filters, self.weight, self.bias = block.convolution.weight, norm.weight, norm.bias
        self.filters_tangent, self.weight_tangent = tangents[self.filters], tangents[norm.weight]
        self.inputs, self.count = inputs, count
        # The norm subtracts the convolution's bias.
        tangent = F.conv2d(inputs[:count], self.filters_tangent, padding=1)
        convolved = F.conv2d(inputs, self.filters, padding=1)
        if len(inputs) > count:
            tangent.add_(convolved[count:])
        self.convolved = convolved[:count], tangent
        affine = self.weight, self.bias, self.weight_tangent, tangents[norm.bias]
        self.pooled, self.statistics = instance_norm_tangent(*self.convolved, *affine, norm.eps)

    def backward(self, upstream: Tensor, found: dict[Tensor, Tensor], of_weights: bool) -> Tensor:
        """Run the block backward, and add the derivatives of its weights to ``found`` where they are wanted.

        Args:
            upstream: [2B, C, H // 2, W // 2], tangents of the outputs' gradients, then the gradients.

        Returns:
            The same of the inputs; for images [B, C, H, W], the tangents alone.
        """
        affine = self.weight, self.bias, self.weight_tangent
        of_convolved, *of_affine = instance_norm_tangent_backward(upstream, *self.convolved, *affine, self.statistics)
        found.update(zip((self.weight, self.bias), of_affine, strict=True))
        tangents, gradients = of_convolved.split(self.count)
        used = of_convolved[: len(self.inputs)]  # an image, whose tangent is zero, meets no gradient but the tangent
        of_inputs, of_filters = _convolution_backward(used, self.inputs, self.filters, True, of_weights)
        if of_weights:
            found[self.filters] = of_filters
        of_inputs[: self.count] += _convolution_backward(
            gradients, self.inputs[: self.count], self.filters_tangent, True, False
        )[0]
        return of_inputs


def _convolution_backward(gradient: Tensor, x: Tensor, filters: Tensor, of_x: bool, of_filters: bool):
    """Return the gradients of a 3x3 convolution's input and filters; None for one that is not wanted."""
    pair, mask = [1, 1], [of_x, of_filters, False]
    return torch.ops.aten.convolution_backward(gradient, x, filters, None, pair, pair, pair, False, [0, 0], 1, mask)[:2]


def _in_layout(part: Tensor, like: Tensor) -> Tensor:
    return part.contiguous(memory_format=torch.channels_last) if like.dim() == 4 else part
