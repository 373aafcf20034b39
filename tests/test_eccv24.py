"""Tensors for contests: order, space, and the sets that they do not take."""

import pytest
import torch

from atom_fast.data.whitening import Preprocessing
from atom_fast.exports.eccv24 import eccv24_tensor
from atom_fast.synthetic import SyntheticSet

CIFAR100 = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
TINY = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def columns(values):
    return torch.tensor(values)[:, None, None]


def standard(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)):
    return Preprocessing(torch.tensor(mean), torch.tensor(std))


def make_set(classes=100, side=32, ipc=10, space=None, metadata=None, labels=None, **changes):
    """A set whose images go beyond [0, 1] in pixels, in a random order of its images."""
    generator = torch.Generator().manual_seed(classes)
    count = classes * ipc
    pixels = torch.rand(count, 3, side, side, generator=generator) * 1.5 - 0.25
    labels = torch.arange(classes).repeat(ipc) if labels is None else labels
    space = space or standard()
    images = (pixels - space.mean[:, None, None]) / space.std[:, None, None]
    metadata = {"dataset": "cifar100"} if metadata is None else metadata
    return SyntheticSet(images, labels, [f"c{k}" for k in range(classes)], space, metadata, **changes), pixels


@pytest.mark.parametrize(
    "classes, side, dataset, constants",
    [(100, 32, "cifar100", CIFAR100), (100, 32, None, CIFAR100), (200, 64, "tiny", TINY)],
)
def test_images_are_in_the_contest_s_space_and_order(classes, side, dataset, constants):
    synthetic, pixels = make_set(classes, side, metadata={"dataset": dataset} if dataset else {})
    tensor = eccv24_tensor(synthetic)
    assert tensor.shape == (classes * 10, 3, side, side)
    assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
    mean, std = map(columns, constants)
    expected = (pixels.view(10, classes, 3, side, side).transpose(0, 1).flatten(0, 1) - mean) / std
    torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


def test_a_whitened_set_is_brought_back_to_pixels():
    generator = torch.Generator().manual_seed(0)
    synthetic, pixels = make_set(side=32)
    size = 3 * 32 * 32
    scale = torch.rand(size, generator=generator) + 0.5  # a whitening that is diagonal
    zca_mean = torch.rand(3, 32, 32, generator=generator)
    space = Preprocessing(zca_mean=zca_mean, zca_matrix=scale.diag(), zca_inverse=scale.reciprocal().diag())
    whitened = ((pixels - zca_mean).flatten(1) * scale).view_as(pixels)
    mean, std = map(columns, CIFAR100)
    expected = (pixels.view(10, 100, 3, 32, 32).transpose(0, 1).flatten(0, 1) - mean) / std
    found = eccv24_tensor(SyntheticSet(whitened, synthetic.labels, synthetic.class_names, space))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_set_is_left_as_it_was():
    synthetic, _ = make_set()
    before = synthetic.images.clone()
    eccv24_tensor(synthetic).zero_()
    assert torch.equal(synthetic.images, before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ipc": 1}, "eccv24 takes 10 images per class; got 1 per class"),
        ({"labels": torch.arange(1000) // 11}, "eccv24 takes 10 images per class; got classes of different sizes"),
        ({"classes": 10, "ipc": 10}, r"cifar100 \(100 classes, \[3, 32, 32\]\) or tiny .*; got cifar100 \(10 classes"),
        ({"side": 64}, r"got cifar100 \(100 classes, \[3, 64, 64\]\)"),
        ({"metadata": {"dataset": "folder"}}, "eccv24 takes a set of cifar100 .*; got folder"),
        ({"metadata": {}, "classes": 10}, "got a set"),
        ({"partition": 2}, "eccv24 takes whole images: partition must be 1; got 2"),
        ({"soft_labels": torch.full((1000, 100), 0.01)}, "eccv24 takes hard labels"),
    ],
)
def test_sets_that_the_contest_does_not_take(changes, message):
    synthetic, _ = make_set(**changes)
    with pytest.raises(ValueError, match=message):
        eccv24_tensor(synthetic)


def test_the_file_is_read_as_the_contest_reads_it(tmp_path):
    synthetic, _ = make_set()
    tensor = eccv24_tensor(synthetic)
    file = synthetic.export(tmp_path / "cifar100.pt", format="eccv24")
    assert torch.equal(torch.load(file), tensor)
    found = SyntheticSet.load(file, preprocessing="standard_cifar100")
    assert torch.equal(found.images, tensor) and torch.equal(found.labels, torch.arange(1000) // 10)
    found.metadata = {"dataset": "cifar100"}
    torch.testing.assert_close(eccv24_tensor(found), tensor, rtol=1e-5, atol=1e-5)
