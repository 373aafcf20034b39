"""Write sets as other projects save them, in every format and every space it occurs in, and count what is recognised.

``python -m tests.foreign_files --data-dir DIR`` does it with real CIFAR-10 images; the tests do it with small
photographs. Images are real ones as a distillation leaves them: blurred noise is added in model space.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F

from atom_fast.data.dataset import ImageData
from atom_fast.data.partition import make_sheets
from atom_fast.foreign.spaces import Candidate, Fits

IPC = 10


@dataclasses.dataclass
class Made:
    """A file and what it is: its space and images there, its labels, its partition, further arguments to read it."""

    path: Path
    space: str
    images: torch.Tensor
    labels: torch.Tensor
    partition: int = 1
    given: dict = dataclasses.field(default_factory=dict)


def photographs(size: int = 16, classes: int = 10, each: int = 60) -> ImageData:
    """Return squares of scikit-learn's two photographs as a data set of the name ``cifar10``."""
    from sklearn.datasets import load_sample_images

    pictures = [torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in load_sample_images().images]
    draw, squares = torch.Generator().manual_seed(0), []
    for number in range(classes * each):
        picture, side = pictures[number % 2], 3 * size
        y, x = (int(torch.randint(length - side, (), generator=draw)) for length in picture.shape[1:])
        small = F.interpolate(picture[None, :, y : y + side, x : x + side].float(), size=(size, size), mode="area")
        squares.append(small.round().to(torch.uint8))
    images, labels = torch.cat(squares), torch.arange(classes).repeat_interleave(each)
    names = [f"class {number}" for number in range(classes)]
    return ImageData.from_tensors("cifar10", names, images, labels, images[::each], labels[::each])


def make(data: ImageData, folder: Path, fits: Fits, noise: float = 0.3) -> list[Made]:
    """Write the files; ``noise`` is relative to the standard deviation in model space."""
    draw = torch.Generator().manual_seed(1)
    offsets = data.class_offsets[:-1, None]
    chosen = data.class_index[(offsets + torch.arange(4 * IPC)).flatten()]
    pixels = data.train_images[chosen].float() / 255
    first = pixels.unflatten(0, (data.num_classes, 4 * IPC))[:, :IPC].flatten(0, 1)
    sheets = make_sheets(pixels, 2)
    labels = torch.arange(data.num_classes).repeat_interleave(IPC)
    one_hot = F.one_hot(labels, data.num_classes).float()
    logits = 6 * one_hot + torch.randn(one_hot.shape, generator=draw)
    centred = (one_hot - 1 / data.num_classes) * 0.9
    found: list[Made] = []

    def images_in(space: str, source: torch.Tensor, drift: float) -> torch.Tensor:
        images = source if space == "pixels" else fits.preprocessing(Candidate(space, ())).to_model(source)
        added = torch.randn(images.shape, generator=draw)
        return (images + drift * images.std() * added).contiguous()

    def add(name, space, form, *, source=first, drift=noise, stored=labels, beside=None, partition=1, **given):
        images, path = images_in(space, source, drift), folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            numpy.savez(path, **dict(zip(form, (images.permute(0, 2, 3, 1).numpy(), stored.numpy()), strict=True)))
        else:
            torch.save(form(images, stored), path)
        for other, tensor in (beside or {}).items():
            torch.save(tensor, path.with_name(other))
        found.append(Made(path, space, images, labels, partition, given))

    def public(images, stored):
        return {"data": [[images, stored]], "accs_all_exps": {"ConvNet": [0.5]}}

    def experiments(images, stored):
        return {"data": [[images, stored], [images.flip(0), stored]], "accs_all_exps": {}}

    def snapshots(images, stored):
        start = images + images.std() * torch.randn(images.shape, generator=draw)
        return {"data": [[start, stored], [(start + images) / 2, stored], [images, stored]], "accs_all_exps": {}}

    def bare(images, stored):
        return images

    add("res_DC_CIFAR10_ConvNet_10ipc.pt", "standard_2023", experiments, drift=2 * noise)
    add("res_DSA_CIFAR10_ConvNet_10ipc.pt", "standard_2023", public)
    add("res_DM_CIFAR10_ConvNet_10ipc.pt", "standard_2023", public, drift=0.0)
    add("res_CAFE_CIFAR10_ConvNet_10ipc.pt", "standard_2023", public, stored=labels.int())
    add("res_IDM_CIFAR10_ConvNet_10ipc.pt", "standard_2023", public, source=sheets, partition=2)
    add("res_DataDAM_CIFAR10_ConvNet_10ipc_.pt", "standard_2023", snapshots)
    add("zca/res_DataDAM_CIFAR10_ConvNet_10ipc_.pt", "zca_datadam", snapshots)
    add("cifar10-renamed.pt", "standard_2023", snapshots)
    add("syn_data_cifar10_ipc_10.pt", "standard_2023", lambda images, stored: {"data": [images, stored]})
    add("CIFAR10_IPC10_images.pt", "standard_2023", bare, drift=0.0)
    add("MTT/CIFAR10/images_best.pt", "standard_2023", bare, beside={"labels_best.pt": labels})
    add("MTT/CIFAR10/zca/images_best.pt", "zca", bare, beside={"labels_best.pt": labels})
    add("MTT/CIFAR10/zca/images_zca_5000.pt", "pixels", bare, beside={"labels_5000.pt": labels})
    torch.save(labels, folder / "tesla.labels")
    add("TESLA/CIFAR10/images_100.pt", "zca", bare, drift=noise / 2)
    add("FTD/cifar10/images_5000.pt", "zca", bare, drift=0.0, labels=folder / "tesla.labels")
    rate = torch.tensor(0.01)
    with_logits = {"labels_best.pt": logits.requires_grad_(), "lr_best.pt": rate}
    add("DATM/CIFAR10/Normal/images_best.pt", "zca", bare, beside=with_logits)
    add("PAD/CIFAR10/Normal/images_best.pt", "standard_2023", bare, beside=with_logits)
    add("IDC/cifar10/data.pt", "pixels", lambda *pair: list(pair), source=sheets, drift=noise / 3, partition=2)
    add("DREAM/cifar10/data500.pt", "pixels", lambda *pair: list(pair), source=sheets, partition=2)
    add("DANCE/cifar10/data_init.pt", "pixels", lambda *pair: list(pair), source=sheets, drift=0.0, partition=2)
    add("NCFM/cifar10/data_best.pt", "pixels", lambda *pair: list(pair), drift=noise / 2)
    add("FRePo_cifar10.npz", "zca_frepo", ("image", "label"), stored=centred)
    add("RCIG_cifar10.npz", "zca_frepo", ("x_proto", "y_proto"), drift=noise / 2, stored=logits.detach())
    add("kip_cifar10_ConvNet3_ssize100_zca_ckpt1000.npz", "zca_frepo", ("images", "labels"), stored=centred, drift=0.0)
    add("cifar10-2470.pt", "standard_2470", public, drift=0.0)
    return found


def main() -> None:
    """Run the command."""
    from atom_fast.data.sources import load_data
    from atom_fast.foreign.recognised import open_foreign

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--noise", type=float, default=0.3)
    options = parser.parse_args()
    data = load_data("cifar10", options.data_dir)
    fits = Fits(data, "cifar10")
    with tempfile.TemporaryDirectory() as name:
        files, wrong = make(data, Path(name), fits, options.noise), 0
        for made in files:
            recognised = open_foreign(made.path, **made.given)
            spaces = [candidate.space for candidate in recognised.candidates]
            right = spaces[0] == made.space and recognised.partition == made.partition
            wrong += not right
            verdict = "right" if right else f"WRONG: {made.space}, partition {made.partition}"
            print(f"{verdict}  {made.path.relative_to(name)}: {', '.join(spaces)}, partition {recognised.partition}")
    print(f"{len(files) - wrong} of {len(files)} right")


if __name__ == "__main__":
    main()
