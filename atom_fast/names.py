"""The names that settings accept, without an import of PyTorch: the command line answers ``--help`` from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

Norm = Literal["instance", "batch", "layer", "group", "none"]
Pooling = Literal["avg2", "avg3", "max2", "none"]
Initialization = Literal["default", "normal", "uniform"]
MethodName = Literal["matching", "dc", "dsa", "dcc", "dsac", "cafe", "cafe-dsa", "dd", "ld", "mtt", "tesla", "frepo"]
PreprocessingKind = Literal["standard", "zca", "zca_standardized"]

NORMS: tuple[str, ...] = get_args(Norm)
POOLINGS: tuple[str, ...] = get_args(Pooling)
INITIALIZATIONS: tuple[str, ...] = get_args(Initialization)
PREPROCESSINGS: tuple[str, ...] = get_args(PreprocessingKind)

# Spaces of images that other projects save, beside these kinds (`atom_fast.foreign.spaces`).
SPACES = (
    "pixels", "standard_2023", "standard_2470", "standard_cifar100", "standard_imagenet", "standard_tiny",
    "zca_datadam", "zca_frepo",
)  # fmt: skip

NETWORK_NAMES = ("convnet", "alexnet", "vgg11", "resnet18", "vit")
NETWORK_LIBRARIES = ("timm", "torchvision")  # whose networks are named "timm:NAME"
TRAINING_PRECISIONS = ("float32", "bfloat16")
SOURCES = ("digits", "cifar10", "cifar100", "tiny", "folder")
SELECTIONS = ("random", "herding", "k-center", "forgetting", "least-forgetting", "easy", "full")
FEATURES = ("embedding", "pixels")
EXPORT_FORMATS = ("folder", "pt", "ddranking", "eccv24")
# Epochs of the network that is watched to select images: they separate long before it has learned them all.
WATCHED_EPOCHS = 20
WHOLE_EPOCHS = 200  # of networks trained on all real images, for scores: DD-Ranking's schedule for CIFAR
# Files in a run's folder.
SYNTHETIC_FILE = "synthetic.safetensors"
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
LOG_FILE = "log.jsonl"
EVALUATION_FILE = "evaluation.json"  # also beside a set's file, where networks were trained on it

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")  # of siamese augmentation, by code
STRATEGY = "_".join(OPERATIONS)


def split_strategy(strategy: str) -> tuple[tuple[str, ...], ...]:
    """Return the stages of an augmentation strategy, each a tuple of operations of which one is drawn.

    Underscores join the operations of a stage, "+" joins stages that run one after the other: ``"color+crop_scale"`` is
    ``(("color",), ("crop", "scale"))``. ``"none"`` and ``""`` have no stage.

    Raises:
        ValueError: an operation is unknown or given twice.
    """
    if strategy.lower() in ("", "none"):
        return ()
    stages = tuple(tuple(stage.split("_")) for stage in strategy.lower().split("+"))
    names = [name for stage in stages for name in stage]
    if unknown := [name for name in names if name not in OPERATIONS]:
        raise ValueError(
            f"augmentation strategy {strategy!r} has no operation {unknown[0]!r}; "
            f"join any of {', '.join(OPERATIONS)} by underscores, and stages by '+', or use 'none'"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"augmentation strategy {strategy!r} names an operation twice")
    return stages


def first_few(names: Sequence[str], most: int = 3) -> str:
    """Return the first names joined by commas, with an ellipsis where there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def suggestion(name: object, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'X'?"`` for the nearest known name, or nothing where none is near."""
    import difflib

    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
