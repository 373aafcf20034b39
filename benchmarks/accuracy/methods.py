"""The methods of the paper's tables that this project runs: settings of its engine, or ways to choose real images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from atom_fast.distillation.config import PRESETS, DistillConfig, preset

# What tells methods apart: where a method says one of these, no override replaces it.
_LOSS = ("spatial_power", "channel_power", "feature_maps", "mmd_weight")


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method makes a set.

    Attributes:
        title: its name in the paper.
        preset: of `atom_fast.distillation.config.PRESETS`; None for a method that chooses real images.
        settings: what differs from the preset.
    """

    title: str
    preset: str | None = None
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def distils(self) -> bool:
        """Whether the images are learnt, not chosen."""
        return self.preset is not None


_NO_ATTENTION = {"spatial_power": None, "channel_power": None}

METHODS = {
    "random": Method("Random"),
    "herding": Method("Herding"),
    "k-center": Method("K-Center"),
    "forgetting": Method("Forgetting"),
    # As published, but for the norm, that of the networks it is tested on, and for what the command line overrides.
    "dm": Method("DM", "dm", {"norm": "auto"}),
    "dam": Method("DAM", "paper", {"channel_power": None}),
    "atom-channel": Method("ATOM†", "channel"),
    "atom": Method("ATOM", "paper"),
    # Table 4 compares losses, all else equal. Its first row is DM's figure, so DM's loss: alone, its weight is 1.
    "mmd": Method("MMD", "paper", {**_NO_ATTENTION, "mmd_weight": 1.0}),
    "feature-maps": Method("MMD + feature maps", "paper", {**_NO_ATTENTION, "feature_maps": True}),
    "full": Method("Full data set"),
}


def get_method(name: str) -> Method:
    """A method by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    return METHODS[name]


def configuration(name: str, ipc: int, seed: int, overrides: Mapping[str, object]) -> DistillConfig:
    """The settings that a method distils with; of one that chooses images, those of the networks it is tested on.

    Args:
        name: a key of ``METHODS``.
        ipc: images a class.
        seed: of the set.
        overrides: settings in place of the method's, but for the parts of its loss that define it: DAM has no channel
            attention, whatever ATOM's power is.

    Raises:
        ValueError: an unknown method or setting, or a value that is not accepted.
    """
    method = get_method(name)
    own = {**PRESETS[method.preset or "paper"], **method.settings}
    defining = {name: value for name, value in own.items() if name in _LOSS}
    settings = {**method.settings, **overrides, **defining, "ipc": max(ipc, 1), "seed": seed}
    return preset(method.preset or "paper", **settings)
