"""Settings of a distillation: one schema for checks, files and the command line; presets."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pydantic

from atom_fast._files import write_atomically
from atom_fast.distillation.methods import METHODS, OF_OTHERS, check_steps, is_used
from atom_fast.names import (
    CONFIG_FILE,
    STRATEGY,
    Initialization,
    MethodName,
    Norm,
    Pooling,
    PreprocessingKind,
    split_strategy,
    suggestion,
)

if TYPE_CHECKING:
    import torch

_Class = TypeVar("_Class")

# MTT and DataDAM whiten CIFAR; the ATOM paper (section 7.2) does not whiten Tiny ImageNet, DM whitens nothing.
_WHITENED = ("cifar10", "cifar100")

# Settings that are arguments of `atom_fast.networks.ConvNet`, and the names that they have there.
CONVNET_SETTINGS = {
    "width": "width",
    "depth": "depth",
    "norm": "norm",
    "pooling": "pooling",
    "network_init": "initialization",
}

_SIZE = {"ge": 1, "lt": 2**31}  # larger sizes overflow 32-bit indices

# Settings that earlier versions lacked, whose defaults are what these versions did; left out of the hash there, so that
# runs and results of before keep theirs.
_ADDED = (
    "partition", "synthetic_batch", "pool_networks", "pool_epochs", "characteristic_weight", "calibration_weight",
    "easy_fraction", "real_precision", "method", *OF_OTHERS,
)  # fmt: skip

# Settings that earlier versions wrote and that are gone: the value that still means the same, and what to do instead.
_REMOVED = {
    "memory_budget": (None, "use class_chunk"),
}
_REMOVED_STARTS = {
    "herding": "choose the images with `atom-fast select --method herding` and start from them (--set)",
    "given": "start from the set with --set",
}


def _setting(
    default: Any, help: str, *, unit: str = "", source: str = "", affects_result: bool = True, **limits: float
) -> Any:
    """A field whose JSON schema also has its unit, the source of its default, and if the images depend on it."""
    extra = {"unit": unit, "source": source, "affects_result": affects_result}
    field: Any = pydantic.Field
    return field(default, description=help, json_schema_extra=extra, **limits)


def _plain(value: object) -> object:
    """Return NumPy's numbers as Python's; pydantic would take NumPy's True for a 1.0, and refuse its integers."""
    import numpy

    return value.item() if isinstance(value, numpy.generic) else value


def _explained(cls: type[_Class]) -> type[_Class]:
    """Make a pydantic class raise plain ValueErrors that name the setting, the value and what is accepted."""
    checked: Any = cls
    validate = checked.__init__

    @functools.wraps(validate)
    def __init__(self, **settings) -> None:
        check_names(settings)
        try:
            validate(self, **{name: _plain(value) for name, value in settings.items()})
        except pydantic.ValidationError as error:
            raise ValueError(_explanation(error.errors(include_url=False)[0])) from None

    checked.__init__ = __init__
    return cls


@_explained
@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))
class DistillConfig:
    """Settings of Algorithm 1 of the ATOM paper; the defaults are the preset ``"paper"``.

    ``SETTINGS`` describes each one. `resolve` derives what is ``"auto"``, or None by default, from the data and the
    device.

    Raises:
        ValueError: a name is unknown, or a value is not accepted; the message says what is.
    """

    method: MethodName = _setting(
        "matching",
        "what is learnt, and by which loss: matching of attention and embeddings (ATOM, DAM, DM), or another method "
        "with its published settings",
        source="atom_fast.distillation.methods",
    )
    ipc: int = _setting(1, "synthetic images per class", unit="per class", source="paper: 1, 10, 50", **_SIZE)
    iterations: int = _setting(
        8000,
        "steps, each with a new network",
        unit="steps",
        source="paper section 4.1; DataDAM's code 20000",
        **_SIZE,
    )
    real_batch: int = _setting(
        128,
        "real images per class per step; a smaller class repeats its images",
        unit="per class",
        source="paper section 7.3; DataDAM's code 64, DM 256",
        **_SIZE,
    )
    spatial_power: float | None = _setting(
        4.0,
        "exponent p_s of spatial attention; none: no spatial attention",
        source="paper section 4.1; DataDAM's code 1",
        ge=1,
        le=16,
    )
    channel_power: float | None = _setting(
        4.0,
        "exponent p_c of channel attention; none: no channel attention",
        source="paper section 4.1; Table 5's best is p_c 8 with p_s 1",
        ge=1,
        le=16,
    )
    feature_maps: bool = _setting(
        False,
        "also match the feature maps themselves (equation 3 with z = vec(f))",
        source="paper Table 4, the ablation's second row; no part of ATOM",
    )
    mmd_weight: float | None = _setting(
        None,
        "weight lambda of the mean-embedding term; auto: 0.01 below 64x64, 0.02 from 64x64",
        source="paper Table 7",
        ge=0,
    )
    # Measured on CIFAR-10 (JPEG q75, ZCA), 8000 steps on a GPU. InstanceNorm, ipc 1: 31.9, 32.9 and 32.2 % with scales
    # 1, 10 and 100. BatchNorm and image_average, scales 1, 3 and 10 times ipc / 10: 57.2, 56.9 and 55.9 % with ipc 10,
    # 66.2, 66.7 and 66.5 % with ipc 50. An image's gradient is its class mean's divided by ipc, hence the factor ipc.
    loss_scale: float | None = _setting(
        None,
        "factor on the whole loss; with SGD a learning rate, since only loss_scale x image_lr counts. auto: 10; with "
        "BatchNorm 0.3 x ipc, or 0.03 x ipc above 50 images per class; without attention, the rate that embeddings "
        "have in ATOM",
        source="measured; the paper's equations have none (1), DataDAM's code 100",
        ge=0,
    )
    image_lr: float | None = _setting(
        None,
        "learning rate of the images; auto: 1 up to 50 images per class, 10 above",
        source="paper Table 7",
        ge=0,
    )
    momentum: float = _setting(0.5, "momentum of the images' SGD", source="paper Table 7", ge=0, le=1)
    image_average: bool | None = _setting(
        None,
        "return a running average of the images, weighted towards later steps, instead of the last iterate; auto: with "
        "BatchNorm",
        source="Shamir and Zhang 2013, polynomial-decay averaging; no part of ATOM",
    )
    image_init: Literal["real", "noise"] = _setting(
        "real",
        "initial images where no set is given to start from: random real ones, or Gaussian noise",
        source="paper section 3: random sampling",
    )
    partition: int = _setting(
        1,
        "rows and columns of smaller images on each stored image, a sheet; they are enlarged before use, so that every "
        "stored image trains as partition^2 images. It must divide the sides; 1: none",
        source="IDC (Kim et al. 2022): 2 up to 64x64, 3 for larger images; no part of ATOM",
        **_SIZE,
    )
    synthetic_batch: int | None = _setting(
        None,
        "synthetic images per class per step, drawn from those on the sheets; auto: all of them",
        unit="per class",
        source="IDC's code: at most 128",
        **_SIZE,
    )
    pool_networks: int = _setting(
        0,
        "networks trained on the real images; a step draws one, at a random point between its initial and its trained "
        "weights. 0: every step draws new random weights",
        unit="networks",
        source="DANCE (Zhang et al. 2024): 5; NCFM: 20; no part of ATOM",
        ge=0,
        lt=2**31,
    )
    pool_epochs: int = _setting(
        20,
        "passes of these networks over the real images",
        unit="epochs",
        source="DANCE and NCFM: 60; DSDM: 20",
        **_SIZE,
    )
    characteristic_weight: float = _setting(
        0.0,
        "weight of the distance of the embeddings' characteristic functions, beside the attention loss",
        source="NCFM (Wang et al. 2025), which matches nothing else; no part of ATOM",
        ge=0,
    )
    calibration_weight: float = _setting(
        0.0,
        "weight of the cross-entropy of the synthetic images on the drawn network, beside the attention loss; needs "
        "pool_networks",
        source="DANCE, NCFM and IDM; no part of ATOM",
        ge=0,
    )
    easy_fraction: float = _setting(
        1.0,
        "share of each class's real images that are used, the easiest ones by the pool's scores; below 1 it needs "
        "pool_networks",
        source="PAD (Li et al. 2024): 0.5 at one image per class; no part of ATOM",
        gt=0,
        le=1,
    )
    rounds: int | None = _setting(
        None,
        "dc, dsa, dcc, dsac: steps of the images per network; auto: 1, 10 and 50 with 1, 10 and 50 images per class",
        unit="per network",
        source="DC's code",
        **_SIZE,
    )
    network_epochs: int | None = _setting(
        None,
        "dc, dsa, dcc, dsac: passes of the network over the synthetic images between two of these steps; auto: 1, 50 "
        "and 10 with 1, 10 and 50 images per class",
        unit="epochs",
        source="DC's code",
        **_SIZE,
    )
    student_steps: int | None = _setting(
        None,
        "mtt, tesla, dd: steps of a network on the synthetic images in an iteration; auto: by data set and ipc",
        unit="steps",
        source="MTT's author: CIFAR-10 50, 30 and 30 with 1, 10 and 50 images per class; DD 30, at least 3 x ipc",
        **_SIZE,
    )
    student_batch: int | None = _setting(
        None,
        "mtt, tesla: synthetic images in each of these steps; auto: all, or fewer where MTT's author does",
        unit="images",
        source="MTT's author: CIFAR-100 125 with 50 images per class",
        **_SIZE,
    )
    target_epochs: int | None = _setting(
        None,
        "mtt, tesla: epochs of an expert that the network has to follow; auto: by data set and ipc",
        unit="epochs",
        source="MTT's author: 2, CIFAR-100 with 1 image per class 3",
        **_SIZE,
    )
    last_start: int | None = _setting(
        None,
        "mtt, tesla: an iteration starts after one of an expert's first so many epochs; auto: by data set and ipc",
        unit="epochs",
        source="MTT's author: CIFAR-10 2, 20 and 40 with 1, 10 and 50 images per class",
        **_SIZE,
    )
    experts: int = _setting(
        100, "mtt, tesla: networks trained on the real images", unit="networks", source="MTT", **_SIZE
    )
    step_size: float | None = _setting(
        None,
        "mtt, tesla, dd: first value of the learnt learning rate of a network; auto: by data set and ipc",
        source="MTT's author: CIFAR-10 0.01, 0.001 and 0.001 with 1, 10 and 50 images per class; DD 0.001",
        gt=0,
    )
    step_size_lr: float | None = _setting(
        None,
        "mtt, tesla, dd: learning rate of that learning rate; auto: by data set and ipc",
        source="MTT's author: CIFAR-10 1e-7, 1e-5 and 1e-5 with 1, 10 and 50 images per class; DD 0.01",
        ge=0,
    )
    label_lr: float | None = _setting(
        None, "ld: learning rate of the labels; auto: 0.001", source="LD's code: Adam's default", ge=0
    )
    augmentation: str = _setting(
        STRATEGY,
        "operations of siamese augmentation, joined by underscores; each class draws one per step; 'none': no "
        "augmentation",
        source="paper section 7.2, DSA",
    )
    preprocessing: Literal["auto", PreprocessingKind] = _setting(
        "auto",
        "map from pixels to model space; auto: zca for CIFAR up to 64x64, standard (mean and std) otherwise. zca is "
        "refused for larger images",
        source="paper section 7.2; DataDAM's code standardises and then whitens",
    )
    width: int = _setting(128, "channels of every convolution", unit="channels", source="paper section 4.1", **_SIZE)
    depth: int | None = _setting(
        None,
        "convolution blocks; auto: 3 up to 32x32, 4 at 64x64, one more per doubling",
        unit="blocks",
        source="paper section 4.1",
        **_SIZE,
    )
    norm: Literal["auto", Norm] = _setting(
        "auto",
        "normalisation; auto: batch for CIFAR above one image per class, instance otherwise",
        source="measured: the paper says instance, but its figures are reached with batch, as in DataDAM's code",
    )
    pooling: Pooling = _setting(
        "avg2",
        "pooling: 2x2 mean, 3x3 mean with stride 2, 2x2 maximum, or none",
        source="the code of DC, DM and DataDAM; paper section 4.1 says avg3",
    )
    network_init: Literal["auto", Initialization] = _setting(
        "auto",
        "distribution of the networks' weights; auto: default with batch norm, normal otherwise",
        source="paper section 4.1 normal, Table 7 uniform; DataDAM's code default, with batch norm",
    )
    precision: Literal["auto", "float32", "tf32", "float16", "bfloat16"] = _setting(
        "auto",
        "precision of the convolutions and of whitening on a GPU; everything else is float32. float16 has the rounding "
        "error of tf32, bfloat16 three times as much. auto: tf32 on GPUs that have it, float32 elsewhere",
    )
    real_precision: Literal["float32", "tf32", "float16", "bfloat16"] | None = _setting(
        None,
        "precision of the real images' convolutions, of which only class means are used; auto: as precision",
    )
    class_chunk: int | None = _setting(
        None,
        "classes per pass through the network: fewer take less memory and give the same images to rounding; auto: all",
        unit="classes",
        **_SIZE,
        affects_result=False,
    )
    seed: int = _setting(0, "seed of all random numbers", ge=0, le=2**63 - 1)
    cuda_graph: bool = _setting(
        True, "on a GPU, capture a step once and replay it (same images, faster)", affects_result=False
    )
    deterministic: bool = _setting(
        False,
        "on a GPU, use only cuDNN algorithms that give the same bits every time: slower, but a resumed run then "
        "gives exactly the images of an uninterrupted one, as it always does on a CPU",
        affects_result=False,
    )
    log_every: int = _setting(10, "steps between records in the log", unit="steps", **_SIZE, affects_result=False)
    image_every: int = _setting(
        500, "steps between pictures of the images", unit="steps", **_SIZE, affects_result=False
    )
    checkpoint_every: int = _setting(500, "steps between checkpoints", unit="steps", **_SIZE, affects_result=False)

    @pydantic.field_validator("augmentation")
    @classmethod
    def _check_augmentation(cls, strategy: str) -> str:
        split_strategy(strategy)
        return strategy

    @pydantic.model_validator(mode="after")
    def _check_something_is_matched(self) -> DistillConfig:
        if self.method != "matching":
            return self
        if not self._matches_layers and self.mmd_weight == 0 and self.characteristic_weight == 0:
            raise ValueError(
                "nothing to match: spatial_power and channel_power are None, mmd_weight and characteristic_weight are 0"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_pool(self) -> DistillConfig:
        needing = {"calibration_weight": self.calibration_weight > 0, "easy_fraction": self.easy_fraction < 1}
        for name, needs in needing.items():
            if needs and self.pool_networks == 0:
                raise ValueError(
                    f"{name} {getattr(self, name):g} needs trained networks: give pool_networks, at least 1"
                )
        return self

    @property
    def precision_of_real(self) -> str:
        """Precision of the real images' convolutions: ``real_precision``, or else ``precision``."""
        return self.real_precision or self.precision

    @property
    def _matches_layers(self) -> bool:
        """True if anything is matched besides the mean embeddings."""
        return self.feature_maps or self.spatial_power is not None or self.channel_power is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name, as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> DistillConfig:
        """Build a configuration from settings by name; the others have their defaults.

        Raises:
            ValueError: as `DistillConfig` and `drop_removed_settings`.
        """
        return cls(**drop_removed_settings(settings))

    def convnet_settings(self) -> dict[str, Any]:
        """Return the settings of `atom_fast.networks.ConvNet` by its argument names."""
        return {argument: getattr(self, setting) for setting, argument in CONVNET_SETTINGS.items()}

    def config_hash(self) -> str:
        """Return the first 16 hex digits of the SHA-256 of the settings that the images depend on."""
        settings = {name: value for name, value in self.to_dict().items() if affects_result(name)}
        settings = {k: v for k, v in settings.items() if k not in _ADDED or v != SETTINGS[k]["default"]}
        canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def for_data(self, image_shape: tuple[int, int, int], dataset: str) -> DistillConfig:
        """Return this configuration with everything derived that follows from the data.

        Of the settings that the images depend on, only ``precision`` may still be ``"auto"``.

        Args:
            image_shape: (C, H, W) of the data.
            dataset: name of the data set, as in ``ImageData.name``.
        """
        from atom_fast.data.whitening import can_whiten
        from atom_fast.networks.convnet import default_depth

        height, width = image_shape[1:]
        preprocessing = "zca" if dataset in _WHITENED and can_whiten(image_shape) else "standard"
        common = {"depth": default_depth(height, width), "preprocessing": preprocessing}
        if self.method != "matching":
            norm = "instance" if self.norm == "auto" else self.norm
            own = METHODS[self.method].by_size(self.ipc, dataset)
            return self._derive(norm=norm, network_init=default_initialization(norm), **(common | own))
        norm = default_norm(dataset, self.ipc) if self.norm == "auto" else self.norm
        image_lr = 10.0 if self.ipc > 50 else 1.0
        mmd_weight = 0.02 if min(height, width) >= 64 else 0.01
        loss_scale = 10.0
        if norm == "batch":
            loss_scale = 3 * self.ipc / (10 * image_lr)
            if not self._matches_layers and self.mmd_weight is not None:
                loss_scale *= mmd_weight / self.mmd_weight
        return self._derive(
            norm=norm,
            network_init=default_initialization(norm),
            loss_scale=loss_scale,
            mmd_weight=mmd_weight,
            image_lr=image_lr,
            image_average=norm == "batch",
            **common,
        )

    def resolve(self, image_shape: tuple[int, int, int], dataset: str, device: torch.device) -> DistillConfig:
        """Return this configuration with every setting decided that the images depend on.

        No ``"auto"`` is left. None stays for powers that are left out, and for settings whose default it is:
        ``class_chunk``, ``synthetic_batch`` and ``real_precision``.

        Args:
            image_shape, dataset: as in `for_data`.
            device: where the distillation will run.

        Raises:
            ValueError: the device cannot compute in ``precision`` or ``real_precision``, the images are too large for
                ``preprocessing``, or a setting is not one of the method's (`check_method`).
        """
        from atom_fast._device import check_precision, has_tf32
        from atom_fast.data.whitening import check_whitening

        check_method(self)
        resolved = self.for_data(image_shape, dataset)._derive(precision="tf32" if has_tf32(device) else "float32")
        check_steps(resolved)
        check_precision(resolved.precision, device)
        check_precision(resolved.precision_of_real, device)
        check_whitening(resolved.preprocessing, image_shape)
        return resolved

    def _derive(self, **derived) -> DistillConfig:
        """Replace settings that are still open, and only these."""
        missing = {name: value for name, value in derived.items() if getattr(self, name) in (None, "auto")}
        return dataclasses.replace(self, **missing)


def _described() -> dict[str, dict[str, Any]]:
    properties = pydantic.TypeAdapter(DistillConfig).json_schema()["properties"]
    for name, described in properties.items():
        accepted = described.pop("anyOf", [])
        properties[name] = {"nullable": bool(accepted), **(accepted[0] if accepted else {}), **described}
    return properties


#: Every setting in the terms of JSON Schema: ``type`` ("integer", "number", "string" or "boolean"), ``nullable``,
#: ``default``, ``description``, ``enum``, ``minimum``, ``maximum`` where they apply, ``unit``, ``source``,
#: ``affects_result``.
SETTINGS: dict[str, dict[str, Any]] = _described()


def affects_result(name: str) -> bool:
    """True if the distilled images depend on a setting."""
    return SETTINGS[name]["affects_result"]


def default_norm(dataset: str, ipc: int) -> str:
    """Return the norm that ``norm="auto"`` means: the one closest to the paper's figures where that was measured.

    With one image per class a batch of synthetic images is too small for its statistics.

    Args:
        dataset: name of the data set, as in ``ImageData.name``.
        ipc: images per class.
    """
    return "batch" if dataset in _WHITENED and ipc > 1 else "instance"


def default_initialization(norm: str) -> str:
    """Return the initial weights that ``network_init="auto"`` means: the ones that test better with the norm.

    Under BatchNorm a distillation hardly depends on them, but the networks that are tested learn faster from PyTorch's
    default, whose weights are smaller; under InstanceNorm it is the other way round.
    """
    return "default" if norm == "batch" else "normal"


# Settings in which papers and released code differ, and what reaches further; settings not named are the paper's.
PRESETS: dict[str, dict[str, Any]] = {
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
    # By hand: one set each, no results file.
    # Chosen on CIFAR-10 (JPEG q75) at 1 and 10 images per class, width 32, 300 steps, by test accuracy; 50 is not
    # tuned. At 10 images per class, InstanceNorm: partition 38.8 % (without 30.4), with a pool of 3 networks 39.5,
    # with cross-entropy at weight 0.1 42.9, with characteristic functions at weight 3 44.9, with weights of 0.3 and
    # 10 46.4; the last with BatchNorm 48.5. On top of the 46.4 no attention gave 46.5, and real batches of one image
    # per cluster (DREAM, Liu et al. 2023) 46.3; on top of the cross-entropy alone the channels' covariances (IID,
    # Deng et al. 2024) gave 43.0. Sheets of whitened images are worse than whole ones: 36.3 for 43.0 with BatchNorm.
    # At 1 image per class the easiest half of the real images gave 32.3 instead of 27.5.
    "best": {
        "partition": 2,
        "pool_networks": 5,
        "pool_epochs": 20,
        "characteristic_weight": 10.0,
        "calibration_weight": 0.3,
        "norm": "auto",
        "network_init": "auto",
        "image_average": None,
        "preprocessing": "standard",
        "real_batch": 64,
    },
}


def preset(name: str = "paper", **overrides: Any) -> DistillConfig:
    """Build a named configuration with some settings changed.

    - ``"paper"``: ATOM.
    - ``"channel"``: ATOM†, channel attention only (Table 3).
    - ``"datadam-code"``: the settings of DataDAM's released code, spatial attention only.
    - ``"dm"``: distribution matching (Zhao and Bilen 2023), mean embeddings only.
    - ``"best"``: the highest accuracy known to this project; not the paper's method. ATOM's loss with a partition, a
      pool of trained networks, their cross-entropy and characteristic functions.

    Another ``method`` than matching takes its own published settings (`atom_fast.distillation.methods.METHODS`) in the
    place of a preset's.

    Raises:
        ValueError: an unknown preset or setting, a preset of another method, or a value that is not accepted.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}{suggestion(name, PRESETS)}")
    method = overrides.get("method", "matching")
    if method in METHODS and name != "paper":
        raise ValueError(f"the preset {name!r} is for the method 'matching'; method {method!r} has its own settings")
    return DistillConfig(**{**preset_settings(name, overrides.get("ipc", 1)), **_published(method), **overrides})


def _published(method: object) -> Mapping[str, Any]:
    """Return the published settings of a method that has a loss of its own; none of another."""
    return METHODS[method].settings if isinstance(method, str) and method in METHODS else {}


def check_method(config: DistillConfig) -> None:
    """Check that every setting that was changed is one that the method uses, and that its networks have a norm it can.

    Raises:
        ValueError: one is not; the message names it.
    """
    own = _published(config.method)
    for name, setting in SETTINGS.items():
        value, default = getattr(config, name), own.get(name, setting["default"])
        if value != default and not is_used(config.method, name):
            raise ValueError(f"method {config.method!r} has no {name}; got {value!r}: leave it at {default!r}")
    if config.method in METHODS and config.norm == "batch":
        raise ValueError(f"method {config.method!r} needs a norm of each sample; got 'batch': use instance")


def preset_settings(name: str, ipc: object) -> dict[str, Any]:
    """Return the settings of the preset ``name`` for ``ipc`` images per class that differ from the paper's."""
    settings = dict(PRESETS[name])
    if name == "best" and ipc == 1:
        settings["easy_fraction"] = 0.5
    if name == "best" and isinstance(ipc, int) and ipc > 32:
        settings["synthetic_batch"] = 128  # IDC's limit: a step's time grows with the images of a class
    return settings


def check_names(settings: Mapping[str, object]) -> None:
    """Check that every name is a setting.

    Raises:
        ValueError: one is not; the nearest setting is named.
    """
    for name in settings:
        if name not in SETTINGS:
            hint = suggestion(name, SETTINGS) or f"; accepted are {', '.join(SETTINGS)}"
            raise ValueError(f"unknown setting {name!r}{hint}")


def drop_removed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that an earlier version wrote without the ones that are gone.

    Raises:
        ValueError: one of these has a value that this version cannot honour; the message says what to do instead.
    """
    kept = dict(settings)
    for name, (default, instead) in _REMOVED.items():
        if kept.pop(name, default) != default:
            raise ValueError(f"the setting {name} ({settings[name]!r}) is gone; {instead}")
    start = kept.get("image_init")
    if isinstance(start, str) and start in _REMOVED_STARTS:
        raise ValueError(f"image_init {start!r} is gone; {_REMOVED_STARTS[start]}")
    return kept


def from_yaml(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Interpret text that YAML leaves as text: the words none and auto, and numbers such as 1e-3.

    Raises:
        ValueError: an unknown setting.
    """
    check_names(settings)
    return {name: _interpreted(value, SETTINGS[name]) for name, value in settings.items()}


def _interpreted(value: object, setting: Mapping[str, Any]) -> object:
    if not isinstance(value, str):
        return value
    if setting["nullable"] and value.strip().lower() in ("none", none_word(setting)):
        return None
    if setting.get("type") == "number":
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def none_word(setting: Mapping[str, Any]) -> str:
    """Return what None is called: ``auto`` where it is the default and derived, ``none`` where it leaves a part out."""
    return "auto" if setting["default"] is None else "none"


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """Read a YAML file of settings: a mapping of names to values, and perhaps the name of a ``preset``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML mapping of names to plain values, or names a setting that is unknown, repeated
            or gone (`drop_removed_settings`).
    """
    import yaml

    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; a run's settings are in its file {path / CONFIG_FILE}")
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        text = path.read_text("utf-8")
        # Before anything is built: a few aliases can stand for gigabytes, and deep nesting takes quadratic time.
        nested = (yaml.CollectionStartEvent, yaml.AliasEvent)
        found = (event for event in yaml.parse(text, yaml.SafeLoader) if isinstance(event, nested))
        if next(found, None) is not None and next(found, None) is not None:
            raise ValueError("it must hold names and plain values, but holds a list, a mapping or an alias among them")
        _check_repeated(yaml.compose(text, yaml.SafeLoader))
        settings = yaml.safe_load(text)
    except OSError:
        raise
    except yaml.MarkedYAMLError as error:  # its text has several lines
        mark = error.problem_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{path} is not readable as YAML: {error.problem or error.context}{where}") from error
    except Exception as error:  # PyYAML's constructors let every kind of error through: "!!bool x" is a KeyError
        raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings as `name: value` lines; got a {type(settings).__name__}")
    for name, value in settings.items():
        if not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"{path} must hold names and plain values; got {name!r}: {value!r}")
    based_on = {"preset": settings.pop("preset")} if "preset" in settings else {}
    return based_on | from_yaml(drop_removed_settings(settings))


def _check_repeated(node: Any) -> None:
    """Refuse a name that a YAML mapping holds twice; YAML's loader would silently take the last."""
    names = [name.value for name, _ in node.value] if getattr(node, "id", "") == "mapping" else []
    repeated = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if repeated is not None:
        raise ValueError(f"it holds {repeated!r} twice")


def read_config(path: str | os.PathLike) -> DistillConfig:
    """Read a configuration from a YAML file; settings not in the file are its ``preset``'s, or the paper's.

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


def _explanation(error: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors."""
    if error["type"] == "value_error":  # from a validator of DistillConfig
        return str(error["ctx"]["error"])
    name, value = error["loc"][0], error["input"]
    setting = SETTINGS[name]
    below = ", below 2**31" if error["type"] == "less_than" else ""
    choices = setting.get("enum", ())
    return f"{name} must be {_accepted(setting)}{below}; got {value!r}{suggestion(value, choices)}"


def _accepted(setting: Mapping[str, Any]) -> str:
    """Describe in words what a setting accepts."""
    if "enum" in setting:
        return f"one of {', '.join(setting['enum'])}" + (", or None" if setting["nullable"] else "")
    words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    text = words[setting["type"]]
    if "maximum" in setting and "minimum" in setting:
        text += f" in [{setting['minimum']}, {setting['maximum']}]"
    elif "minimum" in setting:
        text += f" of at least {setting['minimum']}"
    elif "exclusiveMinimum" in setting:
        text += f" above {setting['exclusiveMinimum']}"
    return text + (", or None" if setting["nullable"] else "")
