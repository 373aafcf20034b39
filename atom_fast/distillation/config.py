"""Every setting of a distillation, with its unit and its source; presets, and configurations as files."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path

import torch

from atom_fast._device import check_bfloat16, has_tf32
from atom_fast._files import write_atomically
from atom_fast.data.augmentation import STRATEGY, draw_augmentation
from atom_fast.data.whitening import KINDS as PREPROCESSINGS
from atom_fast.networks.convnet import INITIALIZATIONS, NORMS, POOLINGS, default_depth

IMAGE_INITIALIZATIONS = ("real", "noise", "herding", "given")
PRECISIONS = ("float32", "tf32", "bfloat16")
# Settings that earlier versions wrote into files and that no image depended on: what holds them can still be read.
RETIRED = ("compile",)
# Settings that earlier versions did not have, and the value that does what those did: configurations of both are equal.
ADDED = {"image_average": False}

AUTO = "auto"  # how help shows a default of None that is derived from the data or from other settings

# MTT and DataDAM whiten CIFAR; the ATOM paper (section 7.2) does not whiten Tiny ImageNet, DM whitens nothing.
_WHITENED = ("cifar10", "cifar100")


def _setting(
    default,
    help: str,
    *,
    unit: str = "",
    unset: str = "",
    source: str = "",
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float = math.inf,
    affects_result: bool = True,
):
    metadata = {
        "help": help,
        "unit": unit,
        "unset": unset,
        "source": source,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "affects_result": affects_result,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Settings of Algorithm 1 of the ATOM paper; the defaults are the preset ``"paper"``.

    Each field's metadata says what it is (``help``), its ``unit``, what a default of None means (``unset``), where its
    default comes from (``source``), what is accepted (``choices``, ``minimum``, ``maximum``), and whether the images
    depend on it (``affects_result``). `resolve` derives what is ``"auto"`` or None by default from the data and the
    device.

    Raises:
        ValueError: a value is not accepted; the message names the setting, the value and what is.
    """

    ipc: int = _setting(1, "synthetic images per class", unit="per class", source="paper: 1, 10, 50", minimum=1)
    iterations: int = _setting(
        8000,
        "steps, each with a new network",
        unit="steps",
        source="paper section 4.1; DataDAM's code 20000",
        minimum=1,
    )
    real_batch: int = _setting(
        128,
        "real images per class per step; a smaller class repeats its images",
        unit="per class",
        source="paper section 7.3; DataDAM's code 64, DM 256",
        minimum=1,
    )
    spatial_power: float | None = _setting(
        4.0,
        "exponent p_s of spatial attention; none: no spatial attention",
        source="paper section 4.1; DataDAM's code 1",
        minimum=1,
        maximum=16,
    )
    channel_power: float | None = _setting(
        4.0,
        "exponent p_c of channel attention; none: no channel attention",
        source="paper section 4.1; Table 5's best is p_c 8 with p_s 1",
        minimum=1,
        maximum=16,
    )
    feature_maps: bool = _setting(
        False,
        "also match the feature maps themselves (equation 3 with z = vec(f))",
        source="paper Table 4, the ablation's second row; no part of ATOM",
    )
    mmd_weight: float | None = _setting(
        None,
        "weight lambda of the mean-embedding term; auto: 0.01 below 64x64, 0.02 from 64x64",
        unset=AUTO,
        source="paper Table 7",
        minimum=0,
    )
    # CIFAR-10 (JPEG q75, ZCA), 8000 steps on a GPU. InstanceNorm, 1 a class: 31.9, 32.9 and 32.2 % with scales 1, 10
    # and 100. BatchNorm and image_average, times ipc / 10: 57.2, 56.9 and 55.9 with 1, 3 and 10 at 10 a class, 66.2,
    # 66.7 and 66.5 at 50. The gradient of an image is that of its class's mean over ipc, hence that factor.
    loss_scale: float | None = _setting(
        None,
        "factor on the whole loss; with SGD a learning rate, since only loss_scale x image_lr counts. auto: 10; with "
        "BatchNorm 0.3 x ipc, or 0.03 x ipc above 50 images per class; without attention, the rate that embeddings "
        "have in ATOM",
        unset=AUTO,
        source="measured; the paper's equations have none (1), DataDAM's code 100",
        minimum=0,
    )
    image_lr: float | None = _setting(
        None,
        "learning rate of the images; auto: 1 up to 50 images per class, 10 above",
        unset=AUTO,
        source="paper Table 7",
        minimum=0,
    )
    momentum: float = _setting(0.5, "momentum of the images' SGD", source="paper Table 7", minimum=0, maximum=1)
    image_average: bool | None = _setting(
        None,
        "return a running average of the images, weighted towards later steps, instead of the last iterate; auto: with "
        "BatchNorm",
        unset=AUTO,
        source="Shamir and Zhang 2013, polynomial-decay averaging; no part of ATOM",
    )
    image_init: str = _setting(
        "real",
        "initial images: random real ones, Gaussian noise, real ones chosen by herding, or the set of --set",
        source="paper section 3: random sampling; DataDAM's code can start from a set that was chosen",
        choices=IMAGE_INITIALIZATIONS,
    )
    augmentation: str = _setting(
        STRATEGY,
        "operations of siamese augmentation, joined by underscores; each class draws one per step; 'none': no "
        "augmentation",
        source="paper section 7.2, DSA",
    )
    preprocessing: str = _setting(
        "auto",
        "map from pixels to model space; auto: zca for CIFAR, standard (mean and std) otherwise",
        source="paper section 7.2; DataDAM's code standardises and then whitens",
        choices=("auto", *PREPROCESSINGS),
    )
    width: int = _setting(128, "channels of every convolution", unit="channels", source="paper section 4.1", minimum=1)
    depth: int | None = _setting(
        None,
        "convolution blocks; auto: 3 up to 32x32, 4 at 64x64, one more per doubling",
        unset=AUTO,
        unit="blocks",
        source="paper section 4.1",
        minimum=1,
    )
    norm: str = _setting(
        "auto",
        "normalisation; auto: batch for CIFAR above one image per class, instance otherwise",
        source="measured: the paper says instance, but its figures are reached with batch, as in DataDAM's code",
        choices=("auto", *NORMS),
    )
    pooling: str = _setting(
        "avg2",
        "pooling: 2x2 mean, 3x3 mean with stride 2, 2x2 maximum, or none",
        source="the code of DC, DM and DataDAM; paper section 4.1 says avg3",
        choices=POOLINGS,
    )
    network_init: str = _setting(
        "auto",
        "distribution of the networks' weights; auto: default with batch norm, normal otherwise",
        source="paper section 4.1 normal, Table 7 uniform; DataDAM's code default, with batch norm",
        choices=("auto", *INITIALIZATIONS),
    )
    precision: str = _setting(
        "auto",
        "precision of the convolutions and of whitening on a GPU; everything else is float32. auto: tf32 on GPUs that "
        "have it, float32 elsewhere",
        choices=("auto", *PRECISIONS),
    )
    class_chunk: int | None = _setting(
        None,
        "classes per pass through the network: less memory, the same images to rounding; auto: all, or what "
        "memory_budget allows",
        unset=AUTO,
        unit="classes",
        minimum=1,
        affects_result=False,
    )
    memory_budget: str | None = _setting(
        None,
        "limit for the memory of a run's tensors, data included: bytes, a number with KB, MB or GB, or 'fit' for what "
        "is free; sets class_chunk; none: no limit",
        unset="no limit",
        affects_result=False,
    )
    seed: int = _setting(0, "seed of all random numbers", minimum=0, maximum=2**63 - 1)
    cuda_graph: bool = _setting(
        True, "on a GPU, capture a step once and replay it (same images, faster)", affects_result=False
    )
    deterministic: bool = _setting(
        False,
        "on a GPU, use only cuDNN algorithms that give the same bits every time: slower, but a resumed run then "
        "gives exactly the images of an uninterrupted one, as it always does on a CPU",
        affects_result=False,
    )
    log_every: int = _setting(10, "steps between records in the log", unit="steps", minimum=1, affects_result=False)
    image_every: int = _setting(
        500, "steps between pictures of the images", unit="steps", minimum=1, affects_result=False
    )
    checkpoint_every: int = _setting(500, "steps between checkpoints", unit="steps", minimum=1, affects_result=False)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _checked(field, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        draw_augmentation(0, torch.Generator(), strategy=self.augmentation)  # refuses what it does not know
        if self.memory_budget is not None:
            parse_budget(self.memory_budget)
            if self.class_chunk is not None:
                raise ValueError("give class_chunk or memory_budget, not both: the budget sets the chunk")
        if not self._matches_layers and self.mmd_weight == 0:
            raise ValueError("nothing to match: spatial_power and channel_power are None and mmd_weight is 0")

    @property
    def _matches_layers(self) -> bool:
        """Whether anything is matched beside the mean embeddings."""
        return self.feature_maps or self.spatial_power is not None or self.channel_power is not None

    def to_dict(self) -> dict[str, object]:
        """The settings by name, as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, object]) -> DistillConfig:
        """A configuration from settings by name; those not given have their defaults.

        Settings of earlier versions that no image depended on (``RETIRED``) are passed over.

        Raises:
            ValueError: a name is unknown (the nearest one is suggested), or a value is not accepted.
        """
        settings = _without_retired(settings)
        check_names(settings)
        return cls(**settings)

    def config_hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of the settings that the images depend on."""
        settings = {name: value for name, value in self.to_dict().items() if affects_result(name)}
        for name, unused in ADDED.items():
            if settings[name] == unused:
                del settings[name]
        canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def for_data(self, image_shape: tuple[int, int, int], dataset: str) -> DistillConfig:
        """The same configuration with what follows from the data put in; of what the images depend on, only the
        precision is left open.

        Args:
            image_shape: (C, H, W) of the data.
            dataset: its name, as in ``ImageData.name``.
        """
        height, width = image_shape[1:]
        norm = default_norm(dataset, self.ipc) if self.norm == "auto" else self.norm
        image_lr = 10.0 if self.ipc > 50 else 1.0
        mmd_weight = 0.02 if min(height, width) >= 64 else 0.01
        loss_scale = 10.0
        if norm == "batch":
            loss_scale = 3 * self.ipc / (10 * image_lr)
            if not self._matches_layers and self.mmd_weight is not None:
                loss_scale *= mmd_weight / self.mmd_weight
        return self._with(
            norm=norm,
            network_init=default_initialization(norm),
            loss_scale=loss_scale,
            mmd_weight=mmd_weight,
            image_lr=image_lr,
            image_average=norm == "batch",
            depth=default_depth(height, width),
            preprocessing="zca" if dataset in _WHITENED else "standard",
        )

    def resolve(self, image_shape: tuple[int, int, int], dataset: str, device: torch.device) -> DistillConfig:
        """The same configuration with nothing left open that the images depend on: no "auto", no None but a power's.

        ``class_chunk`` and ``memory_budget`` stay as they are; None means all classes at once, and no limit.

        Args:
            image_shape, dataset: as in `for_data`.
            device: where the distillation will run.

        Raises:
            ValueError: the device cannot compute in ``precision``.
        """
        resolved = self.for_data(image_shape, dataset)._with(precision="tf32" if has_tf32(device) else "float32")
        if resolved.precision == "tf32" and not has_tf32(device):
            raise ValueError(
                f"precision 'tf32' needs an NVIDIA GPU of compute capability 8.0 or above; got {device}. Use 'float32'"
            )
        if resolved.precision == "bfloat16":
            check_bfloat16(device)
        return resolved

    def _with(self, **derived) -> DistillConfig:
        """With these in place of settings that were left open."""
        missing = {name: value for name, value in derived.items() if getattr(self, name) in (None, "auto")}
        return dataclasses.replace(self, **missing)


def default_norm(dataset: str, ipc: int) -> str:
    """The norm that ``norm="auto"`` means: what comes closest to the paper's figures where that was measured.

    With one image a class a batch of synthetic images is too small for its statistics.

    Args:
        dataset: its name, as in ``ImageData.name``.
        ipc: images a class.
    """
    return "batch" if dataset in _WHITENED and ipc > 1 else "instance"


def default_initialization(norm: str) -> str:
    """The initial weights that ``network_init="auto"`` means: those that test better with that norm.

    Under BatchNorm a distillation hardly depends on them, but the networks that are tested learn faster from PyTorch's
    default, whose weights are smaller; under InstanceNorm it is the other way round.
    """
    return "default" if norm == "batch" else "normal"


# Settings in which papers and released code differ; what is not named is the paper's.
PRESETS: dict[str, dict[str, object]] = {
    "paper": {},
    "channel": {"spatial_power": None},
    "datadam-code": {
        "iterations": 20_000,
        "real_batch": 64,
        "spatial_power": 1.0,
        "channel_power": None,
        "loss_scale": 100.0,
        "preprocessing": "zca_standardized",
        "norm": "batch",
        "network_init": "default",
        "image_average": False,
    },
    "dm": {
        "iterations": 20_000,
        "real_batch": 256,
        "spatial_power": None,
        "channel_power": None,
        "mmd_weight": 1.0,
        "loss_scale": 1.0,
        "preprocessing": "standard",
        "norm": "instance",
        "network_init": "default",
        "image_average": False,
    },
}


def preset(name: str = "paper", **overrides) -> DistillConfig:
    """A named configuration with some settings changed.

    - ``"paper"``: ATOM.
    - ``"channel"``: ATOM†, channel attention only (Table 3).
    - ``"datadam-code"``: what DataDAM's released code runs, spatial attention only.
    - ``"dm"``: distribution matching (Zhao and Bilen 2023), mean embeddings only.

    Raises:
        ValueError: an unknown preset or setting, or a value that is not accepted.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}{_suggestion(name, PRESETS)}")
    check_names(overrides)
    return DistillConfig.from_dict({**PRESETS[name], **overrides})


def parse_budget(budget: str) -> int | None:
    """Bytes of a memory budget such as ``"600000000"`` or ``"600 MB"`` (a MB is 10^6 bytes); None for ``"fit"``.

    Raises:
        ValueError: it is neither, or not above 0.
    """
    if budget == "fit":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(KB|MB|GB|B)?\s*", budget, re.IGNORECASE)
    size = float(match[1]) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[(match[2] or "B").upper()] if match else 0
    if size < 1:
        raise ValueError(f"memory_budget must be 'fit', or bytes such as 600000000, '600 MB' or '2 GB'; got {budget!r}")
    return int(size)


def affects_result(name: str) -> bool:
    """Whether the distilled images depend on a setting."""
    return DistillConfig.__dataclass_fields__[name].metadata["affects_result"]


def check_names(settings: Mapping[str, object]) -> None:
    """Make sure that every name is a setting's.

    Raises:
        ValueError: one is not; the nearest setting is named.
    """
    known = [field.name for field in dataclasses.fields(DistillConfig)]
    for name in settings:
        if name not in known:
            hint = _suggestion(name, known) or f"; accepted are {', '.join(known)}"
            raise ValueError(f"unknown setting {name!r}{hint}")


def from_yaml(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings with what YAML reads as text as what it means: the words none and auto, and numbers such as 1e-3.

    Raises:
        ValueError: an unknown setting.
    """
    check_names(settings)
    hints = typing.get_type_hints(DistillConfig)
    fields = DistillConfig.__dataclass_fields__
    return {
        name: _meant(value, typing.get_args(hints[name]) or (hints[name],), fields[name].metadata["unset"])
        for name, value in settings.items()
    }


def _meant(value: object, accepted: tuple[type, ...], unset: str) -> object:
    if not isinstance(value, str):
        return value
    if type(None) in accepted and value.strip().lower() in ("none", unset):
        return None
    if float in accepted:
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _without_retired(settings: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name not in RETIRED}


def read_settings(path: str | os.PathLike) -> dict[str, object]:
    """Settings in a YAML file: a mapping of names to values, and perhaps the name of a ``preset``.

    Settings of earlier versions that no image depended on (``RETIRED``) are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML mapping of names to plain values, or names an unknown setting.
    """
    import yaml

    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; a run's settings are in its file {path / 'config.yaml'}")
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        text = path.read_text("utf-8")
        # Before anything is built: a few aliases can stand for gigabytes, and deep nesting takes quadratic time.
        nested = (yaml.CollectionStartEvent, yaml.AliasEvent)
        found = (event for event in yaml.parse(text, yaml.SafeLoader) if isinstance(event, nested))
        if next(found, None) is not None and next(found, None) is not None:
            raise ValueError("it must hold names and plain values, but holds a list, a mapping or an alias among them")
        settings = yaml.safe_load(text)
    except OSError:
        raise
    except Exception as error:  # PyYAML's constructors let every kind of error through: "!!bool x" is a KeyError
        raise ValueError(f"{path} is not readable as YAML: {error}") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings as `name: value` lines; got a {type(settings).__name__}")
    for name, value in settings.items():
        if not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"{path} must hold names and plain values; got {name!r}: {value!r}")
    based_on = {"preset": settings.pop("preset")} if "preset" in settings else {}
    return based_on | from_yaml(_without_retired(settings))


def read_config(path: str | os.PathLike) -> DistillConfig:
    """The configuration in a YAML file; what the file leaves out is its ``preset``'s, or the paper's.

    Raises:
        FileNotFoundError, ValueError: as `read_settings`, and for a value that is not accepted.
    """
    settings = read_settings(path)
    return preset(settings.pop("preset", "paper"), **settings)


def write_config(config: DistillConfig, path: str | os.PathLike, dataset: str = "") -> Path:
    """Write every setting to a YAML file that `read_config` reads back; ``dataset`` is named in a comment.

    Raises:
        OSError: the file could not be written.
    """
    import yaml

    of = f" of {dataset}" if dataset else ""
    text = f"# atom_fast distillation{of}, configuration {config.config_hash()}\n"
    return write_atomically(path, text + yaml.safe_dump(config.to_dict(), sort_keys=False))


def _checked(field: dataclasses.Field, hint: object, value: object) -> object:
    """``value`` in the field's type, if it is accepted."""
    accepted = typing.get_args(hint) or (hint,)
    if value is None and type(None) in accepted:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if float in accepted and number:
        value = float(value)
    if field.name == "memory_budget" and type(value) is int:  # as YAML reads 600000000
        value = str(value)
    expected = _expectation(field, accepted)
    if type(value) not in accepted:
        raise ValueError(f"{field.name} must be {expected}; got {value!r}")
    choices, minimum = field.metadata["choices"], field.metadata["minimum"]
    if type(value) is int and value >= 2**31 and field.metadata["maximum"] == math.inf:  # sizes overflow beyond
        raise ValueError(f"{field.name} must be {expected}, below 2**31; got {value}")
    if choices is not None and value not in choices:
        raise ValueError(f"{field.name} must be {expected}; got {value!r}{_suggestion(value, choices)}")
    if minimum is not None and not (minimum <= value <= field.metadata["maximum"] and math.isfinite(value)):
        raise ValueError(f"{field.name} must be {expected}; got {value!r}")
    return value


def _expectation(field: dataclasses.Field, accepted: tuple[type, ...]) -> str:
    """What a field accepts, in words."""
    if field.metadata["choices"] is not None:
        return f"one of {', '.join(field.metadata['choices'])}"
    kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    words = next(kinds[kind] for kind in accepted if kind in kinds)
    minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
    if minimum is not None:
        words += f" of at least {minimum}" if maximum == math.inf else f" in [{minimum}, {maximum}]"
    return words + (", or None" if type(None) in accepted else "")


def _suggestion(name: object, known) -> str:
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
