"""A folder of PNG files, as torchvision's ``ImageFolder`` reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from atom_fast._files import new_folder

if TYPE_CHECKING:
    from atom_fast.synthetic import SyntheticSet


def export_folder(synthetic: SyntheticSet, path: Path) -> Path:
    """Write ``train/<class>/0000.png`` and ``metadata.json``; see :meth:`SyntheticSet.export`."""
    check_channels(synthetic)
    with new_folder(path) as folder:
        pictures, targets = list(save_pictures(synthetic, folder / "train")), synthetic.targets.tolist()
        description = {
            "class_names": synthetic.class_names,
            "metadata": synthetic.metadata,
            "preprocessing": synthetic.preprocessing.describe(),
            **decoded_note(synthetic),
        }
        if synthetic.soft_labels is not None:
            description["soft_labels"] = {
                file.relative_to(folder / "train").as_posix(): targets[index] for file, index in pictures
            }
        (folder / "metadata.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", "utf-8")
    return path


def check_channels(synthetic: SyntheticSet) -> None:
    """Refuse images that are neither grey nor RGB."""
    channels = synthetic.sheets.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"PNG files need images with 1 or 3 channels; got {channels}")


def save_pictures(synthetic: SyntheticSet, folder: Path) -> Iterator[tuple[Path, int]]:
    """Write a set's images to ``folder/<class>/0000.png``, in 8 bits; yield each file and its image's position."""
    from PIL import Image

    pixels = (synthetic.pixels() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    labels = synthetic.labels.cpu()
    for label, name in enumerate(folder_names(synthetic.class_names)):
        (folder / name).mkdir(parents=True)
        for number, index in enumerate((labels == label).nonzero().flatten().tolist()):
            file = folder / name / f"{number:04d}.png"
            Image.fromarray(pixels[index].squeeze(-1) if pixels.shape[3] == 1 else pixels[index]).save(file)
            yield file, index


def decoded_note(synthetic: SyntheticSet) -> dict[str, object]:
    """Entries of an export that say that its images were cut out of sheets; none where they were not."""
    return {} if synthetic.partition == 1 else {"partition": synthetic.partition, "decoded": True}


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Return distinct names that are safe in every file system and sort in the order of ``class_names``.

    Letters, digits, ``.``, ``-`` and ``_`` stay, other characters become ``_``. If the result is not distinct and in
    order, or a name could be hidden, reserved or too long, every name gets its position in front.
    """
    safe = [re.sub(r"[^\w.-]", "_", name)[:60] for name in class_names]
    folded = [name.casefold() for name in safe]
    ordered = safe == sorted(safe) and len(set(folded)) == len(safe)
    reserved = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
    plain = all(name.strip("._- ") == name and name and name.split(".")[0] not in reserved for name in folded)
    if ordered and plain:
        return safe
    width = len(str(len(safe) - 1))
    return [f"{index:0{width}d}_{name.rstrip('.')}" for index, name in enumerate(safe)]
