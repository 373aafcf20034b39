"""The methods of the paper's Table 3, one readable file each, as plain PyTorch and as this project runs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .setting import Setting

ONE_PROVIDER = ("eager",)
ALL_PROVIDERS = ("eager", "eager-batched", "compile", "fused", "fused-graph")


@dataclass(frozen=True)
class Method:
    """A row of Table 3.

    Attributes:
        title: as the paper prints it.
        module: file in this folder; its ``build(setting)`` returns a function that runs one step.
        providers: implementations it has.
        real_batch: real images a class in a step; 0 where the method uses none.
    """

    title: str
    module: str
    providers: tuple[str, ...]
    real_batch: int


METHODS = {
    "dc": Method("DC", "dc", ONE_PROVIDER, 256),
    "dsa": Method("DSA", "dsa", ONE_PROVIDER, 256),
    "dm": Method("DM", "dm", ALL_PROVIDERS, 256),
    "mtt": Method("MTT", "mtt", ONE_PROVIDER, 0),
    "dam": Method("DAM", "dam", ALL_PROVIDERS, 128),
    "atom-channel": Method("ATOM†", "atom_channel", ALL_PROVIDERS, 128),
    "atom": Method("ATOM", "atom", ALL_PROVIDERS, 128),
}


def build_step(setting: Setting) -> Callable[[], Tensor]:
    """Everything one cell needs, and a function that runs one step of it and returns the loss on the device.

    Raises:
        ValueError: the method, or the provider of that method, is not known.
    """
    check(setting.method, setting.provider)
    module = importlib.import_module(f".{METHODS[setting.method].module}", __package__)
    return module.build(setting)


def check(method: str, provider: str) -> None:
    """Raise ``ValueError`` unless the method exists and has the provider."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    providers = METHODS[method].providers
    if provider not in providers:
        raise ValueError(f"provider of {method} must be one of {', '.join(providers)}; got {provider!r}")
