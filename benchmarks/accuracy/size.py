"""The size of a run: sets, networks and settings, and how they differ from the paper's."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from atom_fast.distillation.config import affects_result, preset
from atom_fast.distillation.methods import is_used
from atom_fast.names import WATCHED_EPOCHS
from atom_fast.training.protocols import Protocol, default_protocol, get_protocol
from benchmarks.methods import configuration, get_method
from benchmarks.paper import NETWORKS, SETS

_OF_DM = ("iterations", "real_batch")  # settings for which DM has its own values
_OF_THE_CELL = {"seed": "--seeds", "ipc": "--cells"}  # settings that the cell defines, and the option that chooses them
SETS_NAME, NETWORKS_NAME = "sets per cell", "networks per set"

# Digits stand in for the paper's data where there is neither a GPU nor a download: small enough for minutes on a CPU.
# They have about 140 real images per class, and a mirrored digit is no digit.
_DIGITS = {
    "iterations": 200,
    "real_batch": 64,
    "width": 32,
    "augmentation": "color_crop_cutout_scale_rotate",
}
# What methods of another loss change for digits. Fewer steps take minutes at 10 images per class. At depth 3 the last
# norm sees 2x2 values, and what these methods learn through its gradient destroys the images. Learning rates are
# smaller: an image of fewer pixels has a larger gradient in each.
_GRADIENTS = {"depth": 2, "iterations": 30, "image_lr": 0.02}
_FEATURES = {"depth": 2, "iterations": 20}
_EXPERTS = {
    "depth": 2, "iterations": 150, "image_lr": 1.0, "student_steps": 12, "last_start": 10, "step_size": 0.01,
    "step_size_lr": 1e-6, "experts": 4,
}  # fmt: skip
_OF_METHODS = {
    "dc": {**_GRADIENTS, "iterations": 50, "image_lr": 0.1},
    "dsa": _GRADIENTS,
    "dcc": _GRADIENTS,
    "dsac": _GRADIENTS,
    "cafe": _FEATURES,
    "cafe-dsa": _FEATURES,
    "dd": {"depth": 2, "iterations": 200, "image_lr": 0.05},
    "ld": {"depth": 2, "iterations": 1000, "label_lr": 0.01},
    "mtt": _EXPERTS,
    "tesla": _EXPERTS,
    "frepo": {"iterations": 200, "image_lr": 1e-3},
}
_DIGITS_SIZES = {"digits": (3, 2), "digits32": (1, 1)}  # sets and networks
_DIGITS32 = {**_DIGITS, "iterations": 100, "real_batch": 32}
_DIGITS32_EPOCHS = 100


@dataclasses.dataclass(frozen=True)
class RunSize:
    """Size of a table or figure on one data set.

    Attributes:
        seeds: synthetic sets per cell, each from its own seed.
        networks: networks trained on each set.
        settings: distillation settings that replace the methods' own.
        protocol: key of ``PROTOCOLS``: how the networks are trained.
        epochs: epochs of that protocol; other protocols change in proportion. None leaves them unchanged.
        selection_epochs: training epochs of the network that herding, k-center and forgetting use.
        of_methods: by method, settings that replace its published ones, for methods other than ATOM and its relatives.
    """

    seeds: int = SETS
    networks: int = NETWORKS
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    protocol: str = "paper"
    epochs: int | None = None
    selection_epochs: int = WATCHED_EPOCHS
    of_methods: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("seeds", "networks", "epochs", "selection_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        for name, option in _OF_THE_CELL.items():
            if name in self.settings:
                raise ValueError(f"{name} is chosen by the cell; give {option} instead of --set {name}=")
        preset("paper", **self.settings)  # refuses unknown settings and values
        for method, own in self.of_methods.items():
            if get_method(method).loss == "matching":
                raise ValueError(f"{method} has the settings of the table; got {', '.join(own)} of its own")
            preset(method=get_method(method).loss, **own)

    def settings_of(self, method: str) -> dict[str, object]:
        """Return the settings that a method uses; methods of another loss have iterations and a norm of their own."""
        loss = get_method(method).loss
        own = {name: value for name, value in self.settings.items() if is_used(loss, name)}
        if loss != "matching":
            own = {name: value for name, value in own.items() if name not in ("iterations", "norm")}
        return own | dict(self.of_methods.get(method, {}))

    def training(self, protocol: str | None = None) -> Protocol:
        """Return the named protocol, by default this size's, with its epochs scaled."""
        own, wanted = get_protocol(self.protocol), get_protocol(protocol or self.protocol)
        if self.epochs is None:
            return wanted
        epochs = max(1, round(wanted.epochs * self.epochs / own.epochs))
        return get_protocol(wanted.name, epochs=epochs)

    def reductions(self, methods: Collection[str] = (), *, evaluated: bool = True) -> list[dict]:
        """Return every difference from the paper, without settings that change no image.

        Args:
            methods: those that are run; of others no settings are named.
            evaluated: include the number of sets and networks and the protocol.

        Returns:
            Dicts with ``name``, ``value``, ``usual`` (the paper's; None if it follows from the data) and, for settings
            of which DM has its own value, ``dm``. For settings of one method ``name`` is its title, and ``value`` and
            ``usual`` (the published ones) are dicts.
        """
        found = [*self._settings_changed(), *self._changed_of_methods(methods)]
        return [*self._fewer(), *found, *self._evaluation_changed()] if evaluated else found

    def _fewer(self) -> list[dict]:
        return _differing((SETS_NAME, self.seeds, SETS), (NETWORKS_NAME, self.networks, NETWORKS))

    def _settings_changed(self) -> list[dict]:
        paper, dm, found = preset("paper").to_dict(), preset("dm").to_dict(), []
        for name, value in self.settings.items():
            own = {"dm": dm[name]} if name in _OF_DM else {}
            if affects_result(name) and any(value != usual for usual in (paper[name], *own.values())):
                found.append({"name": name, "value": value, "usual": paper[name], **own})
        return found

    def _changed_of_methods(self, methods: Collection[str]) -> list[dict]:
        found = []
        for method, own in self.of_methods.items():
            if method not in methods:
                continue
            published = configuration(method, 1, 0, {}).to_dict()
            common = {name: value for name, value in self.settings.items() if name != "iterations"}  # of ATOM
            changed = {name: value for name, value in own.items() if value != common.get(name)}
            usual = {name: published[name] for name in changed}
            found.append({"name": get_method(method).title, "value": changed, "usual": usual})
        return found

    def _evaluation_changed(self) -> list[dict]:
        usual = get_protocol(self.protocol).epochs
        return _differing(
            ("evaluation protocol", self.protocol, "paper"),
            ("evaluation epochs", self.epochs or usual, usual),
            ("epochs before images are chosen", self.selection_epochs, WATCHED_EPOCHS),
        )


def _differing(*sizes: tuple[str, object, object]) -> list[dict]:
    return [{"name": name, "value": value, "usual": usual} for name, value, usual in sizes if value != usual]


def size_for(
    dataset: str,
    *,
    seeds: int | None = None,
    networks: int | None = None,
    settings: Mapping[str, object] | None = None,
    protocol: str | None = None,
    epochs: int | None = None,
    selection_epochs: int | None = None,
    of_methods: Mapping[str, Mapping[str, object]] | None = None,
) -> RunSize:
    """Return the paper's size, for digits a small one, with the given values replaced.

    Raises:
        ValueError: a number is below 1.
    """
    own_seeds, own_networks = _DIGITS_SIZES.get(dataset, (SETS, NETWORKS))
    reduced = {"digits": _DIGITS, "digits32": _DIGITS32}.get(dataset, {})
    return RunSize(
        seeds=own_seeds if seeds is None else seeds,
        networks=own_networks if networks is None else networks,
        settings={**reduced, **(settings or {})},
        protocol=protocol or ("digits" if reduced else default_protocol(dataset)),
        epochs=_DIGITS32_EPOCHS if epochs is None and dataset == "digits32" else epochs,
        selection_epochs=WATCHED_EPOCHS if selection_epochs is None else selection_epochs,
        of_methods=_merged(_OF_METHODS if reduced else {}, of_methods or {}),
    )


def _merged(
    first: Mapping[str, Mapping[str, object]], second: Mapping[str, Mapping[str, object]]
) -> dict[str, dict[str, object]]:
    """Return the settings by method of both; those of the second replace those of the first."""
    return {method: {**first.get(method, {}), **second.get(method, {})} for method in dict.fromkeys([*first, *second])}
