"""Protocols: how a network is trained on a synthetic set before it is tested, in the papers and their code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from atom_fast.names import STRATEGY, split_strategy, suggestion


def check_count(name: str, value: object, least: int = 1, *, optional: bool = False) -> None:
    """Check that a value is a whole number of at least ``least``, or None where it is optional.

    Raises:
        ValueError: it is not.
    """
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        accepted = f"a whole number, at least {least}" + (", or None" if optional else "")
        raise ValueError(f"{name} must be {accepted}; got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Settings of Protocol that the first records of evaluations do not have.
_YOUNGER = ("decay_at", "cutmix", "restart_momentum", "step_sizes")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Training of one network by SGD on a distilled set.

    Attributes:
        name: its name in results.
        epochs: passes over the set.
        batch_size: images per step; the last step of an epoch may have fewer.
        learning_rate: step size in the first epoch.
        momentum: of SGD.
        weight_decay: L2 penalty of SGD, on every parameter.
        decay_factor: factor on the learning rate at each decay; 1 keeps it fixed.
        decay_every: epochs between two decays; None decays after the shares ``decay_at`` of the epochs.
        augmentation: DSA operations joined by underscores, one drawn per mini-batch, and stages of them joined by "+";
            "none" for none.
        unit_variance: train and test on images in model space divided by the standard deviation of real images there.
            It is 1 except after whitening (0.25 for whitened CIFAR). DSA's brightness, up to half a unit of model
            space, assumes 1.
        decay_at: shares of the epochs, in (0, 1), after each of which the learning rate decays where ``decay_every`` is
            None.
        cutmix: probability of :mod:`CutMix <atom_fast.training.cutmix>` in a mini-batch, after the augmentation.
        restart_momentum: start SGD's momentum again at 0 whenever the learning rate decays, as in code that then makes
            a new optimizer.
        step_sizes: learning rate of each epoch of a set that was made for these steps (DD). An epoch is then a single
            step on one image of each class, in turn: ``batch_size`` is the number of classes.
    """

    name: str
    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    decay_factor: float
    decay_every: int | None
    augmentation: str
    unit_variance: bool = True
    decay_at: tuple[float, ...] = (0.5,)
    cutmix: float = 0.0
    restart_momentum: bool = False
    step_sizes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "decay_every"):
            check_count(name, getattr(self, name), optional=name == "decay_every")
        for name in ("learning_rate", "decay_factor"):
            if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"{name} must be a number above 0; got {getattr(self, name)!r}")
        if not _is_number(self.momentum) or not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be a number in [0, 1); got {self.momentum!r}")
        if not _is_number(self.weight_decay) or self.weight_decay < 0:
            raise ValueError(f"weight_decay must be a number, 0 or above; got {self.weight_decay!r}")
        for name in ("unit_variance", "restart_momentum"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; got {getattr(self, name)!r}")
        if not isinstance(self.augmentation, str):
            raise ValueError(f"augmentation must be text; got {self.augmentation!r}")
        split_strategy(self.augmentation)
        if not isinstance(self.decay_at, tuple) or not all(
            _is_number(share) and 0 < share < 1 for share in self.decay_at
        ):
            raise ValueError(f"decay_at must be a tuple of numbers between 0 and 1; got {self.decay_at!r}")
        if not isinstance(self.step_sizes, tuple) or not all(_is_number(rate) and rate > 0 for rate in self.step_sizes):
            raise ValueError(f"step_sizes must be a tuple of numbers above 0; got {self.step_sizes!r}")
        if self.step_sizes and len(self.step_sizes) != self.epochs:
            raise ValueError(f"epochs must be the number of step_sizes ({len(self.step_sizes)}); got {self.epochs}")
        if not _is_number(self.cutmix) or not 0 <= self.cutmix <= 1:
            raise ValueError(f"cutmix must be a number in [0, 1]; got {self.cutmix!r}")

    def to_dict(self) -> dict[str, object]:
        """Return the settings by name, as JSON values.

        A setting that is younger than the first records of evaluations is left out at its default: files and hashes
        made of these settings stay those of earlier versions.
        """
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        for field in dataclasses.fields(self):
            if field.name in _YOUNGER and getattr(self, field.name) == field.default:
                del settings[field.name]
        return settings

    def learning_rate_at(self, epoch: int) -> float:
        """Return the learning rate of ``epoch``, counted from 0."""
        if self.step_sizes:
            return self.step_sizes[epoch]
        if self.decay_every is None:
            decays = sum(epoch / self.epochs >= share for share in self.decay_at)
        else:
            decays = epoch // self.decay_every
        return self.learning_rate * self.decay_factor**decays


# The ATOM paper gives SGD, learning rate 0.01, momentum 0.9 and weight decay 5e-4 (Table 7), DSA (supplement), and two
# schedules that exclude each other; it gives neither epochs nor batch size. Those, and one decay after half of the
# epochs, are from the code whose protocol it says it follows (DSA and DM); all of it is also the protocol of DM's code.
_PAPER = Protocol(
    name="paper",
    epochs=1000,
    batch_size=256,
    learning_rate=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    decay_factor=0.1,
    decay_every=None,
    augmentation=STRATEGY,
)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _PAPER,
        # §4.1 of the ATOM paper: "a fixed learning rate of 0.01".
        dataclasses.replace(_PAPER, name="paper-fixed", decay_factor=1.0),
        # Table 7 of the ATOM paper: StepLR, rate 0.5, step size 15 epochs.
        dataclasses.replace(_PAPER, name="paper-table7", decay_factor=0.5, decay_every=15),
        # DC's code: 300 epochs; its ConvNets are trained without augmentation.
        dataclasses.replace(_PAPER, name="dc", epochs=300, augmentation="none"),
        # DataDAM's code: longer, with smaller batches.
        dataclasses.replace(_PAPER, name="datadam-code", epochs=1800, batch_size=64),
        # IDC (Kim et al. 2022), as its public code tests sets of CIFAR-10. DANCE and DSDM train like this for 1,500
        # epochs. Its flips come before its colours, which changes nothing.
        dataclasses.replace(
            _PAPER,
            name="idc",
            batch_size=64,
            decay_factor=0.2,
            decay_at=(2 / 3, 5 / 6),
            augmentation="color+flip+crop_scale_rotate",
            cutmix=0.5,
        ),
        # DD-Ranking 0.2.0, hard labels. It tests after each 10th epoch and reports the best of these accuracies, at the
        # rate of 0.001, 0.005, 0.01, 0.05 and 0.1 that is best on the test set, unless the set comes with its own. A
        # protocol has one rate, here the middle one (`get_protocol` takes another). The last epoch is reported;
        # ``evaluate_every=10`` keeps the best one too, as ``best_accuracies``.
        dataclasses.replace(_PAPER, name="ddranking", batch_size=128, unit_variance=False),
        # The dataset distillation contest at ECCV 2024: epochs 0 to 501 at 0.01, 502 to 1000 at 0.001 with a new
        # optimizer. It tests the mean of 3 ConvNets of depth 3 and width 128 with InstanceNorm.
        dataclasses.replace(
            _PAPER, name="eccv24", epochs=1001, decay_at=(502 / 1001,), restart_momentum=True, unit_variance=False
        ),
        # For handwritten digits: a mirrored digit is no digit. Up to 25 images per class an epoch is a single step; the
        # larger learning rate fits them in 300 steps as well as 0.01 does in 1000.
        dataclasses.replace(
            _PAPER, name="digits", epochs=300, learning_rate=0.03, augmentation="color_crop_cutout_scale_rotate"
        ),
    )
}


def get_protocol(name: str, **overrides) -> Protocol:
    """Return a protocol by name, with some settings replaced; its name then says which.

    Args:
        name: a key of ``PROTOCOLS``.
        **overrides: attributes of :class:`Protocol` and their values.

    Raises:
        ValueError: an unknown preset or setting, or a value that is not accepted.
    """
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {name!r}{suggestion(name, PROTOCOLS)}")
    preset = PROTOCOLS[name]
    settings = [field.name for field in dataclasses.fields(Protocol) if field.name != "name"]
    for setting in overrides:
        if setting not in settings:
            raise ValueError(f"a protocol's settings are {', '.join(settings)}; got {setting!r}")
    changed = {setting: value for setting, value in overrides.items() if value != getattr(preset, setting)}
    if not changed:
        return preset
    changes = ", ".join(f"{setting}={value}" for setting, value in changed.items())
    return dataclasses.replace(preset, name=f"{name} ({changes})", **changed)


def own_steps(step_sizes: Sequence[float], classes: int) -> Protocol:
    """Return the protocol of a set that was made for the steps of its own training (DD).

    Args:
        step_sizes: learning rate of each step.
        classes: their number, the images of a step.

    Raises:
        ValueError: a rate is not a number above 0.
    """
    rates = tuple(step_sizes)
    return Protocol(
        name=f"its own {len(rates)} steps", epochs=len(rates), batch_size=classes, learning_rate=rates[0], momentum=0.0,
        weight_decay=0.0, decay_factor=1.0, decay_every=None, augmentation="none", unit_variance=False,
        step_sizes=rates,
    )  # fmt: skip


def default_protocol(dataset: str) -> str:
    """Return the name of the protocol for a data set where none is given."""
    return "digits" if dataset == "digits" else "paper"
