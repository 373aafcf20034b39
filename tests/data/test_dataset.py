"""ImageData: its class index, what it refuses, its fingerprint, and its moves between devices."""

import pytest
import torch

from atom_fast.data.dataset import ImageData

LABELS = torch.tensor([2, 0, 1, 2, 0, 2])


def image_data(labels=LABELS, **changes):
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "name": "six",
        "class_names": ("a", "b", "c"),
        "train_images": torch.randint(0, 256, (len(labels), 1, 4, 5), dtype=torch.uint8, generator=generator),
        "train_labels": labels,
        "test_images": torch.randint(0, 256, (2, 1, 4, 5), dtype=torch.uint8, generator=generator),
        "test_labels": torch.tensor([1, 2]),
    }
    return ImageData.from_tensors(**{**arguments, **changes})


def test_class_index_lists_every_image_once_by_class_in_order():
    data = image_data()
    assert data.class_index.tolist() == [1, 4, 2, 0, 3, 5]
    assert data.class_counts.tolist() == [2, 1, 3] and data.class_sizes == (2, 1, 3)
    assert data.class_offsets.tolist() == [0, 2, 3, 6]
    assert data.num_classes == 3
    assert data.image_shape == (1, 4, 5)


def test_a_data_set_shows_itself_in_a_line():
    assert repr(image_data()) == "ImageData('six', 6 training and 2 test images [1, 4, 5], 3 classes: a, b, c)"
    many = image_data(class_names=[f"c{number}" for number in range(200)], labels=torch.arange(200))
    assert repr(many).endswith("200 classes: c0, c1, c2, ...)")


def test_a_test_set_need_not_hold_every_class():
    assert image_data(test_labels=torch.tensor([2, 2])).num_classes == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": torch.zeros(6, 1, 4, 5)}, "training images must be uint8.*float32"),
        ({"test_images": torch.zeros(2, 4, 5, dtype=torch.uint8)}, r"test images must be uint8 \[N, C, H, W\]"),
        ({"test_images": torch.zeros(0, 1, 4, 5, dtype=torch.uint8)}, "not empty"),
        ({"test_images": torch.zeros(2, 1, 5, 5, dtype=torch.uint8)}, r"same shape; got \[1, 4, 5\] and \[1, 5, 5\]"),
        ({"train_labels": LABELS[:5]}, r"training labels must be int64 \[6\]"),
        ({"train_labels": LABELS.int()}, "training labels must be int64.*int32"),
        ({"train_labels": LABELS + 1}, "training labels must be 0 to 2 .*got 1 to 3"),
        ({"test_labels": torch.tensor([-1, 0])}, "test labels must be 0 to 2"),
        ({"class_names": ("a", "b", "c", "empty")}, "class 'empty' of six has no training image"),
    ],
)
def test_tensors_that_are_no_data_set_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        image_data(**changes)


def test_fingerprint_depends_on_every_byte_and_on_nothing_else():
    data = image_data()
    assert data.fingerprint == image_data(name="another name").fingerprint
    assert len(data.fingerprint) == 64
    changed = data.train_images.clone()
    changed[3, 0, 2, 1] ^= 1
    others = [
        image_data(train_images=changed),
        image_data(labels=LABELS.flip(0)),
        image_data(test_labels=torch.tensor([2, 2])),
        image_data(class_names=("a", "b", "d")),
        image_data(
            train_images=data.train_images.reshape(6, 1, 5, 4), test_images=data.test_images.reshape(2, 1, 5, 4)
        ),
    ]
    assert data.fingerprint not in {other.fingerprint for other in others}


def test_everything_moves_to_a_device_and_stays_the_same(device):
    data = image_data()
    moved = data.to(device)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert getattr(moved, name).device.type == device.type
        assert torch.equal(getattr(moved, name).cpu(), getattr(data, name))
    assert (
        moved.class_index.device == moved.class_counts.device == moved.class_offsets.device == moved.train_images.device
    )
    assert moved.fingerprint == data.fingerprint == data.to(device).fingerprint


def test_the_fingerprint_is_not_computed_again_after_a_move(monkeypatch, device):
    data = image_data()
    fingerprint = data.fingerprint
    monkeypatch.setattr("hashlib.sha256", None)
    assert data.to(device).fingerprint == fingerprint
