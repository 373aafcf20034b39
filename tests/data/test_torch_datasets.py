"""Data sets read from map-style Datasets: torchvision's, PyTorch's and Hugging Face's, and what is refused."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from atom_fast.data.dataset import ImageData
from atom_fast.data.sources import load_data
from tests.data.test_sources import cifar_class, make_cifar, make_image_folder


class Listed(Dataset):
    """Items by number; it counts how often each is read, and gives as many as are asked for."""

    def __init__(self, items, **attributes):
        self.items, self.reads = items, [0] * len(items)
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        self.reads[number] += 1
        return self.items[number]


def pixels(count=4, channels=3, height=4, width=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def read(train, test=None, **options):
    options = {"name": "made", "progress": False, **options}
    return ImageData.from_datasets(train, train if test is None else test, **options)


def pairs(images, labels=(0, 1, 1, 0)):
    return Listed(list(zip(images, labels, strict=True)))


# ---------------------------------------------------------------- images

FORMS = {
    "uint8 CHW": lambda image: image,
    "uint8 HWC": lambda image: image.permute(1, 2, 0),
    "array CHW": lambda image: image.numpy(),
    "array HWC": lambda image: image.permute(1, 2, 0).numpy(),
    "float": lambda image: image / 255,
    "double HWC": lambda image: image.permute(1, 2, 0).double().numpy() / 255,
    "half": lambda image: (image / 255).half(),
    "gradient": lambda image: (image / 255).requires_grad_(),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_tensors_and_arrays_of_every_layout_give_their_pixels(form, channels):
    images = pixels(channels=channels)
    data = read(pairs([FORMS[form](image) for image in images]))
    assert torch.equal(data.train_images, images) and data.train_images.is_contiguous()
    assert data.train_labels.tolist() == [0, 1, 1, 0]


def test_pil_images_and_arrays_without_channels_give_their_pixels():
    images = pixels(channels=1)
    for convert in (
        lambda image: image[0],
        lambda image: image[0].numpy(),
        lambda image: Image.fromarray(image[0].numpy()),
    ):
        assert torch.equal(read(pairs([convert(image) for image in images])).train_images, images)
    colour = pixels()
    data = read(pairs([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in colour]))
    assert torch.equal(data.train_images, colour)


def test_an_array_that_may_not_be_written_is_read_without_a_warning(recwarn):
    image = pixels(1)[0].numpy()
    image.setflags(write=False)
    read(pairs([image] * 4))
    assert not recwarn.list


def test_grey_images_among_coloured_ones_get_three_channels():
    grey, colour = pixels(channels=1), pixels()
    data = read(pairs([grey[0], colour[1], grey[2], colour[3]]))
    assert torch.equal(data.train_images[0], grey[0].expand(3, -1, -1)) and torch.equal(data.train_images[1], colour[1])
    assert read(pairs(grey), pairs(colour)).image_shape == (3, 4, 5), "both splits share the number of channels"


def test_images_of_different_sizes_need_a_resolution():
    mixed = pairs([*pixels(2), *pixels(2, height=8, width=6)])
    with pytest.raises(ValueError, match="item 2 of train is 6x8 pixels but item 0 of train is 5x4: .*resolution"):
        read(mixed)
    assert read(mixed, resolution=3).image_shape == (3, 3, 3)


def test_images_are_resized_as_files_are(tmp_path):
    root = make_image_folder(tmp_path)
    datasets = pytest.importorskip("torchvision.datasets")
    train, test = (datasets.ImageFolder(root / split) for split in ("train", "test"))
    for resolution in (None, 5):
        files = load_data("folder", root, resolution=resolution, progress=False)
        assert read(train, test, resolution=resolution).fingerprint == files.fingerprint


@given(st.floats(0, 1, width=32), st.sampled_from([torch.float32, torch.float64]))
def test_floating_point_pixels_are_rounded(value, dtype):
    data = read(pairs(torch.full((4, 1, 2, 2), value, dtype=dtype)))
    assert abs(int(data.train_images[0, 0, 0, 0]) - 255 * value) <= 0.5 + 1e-4


def test_torchvisions_cifar_is_the_one_that_load_data_reads(tmp_path, monkeypatch):
    dataset = cifar_class("cifar10")
    make_cifar(tmp_path, dataset, monkeypatch)
    transforms = pytest.importorskip("torchvision.transforms")
    expected = load_data("cifar10", tmp_path)
    for transform in (None, transforms.ToTensor(), transforms.PILToTensor()):
        train, test = (dataset(tmp_path, train=split, transform=transform) for split in (True, False))
        data = read(train, test, name="cifar10")
        assert torch.equal(data.train_images, expected.train_images)
        assert data.fingerprint == expected.fingerprint
    assert data.source == "torchvision.datasets.cifar.CIFAR10" and expected.source == str(tmp_path)


def test_each_item_is_read_once_with_a_bar(capsys):
    train, test = pairs(pixels()), pairs(pixels())
    read(train, test, progress=True)
    assert train.reads == test.reads == [1, 1, 1, 1]
    assert "reading images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 2, 2), -0.4), r"must be in \[0, 1\]; got -0.4 to -0.4: leave normalisation out"),
        (torch.full((1, 2, 2), 255.0), r"got 255 to 255: .*divide 0 to 255 by 255"),
        (torch.tensor([[[0.5, torch.nan]]]), "got nan to nan"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), "uint8 or floating point.*got torch.int64"),
        (np.zeros((2, 2), dtype="U1"), "uint8 or floating point.*got <U1"),
        (torch.zeros(4, 2, 2, dtype=torch.uint8), r"1 or 3 channels; got \[4, 2, 2\]"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), r"1 or 3 channels; got \[1, 3, 2, 2\]"),
        (torch.zeros(3, 0, 2, dtype=torch.uint8), r"1 or 3 channels; got \[3, 0, 2\]"),
        (np.uint8(3), "an image must be PIL's, a tensor or an array; got uint8"),
        ("cat.png", "an image must be PIL's, a tensor or an array; got str"),
        (None, "an image must be PIL's.*got NoneType"),
        (Image.new("I;16", (2, 2)), "more than 8 bits per channel"),
    ],
)
def test_images_of_another_kind_are_refused_by_their_place(image, message):
    images = [*pixels(3, 1, 2, 2), image]
    with pytest.raises(ValueError, match=rf"^item 3 of test: .*{message}"):
        read(pairs(pixels(4, 1, 2, 2)), pairs(images))


# ---------------------------------------------------------------- labels and class names


@pytest.mark.parametrize(
    "kind", [int, np.int64, np.uint8, torch.tensor, lambda k: np.array(k), lambda k: torch.tensor(k).int()]
)
def test_labels_are_whole_numbers_of_any_kind(kind):
    data = read(pairs(pixels(), [kind(label) for label in (2, 0, 1, 2)]))
    assert data.train_labels.tolist() == [2, 0, 1, 2] and data.train_labels.dtype == torch.int64
    assert data.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (1.0, "whole number; got 1.0"),
        ("cat", "whole number; got 'cat'"),
        (True, "whole number; got True"),
        (torch.tensor(True), r"whole number; got tensor\(True\)"),
        (torch.tensor(1.0), r"whole number; got tensor\(1.\)"),
        (torch.tensor([0, 1]), r"whole number; got a Tensor of shape \[2\]"),
        (None, "whole number; got None"),
        (-1, "0 to 3, one for each class; got -1"),
        (10**12, "0 to 3, one for each class; got 1000000000000"),
    ],
)
def test_labels_of_another_kind_are_refused_by_their_place(label, message):
    with pytest.raises(ValueError, match=f"^item 1 of train: a label must be (a )?{message}"):
        read(pairs(pixels(), [0, label, 1, 0]))


def test_class_names_come_from_the_dataset_or_the_argument():
    named = Listed(pairs(pixels()).items, classes=["cat", ("dog", "hound")])
    assert read(named).class_names == ("cat", "dog, hound")
    halves = Subset(named, [0, 1, 3]), Subset(named, [2])
    assert read(*halves).class_names == ("cat", "dog, hound")
    assert read(named, class_names=("a", "b")).class_names == ("a", "b")
    with pytest.raises(ValueError, match="item 1 of train: a label must be 0 to 0, one for each class; got 1"):
        read(named, class_names=("only",))
    with pytest.raises(ValueError, match="class 'c' of made has no training images"):
        read(named, class_names=("a", "b", "c"))
    other = Listed(named.items, classes=["dog", "cat"])
    with pytest.raises(ValueError, match="different classes.*cat, dog, hound and dog, cat"):
        read(named, other)
    assert read(named, other, class_names=("a", "b")).num_classes == 2
    assert read(Listed(named.items, classes=2)).class_names == ("0", "1"), "a number of classes is no list of names"
    assert read(named, pairs(pixels())).class_names == ("cat", "dog, hound"), "a test set that knows none"


# ---------------------------------------------------------------- Hugging Face


def hub(images, labels, image="img", label="label", names=("cat", "dog")):
    """Rows as `datasets` gives them, and its description of the columns."""
    rows = [{"id": "x", image: one, label: other} for one, other in zip(images, labels, strict=True)]
    return Listed(rows, features={image: object(), label: types.SimpleNamespace(names=list(names))})


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "labels"), ("img", "fine_label")])
def test_the_usual_columns_are_found(columns):
    images = pixels()
    data = read(hub(images, [0, 1, 1, 0], *columns))
    assert torch.equal(data.train_images, images) and data.class_names == ("cat", "dog")


def test_other_columns_are_named_by_an_argument():
    dataset = hub(pixels(), [0, 1, 1, 0], "photo", "breed")
    with pytest.raises(
        ValueError, match="item 0 of train has no column 'image' or 'img' but 'id', 'photo', 'breed'; pass"
    ):
        read(dataset)
    assert read(dataset, columns=("photo", "breed")).class_names == ("cat", "dog")
    with pytest.raises(ValueError, match="has no column 'race' but 'id', 'photo', 'breed'"):
        read(dataset, columns=("photo", "race"))
    for wrong in (("photo",), "photo", "ab", ("photo", 1), 5):
        with pytest.raises(ValueError, match="columns must be the names"):
            read(dataset, columns=wrong)


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_hugging_face_datasets_are_read(form):
    datasets = pytest.importorskip("datasets")
    images = pixels()
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    rows = {"img": [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], "label": [0, 1, 1, 0]}
    dataset = datasets.Dataset.from_dict(rows, features=features).with_format(form)
    data = read(dataset)
    assert torch.equal(data.train_images, images) and data.train_labels.tolist() == [0, 1, 1, 0]
    assert data.class_names == ("cat", "dog")
    with pytest.raises(TypeError, match="a mapping of 'train', 'test'; pass one of them"):
        read(datasets.DatasetDict(train=dataset, test=dataset), dataset)
    with pytest.raises(TypeError, match=r"map-style.*got IterableDataset\. List an iterable one first: list\(train\)"):
        read(dataset.to_iterable_dataset(), dataset)
    assert read(list(dataset.to_iterable_dataset()), dataset).fingerprint == data.fingerprint


# ---------------------------------------------------------------- other arguments


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pairs(pixels()).items)


def test_what_is_no_map_style_dataset_is_refused():
    good = pairs(pixels())
    with pytest.raises(TypeError, match=r"test must be a map-style Dataset.*got Stream\. List .*list\(test\)"):
        read(good, Stream())
    assert torch.equal(read(list(Stream()), good).train_images, pixels())
    with pytest.raises(TypeError, match="train must be one Dataset, but it is a mapping of 'train'"):
        read({"train": good}, good)
    with pytest.raises(TypeError, match="train must be a Dataset; got str"):
        read("data/cifar10", good)
    with pytest.raises(TypeError, match="train must be a map-style Dataset.*got int"):
        read(5, good)
    with pytest.raises(ValueError, match="test must have at least one item; got an empty list"):
        read(good, [])


@pytest.mark.parametrize(
    ("item", "found"), [(pixels(1)[0], "Tensor"), ((pixels(1)[0],), "tuple of 1"), ((pixels(1)[0], 0, 0), "tuple of 3")]
)
def test_items_of_another_form_are_refused_by_their_place(item, found):
    with pytest.raises(ValueError, match=rf"item 0 of train must be a pair \(image, label\), .*got {found}$"):
        read([item], [item])


@pytest.mark.parametrize("name", ["", None, 5])
def test_a_data_set_needs_a_name(name):
    with pytest.raises(TypeError, match="name must be"):
        read(pairs(pixels()), name=name)


@pytest.mark.parametrize("resolution", [0, 2.5, True])
def test_a_bad_resolution_is_named(resolution):
    with pytest.raises(ValueError, match=f"resolution must be .*got {resolution}"):
        read(pairs(pixels()), resolution=resolution)


def test_tensor_datasets_are_read():
    images, labels = pixels(), torch.tensor([0, 1, 1, 0])
    assert torch.equal(read(TensorDataset(images, labels)).train_images, images)
