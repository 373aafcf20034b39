"""What DAM, ATOM† and ATOM share as their public line of code runs: hooks, and a loop over classes.

One step: a fresh network; for each class, 128 real images and the class's synthetic images, augmented alike; all
classes together through the network, once for each side, features taken by forward hooks on the ReLUs, attached anew
for every forward and cloned; then, for each layer but the last and each class, the squared distance of the mean
attention maps, and for each class the weighted squared distance of the mean embeddings; one update of the synthetic
images. Powers 4, weight 0.01, image learning rate 1 (10 above 50 images a class).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import batched, fused, published
from .setting import Setting

MMD_WEIGHT = 0.01


def build(setting: Setting, *, spatial: bool, channel: bool) -> Callable[[], Tensor]:
    """A function that runs one step with the chosen attentions and returns its loss."""
    if setting.provider == "eager":
        return eager(setting, spatial, channel)
    if setting.provider in batched.PROVIDERS:
        return batched.build(setting, spatial=spatial, channel=channel, mmd_weight=MMD_WEIGHT)
    return fused.build(setting, spatial=spatial, channel=channel, mmd_weight=MMD_WEIGHT)


def eager(setting: Setting, spatial: bool, channel: bool) -> Callable[[], Tensor]:
    """The loop as the public code runs it."""
    data = published.RealData(setting)
    images = published.synthetic_from_real(setting, data)
    optimizer = published.image_optimizer(images, published.matching_rate(setting.ipc))

    def step() -> Tensor:
        network = published.fresh_network(setting)
        real, synthetic = [], []
        for label in range(setting.classes):
            seed = data.seed()
            real.append(published.augment(data.batch(label, setting.real_batch), seed))
            synthetic.append(published.augment(images[label * setting.ipc : (label + 1) * setting.ipc], seed))
        loss = matching_loss(network, torch.cat(real), torch.cat(synthetic), setting.classes, spatial, channel)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def matching_loss(
    network: published.ConvNet, real: Tensor, synthetic: Tensor, classes: int, spatial: bool, channel: bool
) -> Tensor:
    """Equation 4 of the paper over class-major batches [classes * B, C, H, W], one layer and one class at a time."""
    real_features, real_embedding = hooked_features(network, real)
    real_features, real_embedding = [f.detach() for f in real_features], real_embedding.detach()
    synthetic_features, synthetic_embedding = hooked_features(network, synthetic)
    loss = synthetic.new_zeros(())
    for real_layer, synthetic_layer in zip(real_features[:-1], synthetic_features[:-1], strict=True):
        for attention in published.attentions(spatial, channel):
            loss = loss + class_loop_distance(attention(real_layer), attention(synthetic_layer), classes)
    return loss + MMD_WEIGHT * class_loop_distance(real_embedding, synthetic_embedding, classes)


def hooked_features(network: published.ConvNet, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Every ReLU's output, collected by hooks attached for this call, and the embedding."""
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
    """Squared distance of the class means of class-major [classes * B, D], one class after the other."""
    distance = synthetic.new_zeros(())
    for real_class, synthetic_class in zip(real.chunk(classes), synthetic.chunk(classes), strict=True):
        distance = distance + (real_class.mean(dim=0) - synthetic_class.mean(dim=0)).square().sum()
    return distance
