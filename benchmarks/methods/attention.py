"""The step that DAM, ATOM† and ATOM share, as published: forward hooks, and a loop over classes.

One step: a fresh network; for each class, 128 real images and the class's synthetic images, augmented alike; all
classes together through the network, once for each side, features taken by forward hooks on the ReLUs, attached for
every forward and cloned; then, for each layer but the last and each class, the squared distance of the mean
attention maps, and for each class the weighted squared distance of the mean embeddings; one update of the synthetic
images. Powers 4, weight 0.01, image learning rate 1 (10 above 50 images per class).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import batched, fused, published
from .workload import Workload

MMD_WEIGHT = 0.01


def build(workload: Workload, *, spatial: bool, channel: bool) -> Callable[[], Tensor]:
    """Return a function that runs one step with the chosen attentions and returns its loss."""
    if workload.implementation == "eager":
        return eager(workload, spatial, channel)
    if workload.implementation in batched.IMPLEMENTATIONS:
        return batched.build(workload, spatial=spatial, channel=channel, mmd_weight=MMD_WEIGHT)
    return fused.build(workload, spatial=spatial, channel=channel, mmd_weight=MMD_WEIGHT)


def eager(workload: Workload, spatial: bool, channel: bool) -> Callable[[], Tensor]:
    """Return the step as the public code runs it, class by class."""
    data = published.RealData(workload)
    images = published.synthetic_from_real(workload, data)
    optimizer = published.image_optimizer(images, published.matching_rate(workload.ipc))

    def step() -> Tensor:
        network = published.fresh_network(workload)
        real, synthetic = [], []
        for label in range(workload.classes):
            seed = data.seed()
            real.append(published.augment(data.batch(label, workload.real_batch), seed))
            synthetic.append(published.augment(images[label * workload.ipc : (label + 1) * workload.ipc], seed))
        loss = matching_loss(network, torch.cat(real), torch.cat(synthetic), workload.classes, spatial, channel)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def matching_loss(
    network: published.ConvNet, real: Tensor, synthetic: Tensor, classes: int, spatial: bool, channel: bool
) -> Tensor:
    """Return equation 4 of the paper over class-major batches [classes * B, C, H, W], one layer and class at a time."""
    real_features, real_embedding = hooked_features(network, real)
    real_features, real_embedding = [f.detach() for f in real_features], real_embedding.detach()
    synthetic_features, synthetic_embedding = hooked_features(network, synthetic)
    loss = synthetic.new_zeros(())
    for real_layer, synthetic_layer in zip(real_features[:-1], synthetic_features[:-1], strict=True):
        for attention in published.attentions(spatial, channel):
            loss = loss + class_loop_distance(attention(real_layer), attention(synthetic_layer), classes)
    return loss + MMD_WEIGHT * class_loop_distance(real_embedding, synthetic_embedding, classes)


def hooked_features(network: published.ConvNet, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return every ReLU's output, collected by hooks attached for this call, and the embedding."""
    features, handles = [], []
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            hook = module.register_forward_hook(lambda _module, _inputs, output: features.append(output.clone()))
            handles.append(hook)
    embedding = network.embed(images)
    for handle in handles:
        handle.remove()
    return features, embedding


def class_loop_distance(real: Tensor, synthetic: Tensor, classes: int) -> Tensor:
    """Return the squared distance of the class means of class-major [classes * B, D], one class after the other."""
    distance = synthetic.new_zeros(())
    for real_class, synthetic_class in zip(real.chunk(classes), synthetic.chunk(classes), strict=True):
        distance = distance + (real_class.mean(dim=0) - synthetic_class.mean(dim=0)).square().sum()
    return distance
