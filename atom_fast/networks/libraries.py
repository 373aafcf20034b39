"""Networks of timm and torchvision, to test sets on: unfused, with the number of classes and channels of the data."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from atom_fast.names import NETWORK_LIBRARIES
from atom_fast.networks.layers import Dropout

_drawing = threading.Lock()  # PyTorch's default generator, from which these networks draw, is one for all threads


class LibraryNetwork(nn.Module):
    """A network of another library, whose parameters and dropout are drawn from a generator.

    Args:
        name: "timm:NAME" or "torchvision:NAME".
        channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width in pixels; one number for a square. It is passed on to networks that have such a
            setting (transformers); others take the images as they are, through the stem they were published with.

    Raises:
        ImportError: the library is not installed.
        ValueError: an unknown name, or a network that does not take such images or returns no logits.
    """

    def __init__(self, name: str, channels: int, num_classes: int, image_size: int | tuple[int, int]):
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self._build = _builder(name, channels, num_classes, size)
        try:
            self.network = self._draw(0)
            with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
                logits = self.network.train()(torch.zeros(2, channels, *size))
            if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
                raise ValueError(
                    f"it returns {getattr(logits, 'shape', type(logits).__name__)}, not one logit per class"
                )
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{name} does not take images of {channels}x{size[0]}x{size[1]}: {reason}") from error

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, channels, H, W]."""
        return self.network(x)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new parameters in place, as the library initialises them, from ``generator``.

        From then on the masks of ``nn.Dropout`` also come from ``generator``; other randomness in training, such as
        stochastic depth, comes from PyTorch's default generator.
        """
        place = "cpu" if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=place).item()
        drawn = self._draw(int(seed)).state_dict()
        with torch.no_grad():
            for own_name, tensor in self.network.state_dict().items():
                tensor.copy_(drawn[own_name])
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generator = generator

    def _draw(self, seed: int) -> nn.Module:
        """Build the network on the CPU with parameters drawn from a seed; PyTorch's generators stay as they were."""
        with _drawing, torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            network = self._build()
        for parent in list(network.modules()):
            for child_name, child in parent.named_children():
                if type(child) is nn.Dropout:
                    setattr(parent, child_name, Dropout(child.p))
        return network


def _builder(name: str, channels: int, num_classes: int, size: tuple[int, int]) -> Callable[[], nn.Module]:
    library, _, model = name.partition(":")
    if library not in NETWORK_LIBRARIES:
        raise ValueError(f"a network's library must be one of {', '.join(NETWORK_LIBRARIES)}; got {name!r}")
    try:
        known, build = {"timm": _timm, "torchvision": _torchvision}[library](model, channels, num_classes, size)
    except ImportError as error:
        raise ImportError(f"network {name!r} is part of {library}: `pip install {library}`") from error
    if model not in known:
        near = difflib.get_close_matches(model, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{library} has no image classifier {model!r}{hint}")
    return build


def _timm(model: str, channels: int, num_classes: int, size: tuple[int, int]):
    import timm

    def build() -> nn.Module:
        settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
        try:
            return timm.create_model(model, pretrained=False, img_size=size, **settings)
        except TypeError:  # networks for images of any size have no such setting
            return timm.create_model(model, pretrained=False, **settings)

    return timm.list_models(), build


def _torchvision(model: str, channels: int, num_classes: int, size: tuple[int, int]):
    from torchvision import models

    def build() -> nn.Module:
        settings: dict[str, Any] = {"weights": None, "num_classes": num_classes}
        if model.startswith("vit_"):
            settings["image_size"] = size[0]
        if model in ("googlenet", "inception_v3"):
            settings |= {"aux_logits": False, "init_weights": True}
        network = models.get_model(model, **settings)
        return network if channels == 3 else _with_channels(network, channels)

    return models.list_models(module=models), build


def _with_channels(network: nn.Module, channels: int) -> nn.Module:
    """Give a network's first convolution another number of input channels."""
    name, first = next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    shape: Any = {"kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding}
    network.set_submodule(name, nn.Conv2d(channels, first.out_channels, **shape, bias=first.bias is not None))
    return network
