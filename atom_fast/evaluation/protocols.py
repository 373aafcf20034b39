"""How a network is trained on a distilled set before it is tested: the protocols of the papers, by name."""

from __future__ import annotations

import dataclasses

import torch

from atom_fast.data.augmentation import STRATEGY, draw_augmentation


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Training of one network by SGD on a distilled set.

    Attributes:
        name: what the protocol is called in results.
        epochs: passes over the distilled set.
        batch_size: images a step; the last step of an epoch takes what is left.
        learning_rate: step size at the start.
        momentum: of SGD.
        weight_decay: L2 penalty of SGD, on every parameter.
        decay_factor: what the learning rate is multiplied by at each decay; 1 keeps it fixed.
        decay_every: epochs between two decays; None decays once, after half of the epochs.
        augmentation: DSA operations joined by underscores, one drawn for each mini-batch; "none" for none.
        unit_variance: `evaluate` trains and tests on images in model space divided by the standard deviation that real
            ones have there. Only whitening leaves another than 1, which is what DSA's brightness, up to half a unit of
            model space, was set for: whitened CIFAR images have 0.25.
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

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "decay_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
        for name in ("learning_rate", "decay_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {self.momentum!r}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or above; got {self.weight_decay!r}")
        draw_augmentation(0, torch.Generator(), strategy=self.augmentation)  # raises where a name is unknown

    def learning_rate_at(self, epoch: int) -> float:
        """The learning rate during ``epoch``, counted from 0."""
        if self.decay_every is None:
            decays = int(2 * epoch >= self.epochs)
        else:
            decays = epoch // self.decay_every
        return self.learning_rate * self.decay_factor**decays


# The ATOM paper gives SGD, learning rate 0.01, momentum 0.9 and weight decay 5e-4 (Table 7), DSA (supplement), and two
# schedules that exclude each other; it gives neither epochs nor batch size. Those, and one decay after half of the
# epochs, are from the code that it says its protocol follows (DSA and DM).
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
        # DM's code: every setting of "paper" is this one's.
        dataclasses.replace(_PAPER, name="dm"),
        # DataDAM's code: longer, with smaller batches.
        dataclasses.replace(_PAPER, name="datadam-code", epochs=1800, batch_size=64),
        # For handwritten digits, where a mirrored image is no digit. Up to 25 images a class an epoch is a single step;
        # the larger learning rate fits them in 300 of these as well as 0.01 does in 1000.
        dataclasses.replace(
            _PAPER, name="digits", epochs=300, learning_rate=0.03, augmentation="color_crop_cutout_scale_rotate"
        ),
    )
}


def get_protocol(name: str, **overrides) -> Protocol:
    """A preset, with some of its settings replaced; the name then says which.

    Args:
        name: a key of ``PROTOCOLS``.
        **overrides: attributes of :class:`Protocol` and their values.

    Raises:
        ValueError: an unknown preset or setting, or a value that is not accepted.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {name!r}")
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
