"""The methods that learn a set, and their published settings.

``"matching"`` is the step of ATOM, DAM and DM (`atom_fast.distillation.step`). Every other method has a file in this
folder with a class ``Learner``, a `Run`; methods that differ in a detail share one.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from atom_fast.data.dataset import ImageData
    from atom_fast.data.whitening import Preprocessing
    from atom_fast.distillation.config import DistillConfig
    from atom_fast.distillation.run import Run

# Settings of every method.
COMMON = frozenset((
    "method", "ipc", "iterations", "seed", "preprocessing", "width", "depth", "norm", "pooling", "network_init",
    "precision", "deterministic", "cuda_graph", "log_every", "image_every", "checkpoint_every",
))  # fmt: skip

# DC, DSA: (rounds, network_epochs) by images per class; between two sizes those of the smaller one.
_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}

# MTT by data set and images per class: student steps, epochs to the target, last start, learning rate of the images,
# learning rate of the step size, first step size, images per student step. (justincui03/dc_benchmark, from its author.)
_TRAJECTORIES = {
    "cifar10": {
        1: (50, 2, 2, 100.0, 1e-7, 0.01, None),
        10: (30, 2, 20, 100.0, 1e-5, 0.001, None),
        50: (30, 2, 40, 1000.0, 1e-5, 0.001, None),
    },
    "cifar100": {
        1: (20, 3, 20, 1000.0, 1e-5, 0.01, None),
        10: (20, 2, 20, 1000.0, 1e-5, 0.01, None),
        50: (80, 2, 40, 1000.0, 1e-5, 0.01, 125),
    },
    "tiny": {
        1: (10, 2, 10, 1e4, 1e-4, 0.01, None),
        10: (20, 2, 40, 1e4, 1e-4, 0.01, 200),
        50: (20, 2, 40, 1e4, 1e-4, 0.01, 300),
    },
}
_TRAJECTORY_SETTINGS = (
    "student_steps", "target_epochs", "last_start", "image_lr", "step_size_lr", "step_size", "student_batch",
)  # fmt: skip


def _of_size(table: Mapping[int, Any], ipc: int) -> Any:
    """Return the entry of the largest size up to ``ipc``."""
    return table[max(size for size in table if size <= ipc)]


def _rounds(ipc: int, dataset: str) -> dict[str, Any]:
    rounds, epochs = _of_size(_LOOPS, ipc)
    return {"image_lr": 0.1, "rounds": rounds, "network_epochs": epochs}


def _contrastive_rounds(ipc: int, dataset: str) -> dict[str, Any]:
    return _rounds(ipc, dataset) | ({"rounds": 10, "network_epochs": 5} if ipc < 10 else {})


def _trajectories(ipc: int, dataset: str) -> dict[str, Any]:
    sizes = _TRAJECTORIES.get(dataset, _TRAJECTORIES["cifar10"])
    return dict(zip(_TRAJECTORY_SETTINGS, _of_size(sizes, ipc), strict=True))


def _ridge_regression(ipc: int, dataset: str) -> dict[str, Any]:
    whitened = {"preprocessing": "zca_standardized"}
    # Digits at depth 3 have embeddings of as few values as there are channels: fewer than images.
    own = {"cifar10": whitened, "cifar100": whitened, "digits": {"depth": 2}}
    return {"image_lr": 3e-4, **own.get(dataset, {})}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        title: its name in tables.
        module: file in this folder with its ``Learner``.
        uses: its settings beside ``COMMON``.
        settings: its published settings where they differ from the paper's preset.
        by_size: from images per class and the data set's name to those that depend on them.
        learns_labels: True where labels are learnt: such sets are ranked apart.
    """

    title: str
    module: str
    uses: tuple[str, ...]
    settings: Mapping[str, Any]
    by_size: Callable[[int, str], dict[str, Any]] = lambda ipc, dataset: {}
    learns_labels: bool = False


_PUBLIC = {"preprocessing": "standard", "norm": "instance", "network_init": "default"}
_GRADIENTS = ("image_lr", "momentum", "image_init", "real_batch", "rounds", "network_epochs")
_TRAJECTORY = ("image_lr", "momentum", "image_init", "augmentation", "experts", *_TRAJECTORY_SETTINGS)
_FEATURES = ("image_lr", "momentum", "image_init", "real_batch")

# Names differ from modules where one file serves several methods.
METHODS: dict[str, Method] = {
    "dc": Method(
        "DC", "gradients", _GRADIENTS,
        {**_PUBLIC, "iterations": 1000, "real_batch": 256, "image_init": "noise", "augmentation": "none"}, _rounds,
    ),
    "dsa": Method(
        "DSA", "gradients", (*_GRADIENTS, "augmentation"), {**_PUBLIC, "iterations": 1000, "real_batch": 256}, _rounds,
    ),
    "dcc": Method(
        "DCC", "gradients", _GRADIENTS,
        {**_PUBLIC, "iterations": 1000, "real_batch": 256, "augmentation": "none"}, _contrastive_rounds,
    ),
    "dsac": Method(
        "DSAC", "gradients", (*_GRADIENTS, "augmentation"), {**_PUBLIC, "iterations": 1000, "real_batch": 256},
        _contrastive_rounds,
    ),
    "cafe": Method(
        "CAFE", "cafe", _FEATURES,
        {**_PUBLIC, "iterations": 2000, "real_batch": 256, "image_init": "noise", "augmentation": "none"},
        lambda ipc, dataset: {"image_lr": 0.1},
    ),
    "cafe-dsa": Method(
        "CAFE+DSA", "cafe", (*_FEATURES, "augmentation"),
        {**_PUBLIC, "iterations": 2000, "real_batch": 256, "image_init": "noise"},
        lambda ipc, dataset: {"image_lr": 0.1},
    ),
    "dd": Method(
        "DD", "dd", ("image_lr", "image_init", "student_steps", "step_size", "step_size_lr", "real_batch"),
        {**_PUBLIC, "iterations": 20_000, "real_batch": 102, "image_init": "noise", "augmentation": "none"},
        lambda ipc, dataset: {
            "image_lr": 0.01, "student_steps": max(30, 3 * ipc), "step_size": 0.001, "step_size_lr": 0.01,
        },
    ),
    "ld": Method(
        "LD", "labels", ("label_lr", "real_batch"),
        {**_PUBLIC, "iterations": 17_600, "real_batch": 102, "augmentation": "none"},
        lambda ipc, dataset: {"label_lr": 1e-3},
        learns_labels=True,
    ),
    "mtt": Method(
        "MTT", "trajectories", _TRAJECTORY, {**_PUBLIC, "iterations": 5000, "preprocessing": "auto"}, _trajectories,
    ),
    "tesla": Method(
        "TESLA", "trajectories", _TRAJECTORY, {**_PUBLIC, "iterations": 10_000, "preprocessing": "auto"}, _trajectories,
    ),
    # Published are 500,000 iterations, too many for a CPU; 1,024 real images a step of any class, which real_batch 10
    # comes close to with 100 classes and 5 with 200; whitening of standardised images, of Tiny ImageNet too.
    "frepo": Method(
        "FRePo", "frepo", ("image_lr", "real_batch"),
        {**_PUBLIC, "iterations": 20_000, "real_batch": 102, "preprocessing": "auto", "augmentation": "none"},
        _ridge_regression,
        learns_labels=True,
    ),
}  # fmt: skip


# Settings that only methods of this folder use.
OF_OTHERS = frozenset((
    "rounds", "network_epochs", "student_steps", "student_batch", "target_epochs", "last_start", "step_size",
    "step_size_lr", "experts", "label_lr",
))  # fmt: skip


def is_used(method: str, setting: str) -> bool:
    """Return True if a method depends on a setting."""
    if method == "matching":
        return setting not in OF_OTHERS
    return setting in COMMON or setting in METHODS[method].uses


def check_steps(config: DistillConfig) -> None:
    """Check resolved settings against one another.

    Raises:
        ValueError: DD has fewer steps than images per class, so that some images would never be used.
    """
    if config.method == "dd" and config.student_steps is not None and config.student_steps < config.ipc:
        raise ValueError(
            f"student_steps must be at least ipc ({config.ipc}), as dd uses one image per class in a step; got "
            f"{config.student_steps}"
        )


def make_run(
    config: DistillConfig, data: ImageData, preprocessing: Preprocessing, images: Tensor, *, progress: bool
) -> Run:
    """Prepare a run of a method of this folder.

    Args:
        config: resolved settings.
        data: the real images, on the device that computes.
        preprocessing: on the same device.
        images: float32 [K*ipc, C, H, W], the initial images in model space; copied.
        progress: show long preparations on standard error.
    """
    module: Any = importlib.import_module(f"{__name__}.{METHODS[config.method].module}")
    return module.Learner(config, data, preprocessing, images, progress=progress)
