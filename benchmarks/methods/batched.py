"""DM, DAM, ATOM† and ATOM without a loop over classes in optimised plain PyTorch, eager and compiled.

The same step as ``eager``, entirely on the device: the data set is uint8, all classes are sampled, augmented, embedded
and matched together, the network is redrawn in place, the real side runs under ``no_grad``. ``compile`` applies
``torch.compile`` to everything from the augmentation to the loss, and its backward; ``compile-graph`` also captures
both as CUDA graphs, and ``compile-max-autotune`` before that times the alternatives of every kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import published
from .batched_augmentation import augment, draw
from .workload import Workload

MODES = {"compile": "default", "compile-graph": "reduce-overhead", "compile-max-autotune": "max-autotune"}
IMPLEMENTATIONS = ("eager-batched", *MODES)


def build(workload: Workload, *, spatial: bool, channel: bool, mmd_weight: float) -> Callable[[], Tensor]:
    """Return a function that runs one step and returns its loss."""
    pixels = published.random_pixels(workload)
    generator = torch.Generator(workload.device).manual_seed(workload.seed)
    images = published.normalize(_sample(workload, pixels, workload.ipc, generator)).requires_grad_(True)
    optimizer = published.image_optimizer(images, published.matching_rate(workload.ipc))
    network = published.fresh_network(workload)

    def objective(real: Tensor, synthetic: Tensor, operations: Tensor, uniforms: Tensor) -> Tensor:
        real = augment(published.normalize(real), operations, uniforms)
        synthetic = augment(synthetic, operations, uniforms)
        return matching_loss(network, real, synthetic, workload.classes, spatial, channel, mmd_weight)

    if workload.implementation in MODES:
        objective = torch.compile(objective, dynamic=False, mode=MODES[workload.implementation])

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last replay wrote may be overwritten
        redraw(network, generator)
        real = _sample(workload, pixels, workload.real_batch, generator)
        with autocast(workload):
            loss = objective(real, images, *draw(workload.classes, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach().clone()  # out of the graph's memory

    return step


def autocast(workload: Workload) -> torch.autocast:
    """Return the context of the workload's precision: bfloat16 products or none."""
    return torch.autocast(workload.device, dtype=torch.bfloat16, enabled=workload.precision == "bfloat16")


def matching_loss(
    network: published.ConvNet,
    real: Tensor,
    synthetic: Tensor,
    classes: int,
    spatial: bool,
    channel: bool,
    mmd_weight: float,
) -> Tensor:
    """Return equation 4 of the paper over class-major batches [classes * B, C, H, W], all classes at once."""
    with torch.no_grad():
        real_features, real_embedding = features(network, real)
    synthetic_features, synthetic_embedding = features(network, synthetic)
    loss = mmd_weight * class_distance(real_embedding, synthetic_embedding, classes)
    for real_layer, synthetic_layer in zip(real_features[:-1], synthetic_features[:-1], strict=True):
        for attention in published.attentions(spatial, channel):
            loss = loss + class_distance(attention(real_layer), attention(synthetic_layer), classes)
    return loss


def features(network: published.ConvNet, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return every ReLU's output, and the embedding."""
    maps = []
    for layer in network.blocks:
        images = layer(images)
        if isinstance(layer, torch.nn.ReLU):
            maps.append(images)
    return maps, images.flatten(1)


def class_distance(real: Tensor, synthetic: Tensor, classes: int) -> Tensor:
    """Return the squared distance of the class means of class-major [classes * B, D]."""
    real_means = real.float().unflatten(0, (classes, -1)).mean(dim=1)
    synthetic_means = synthetic.float().unflatten(0, (classes, -1)).mean(dim=1)
    return (real_means - synthetic_means).square().sum()


@torch.no_grad()
def redraw(network: published.ConvNet, generator: torch.Generator) -> None:
    """Redraw the network's weights in place from PyTorch's default distribution."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            bound = layer.weight[0].numel() ** -0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)


def _sample(workload: Workload, pixels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` different uint8 images of every class, class-major."""
    keys = torch.rand(workload.classes, workload.class_images, device=pixels.device, generator=generator)
    chosen = keys.argsort(dim=1)[:, :count]
    first = torch.arange(workload.classes, device=pixels.device).unsqueeze(1) * workload.class_images
    return pixels[(chosen + first).flatten()]
