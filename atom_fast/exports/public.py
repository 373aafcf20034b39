"""The ``.pt`` of the public DC, DM and DataDAM programs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from atom_fast._files import write_atomically
from atom_fast.data.whitening import Preprocessing
from atom_fast.exports.folder import decoded_note
from atom_fast.foreign.spaces import CONSTANTS, PUBLIC, unclamped_pixels

if TYPE_CHECKING:
    from atom_fast.synthetic import SyntheticSet

# Mean and standard deviation with which the public DC, DM and DataDAM programs normalise test images. CIFAR-10's differ
# from its pixels' (0.247, 0.243, 0.262): a set normalised by its pixels would have another contrast there.
PUBLIC_NORMALIZATION = {dataset: CONSTANTS[space] for dataset, space in PUBLIC.items()}


def export_public(synthetic: SyntheticSet, path: Path) -> Path:
    """Write ``{"data": [[images, labels]], ...}``; see :meth:`SyntheticSet.export`."""
    images, space = public_model_space(synthetic)
    images = images.float().cpu().contiguous()
    data = [[images, synthetic.labels.cpu()]]
    content: dict[str, object] = {"data": data, "accs_all_exps": {}, "preprocessing": space}
    if synthetic.soft_labels is not None:
        content["soft_labels"] = synthetic.targets.cpu()
    buffer = io.BytesIO()
    torch.save({**content, **decoded_note(synthetic)}, buffer)
    return write_atomically(path, buffer.getvalue())


def public_model_space(synthetic: SyntheticSet) -> tuple[torch.Tensor, dict[str, object]]:
    """The images in the space of the public programs, and that space as `Preprocessing.describe` describes it."""
    constants = PUBLIC_NORMALIZATION.get(str(synthetic.metadata.get("dataset")))
    if synthetic.preprocessing.kind != "standard" or constants is None:
        return synthetic.images, synthetic.preprocessing.describe()
    mean, std = map(torch.tensor, constants)
    return standardised(synthetic, *constants), Preprocessing(mean, std).describe()


def standardised(synthetic: SyntheticSet, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Return the images of a set, float32 [N, C, H, W], brought back to pixels and normalised by other constants."""
    pixels = unclamped_pixels(synthetic.images, synthetic.preprocessing)
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]
