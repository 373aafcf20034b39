"""Networks that images are distilled with and evaluated on."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from atom_fast.names import NETWORK_LIBRARIES
from atom_fast.networks.alexnet import AlexNet
from atom_fast.networks.convnet import ConvNet, default_depth
from atom_fast.networks.libraries import LibraryNetwork
from atom_fast.networks.resnet import ResNet18
from atom_fast.networks.vgg import VGG11
from atom_fast.networks.vit import ViT

__all__ = ["NETWORKS", "AlexNet", "ConvNet", "ResNet18", "VGG11", "ViT", "convnet_search_space", "make_network"]

NETWORKS = {"convnet": ConvNet, "alexnet": AlexNet, "vgg11": VGG11, "resnet18": ResNet18, "vit": ViT}


def make_network(
    name: str, channels: int, num_classes: int, image_size: int | tuple[int, int], **settings
) -> nn.Module:
    """Make a network by its name; its ``reset_parameters(generator)`` draws new parameters.

    Args:
        name: a key of ``NETWORKS``, or "timm:NAME" or "torchvision:NAME" (`atom_fast.networks.libraries`).
        channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width in pixels; one number for a square.
        **settings: settings of :class:`ConvNet`, whose default depth is the usual one for the image size; the other
            networks have none.

    Raises:
        ImportError: the network's library is not installed.
        ValueError: an unknown name or setting, or an image size that the network does not accept.
    """
    if name.partition(":")[0] in NETWORK_LIBRARIES:
        if settings:
            raise ValueError(f"{name} has no setting {next(iter(settings))!r}; it has no settings")
        return LibraryNetwork(name, channels, num_classes, image_size)
    if name not in NETWORKS:
        libraries = ", ".join(f"{library}:NAME" for library in NETWORK_LIBRARIES)
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, {libraries}; got {name!r}")
    accepted = [p.name for p in inspect.signature(NETWORKS[name]).parameters.values() if p.kind == p.KEYWORD_ONLY]
    for setting in settings:
        if setting not in accepted:
            known = f"its settings are {', '.join(accepted)}" if accepted else "it has no settings"
            raise ValueError(f"{name} has no setting {setting!r}; {known}")
    if name == "convnet":
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        settings = {"depth": default_depth(*size), **settings}
    network: Any = NETWORKS[name]
    return network(channels, num_classes, image_size, **settings)


def convnet_search_space(widths: Sequence[int] = (32, 64, 128, 256)) -> Iterator[dict[str, object]]:
    """Yield the settings of the 720 ConvNets that the ATOM paper's Table 6 searches, for 32×32 images.

    Args:
        widths: channels to choose from; the default are the paper's.
    """
    choices = {
        "depth": (1, 2, 3, 4),
        "width": widths,
        "activation": ("sigmoid", "relu", "leakyrelu"),
        "norm": ("none", "batch", "layer", "instance", "group"),
        "pooling": ("none", "max2", "avg2"),
    }
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))
