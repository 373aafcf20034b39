"""Checkpoints of a distillation: written completely or not at all, with a checksum; reading one executes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from atom_fast._files import write_atomically
from atom_fast._hashing import add_tensors

FORMAT = "atom_fast.checkpoint"
FORMAT_VERSION = 2
_READABLE = ("1", "2")  # version 1 lacks the pool, and settings whose defaults are what it did
KEEP = 3

_NAME = re.compile(r"iteration-(\d+)\.safetensors")


class DamagedCheckpointError(ValueError):
    """A checkpoint file is cut short, or its content does not match its checksum."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All that a distillation needs to continue as if it had never stopped.

    Attributes:
        iteration: the last one that was finished; 0 before the first.
        tensors: those of `Distillation.state`, of all classes.
        config: every setting, resolved.
        data_fingerprint: ``ImageData.fingerprint`` of the real images.
        seconds: spent on the iterations so far.
        versions: of the packages that computed them.
        pool_digest: ``Pool.digest`` of the trained networks; None without any.
    """

    iteration: int
    tensors: dict[str, Tensor]
    config: dict
    data_fingerprint: str
    seconds: float = 0.0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    pool_digest: str | None = None


def save_checkpoint(folder: str | os.PathLike, checkpoint: Checkpoint, *, keep: int = KEEP) -> Path:
    """Write a checkpoint and remove all but the newest ``keep`` up to it.

    Later iterations' files are left alone: a run that continued from before them found them damaged.

    Args:
        folder: made where it is missing.
        checkpoint: tensors on any device, in any memory format; they come back contiguous.
        keep: how many to keep, at least 1.

    Returns:
        The file written.

    Raises:
        OSError: the file could not be written (a full disk); earlier checkpoints stay, and the newest is named.
    """
    from safetensors.torch import save

    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    fields = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    description = json.dumps({**fields, "tensors": sorted(tensors)}, sort_keys=True)
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "description": description,
        "sha256": _digest(tensors, description, str(FORMAT_VERSION)),
    }
    path = folder / f"iteration-{checkpoint.iteration:08d}.safetensors"
    try:
        write_atomically(path, save(tensors, metadata=header))
    except OSError as error:
        earlier = _files(folder)
        kept = f"the newest checkpoint is still {earlier[0]}" if earlier else "there is no earlier checkpoint"
        raise type(error)(error.errno, f"{error.strerror or error}; {kept}") from error
    for old in [file for file in _files(folder) if _iteration(file) <= checkpoint.iteration][keep:]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def load_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint that `save_checkpoint` wrote, on the CPU. Nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedCheckpointError: the file is cut short or changed, or is no checkpoint.
        ValueError: the file is intact, but written by another version of the format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    content = path.read_bytes()
    try:
        header = _header(content)
        tensors = load(content)
        description, version = header["description"], header["format_version"]
        intact = header["format"] == FORMAT and _digest(tensors, description, version) == header["sha256"]
        fields = json.loads(description) if intact else {}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from error
    if not intact:
        raise DamagedCheckpointError(f"{path} is damaged: its content does not match its checksum")
    if version not in _READABLE:
        raise ValueError(
            f"{path} has format version {version}, this atom_fast reads {' and '.join(_READABLE)}; "
            "install the version that wrote it"
        )
    try:
        checkpoint = Checkpoint(tensors=tensors, **{name: fields[name] for name in fields if name != "tensors"})
        _check_types(checkpoint)
    except TypeError as error:
        raise DamagedCheckpointError(f"{path} is not a checkpoint: {error}") from error
    return checkpoint


def latest_checkpoint(folder: str | os.PathLike, report: Callable[[str], None] = print) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None where there is none at all.

    Args:
        folder: where `save_checkpoint` wrote.
        report: called with a message for each damaged checkpoint that is skipped.

    Raises:
        RuntimeError: there are checkpoints, but every one is damaged.
    """
    files = _files(Path(folder))
    for path in files:
        try:
            return load_checkpoint(path)
        except DamagedCheckpointError as error:
            report(f"{error}; trying the one before it")
    if files:
        raise RuntimeError(f"every checkpoint in {folder} is damaged; remove the run's folder, or start in another")
    return None


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove the half-written files of a killed process. Only for the process that holds the run's lock."""
    for path in Path(folder).glob(".*.part"):
        with contextlib.suppress(OSError):
            path.unlink()


def _files(folder: Path) -> list[Path]:
    """Return the checkpoint files, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_iteration, reverse=True)


def _iteration(path: Path) -> int:
    return int(path.stem.removeprefix("iteration-"))


def _check_types(checkpoint: Checkpoint) -> None:
    """Raise TypeError for a field that `save_checkpoint` would not write, whatever its checksum."""
    kinds: dict[str, Any] = {
        "iteration": int,
        "config": dict,
        "data_fingerprint": str,
        "seconds": (int, float),
        "versions": dict,
        "pool_digest": (str, type(None)),
    }
    for name, kind in kinds.items():
        value = getattr(checkpoint, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"its {name} is a {type(value).__name__}")
    if checkpoint.iteration < 0:
        raise TypeError(f"its iteration is {checkpoint.iteration}")


def _header(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file: after eight bytes of length, JSON with ``__metadata__``."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def _digest(tensors: dict[str, Tensor], description: str, version: str) -> str:
    digest = hashlib.sha256(f"{FORMAT} {version} {description}".encode())
    add_tensors(digest, tensors)
    return digest.hexdigest()
