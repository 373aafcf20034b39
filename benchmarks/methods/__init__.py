"""The methods of the paper's tables: how they make sets, and the steps that are timed for Table 3.

A timed method has a file in this folder with its published step in plain PyTorch. All have this project's step
too, and DM, DAM, ATOM† and ATOM an optimised one in plain PyTorch (``batched.py``).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping

from atom_fast.distillation.config import PRESETS, DistillConfig, preset
from atom_fast.distillation.methods import METHODS as LOSSES

from .workload import Workload

ALL_IMPLEMENTATIONS = ("eager", "eager-batched", "compile", "compile-graph", "fused", "fused-graph")
BI_LEVEL = ("eager", "fused")
AUTOTUNED = "compile-max-autotune"  # minutes of compilation: for ATOM alone
NEED_GPU = ("compile-graph", AUTOTUNED, "fused-graph")
# Settings that define a method's loss: no override replaces them where a method sets them.
_LOSS = ("spatial_power", "channel_power", "feature_maps", "mmd_weight")
_NO_ATTENTION = {"spatial_power": None, "channel_power": None}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the paper's tables.

    Attributes:
        title: name in the paper.
        preset: key of `atom_fast.distillation.config.PRESETS` that distils its sets; None if it distils none here.
        settings: differences from the preset.
        selects: True if its sets are chosen real images.
        module: file in this folder whose ``build(workload)`` returns a function that runs one step; "" if not timed.
        implementations: timed implementations of the step.
        real_batch: real images per class per step, as published; 0 if it uses none.
    """

    title: str
    preset: str | None = None
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    selects: bool = False
    module: str = ""
    implementations: tuple[str, ...] = ()
    real_batch: int = 0

    @property
    def distils(self) -> bool:
        """True if images or labels are learnt, False if images are chosen."""
        return self.preset is not None

    @property
    def loss(self) -> str:
        """What its sets are learnt by: ``DistillConfig.method``."""
        return str(self.settings.get("method", "matching"))

    @property
    def learns_labels(self) -> bool:
        """True if labels are learnt: such sets are ranked apart."""
        return self.loss != "matching" and LOSSES[self.loss].learns_labels


METHODS = {
    "random": Method("Random", selects=True),
    "herding": Method("Herding", selects=True),
    "k-center": Method("K-Center", selects=True),
    "forgetting": Method("Forgetting", selects=True),
    "dd": Method("DD", "paper", {"method": "dd"}),
    "ld": Method("LD", "paper", {"method": "ld"}),
    "dc": Method("DC", "paper", {"method": "dc"}, module="dc", implementations=BI_LEVEL, real_batch=256),
    "dcc": Method("DCC", "paper", {"method": "dcc"}),
    "dsa": Method("DSA", "paper", {"method": "dsa"}, module="dsa", implementations=BI_LEVEL, real_batch=256),
    "dsac": Method("DSAC", "paper", {"method": "dsac"}),
    # As published, except for the norm, which is the tested networks'.
    "dm": Method("DM", "dm", {"norm": "auto"}, module="dm", implementations=ALL_IMPLEMENTATIONS, real_batch=256),
    "cafe": Method("CAFE", "paper", {"method": "cafe"}),
    "cafe-dsa": Method("CAFE+DSA", "paper", {"method": "cafe-dsa"}),
    "mtt": Method("MTT", "paper", {"method": "mtt"}, module="mtt", implementations=BI_LEVEL),
    "tesla": Method("TESLA", "paper", {"method": "tesla"}),
    "frepo": Method("FRePo", "paper", {"method": "frepo"}),
    "dam": Method(
        "DAM", "paper", {"channel_power": None}, module="dam", implementations=ALL_IMPLEMENTATIONS, real_batch=128
    ),
    "atom-channel": Method(
        "ATOM†", "channel", module="atom_channel", implementations=ALL_IMPLEMENTATIONS, real_batch=128
    ),
    "atom": Method("ATOM", "paper", module="atom", implementations=(*ALL_IMPLEMENTATIONS, AUTOTUNED), real_batch=128),
    # Table 4 compares losses, all else equal. Its first row is DM's figure, so DM's loss: alone, its weight is 1.
    "mmd": Method("MMD", "paper", {**_NO_ATTENTION, "mmd_weight": 1.0}),
    "feature-maps": Method("MMD + feature maps", "paper", {**_NO_ATTENTION, "feature_maps": True}),
    "full": Method("Full data set", selects=True),
}
TIMED = {name: method for name, method in METHODS.items() if method.module}  # the rows of Table 3, in its order
MAKES_SETS = {name: method for name, method in METHODS.items() if method.distils or method.selects}


def build_step(workload: Workload) -> Callable[[], object]:
    """Prepare a workload; return a function that runs one step and returns its loss on the device.

    Raises:
        ValueError: the method is not timed, or has no such implementation.
    """
    if workload.method not in TIMED:
        raise ValueError(f"method must be one of {', '.join(TIMED)}; got {workload.method!r}")
    method = TIMED[workload.method]
    if workload.implementation not in method.implementations:
        raise ValueError(
            f"implementation of {workload.method} must be one of {', '.join(method.implementations)}; "
            f"got {workload.implementation!r}"
        )
    return importlib.import_module(f".{method.module}", __package__).build(workload)


def get_method(name: str) -> Method:
    """Return a method that makes sets.

    Raises:
        ValueError: no method that makes sets has this name.
    """
    if name not in MAKES_SETS:
        raise ValueError(f"method must be one of {', '.join(MAKES_SETS)}; got {name!r}")
    return MAKES_SETS[name]


def configuration(name: str, ipc: int, seed: int, overrides: Mapping[str, object]) -> DistillConfig:
    """Return the settings that a method distils with; for chosen images, the settings of the tested networks.

    Args:
        name: key of ``MAKES_SETS``.
        ipc: images per class.
        seed: seed of the set.
        overrides: settings that replace the method's, except those that define its loss: DAM has no channel attention,
            even if ATOM's power is overridden.

    Raises:
        ValueError: an unknown method or setting, or a value that is not accepted.
    """
    method = get_method(name)
    own = {**PRESETS[method.preset or "paper"], **method.settings}
    defining = {name: value for name, value in own.items() if name in _LOSS}
    settings = {**method.settings, **overrides, **defining, "ipc": max(ipc, 1), "seed": seed}
    return preset(method.preset or "paper", **settings)
