"""Line 1 of Algorithm 1: a given set is where a run starts, if it fits."""

import dataclasses

import pytest
import torch

from atom_fast.data.partition import decode, make_sheets
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.distillation.start import given_images
from atom_fast.evaluation.sets import select
from atom_fast.synthetic import SyntheticSet
from tests.distillation.test_step import make_data

BY_CLASS = torch.tensor([1, 4, 2, 5, 0, 3])  # of the sets below


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def preprocessing(data):
    return fit_preprocessing(data.train_images, "standard", progress=False)


@pytest.fixture(scope="module", params=[1, 2])
def start(request, data, preprocessing):
    """Two stored images of each class, not in the order of the classes."""
    chosen = select(data, "random", 2, partition=request.param, preprocessing=preprocessing, progress=False)
    order = torch.tensor([5, 0, 2, 4, 1, 3])
    parts = chosen.class_names, chosen.preprocessing, {}, chosen.partition
    return SyntheticSet(chosen.sheets[order], chosen.sheet_labels[order], *parts)


def test_stored_images_are_taken_class_by_class_with_their_bits(start, data, preprocessing):
    images = given_images(start, preset(ipc=2, partition=start.partition), data, preprocessing)
    assert torch.equal(images, start.sheets[BY_CLASS])


def test_another_model_space_is_reached_by_way_of_whole_images(start, data, preprocessing):
    other = dataclasses.replace(preprocessing, mean=preprocessing.mean + 0.1, std=preprocessing.std * 2)
    images = given_images(start, preset(ipc=2, partition=start.partition), data, other)
    pixels = (
        decode(start.sheets, start.partition) * preprocessing.std[:, None, None] + preprocessing.mean[:, None, None]
    )
    expected = (pixels.clamp(0, 1) - other.mean[:, None, None]) / other.std[:, None, None]
    torch.testing.assert_close(images, make_sheets(expected, start.partition)[BY_CLASS], rtol=1e-4, atol=1e-5)


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "a run is started from a set of another partition",
    "refused before anything is written; both partitions are named",
)
def test_a_set_of_another_partition_is_refused_before_anything_is_written(start, data, preprocessing, tmp_path):
    other = 3 - start.partition
    config = preset(ipc=2, partition=other, iterations=1, width=8, depth=2)
    message = (
        f"the set to start from has partition {start.partition}, this run partition {other}; use partition "
        rf"{start.partition} \(--partition {start.partition}\)"
    )
    with pytest.raises(ValueError, match=message):
        given_images(start, config, data, preprocessing)
    with pytest.raises(ValueError, match=message):
        distill(data, config, tmp_path / "run", start=start, progress=False, device="cpu")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):  # nothing to resume, so that the set would be needed
        distill(data, config, tmp_path / "run", start=start, resume=True, progress=False, device="cpu")


def test_sizes_are_compared_by_stored_images(start, data, preprocessing):
    noun = "images" if start.partition == 1 else "sheets"
    with pytest.raises(ValueError, match=rf"must have 8 {noun} \[3, 8, 8\].*; got 2 {noun} \[3, 8, 8\]"):
        given_images(start, preset(ipc=8, partition=start.partition), data, preprocessing)
