"""Sets that were not distilled here: selected real images, files of the public code, folders of images."""

import pytest
import torch

from atom_fast.data.partition import make_sheets
from atom_fast.data.whitening import Preprocessing, fit_preprocessing
from atom_fast.distillation import network_cache
from atom_fast.distillation.config import preset
from atom_fast.distillation.pool import trained_pool
from atom_fast.evaluation import herding_selection, random_selection
from atom_fast.evaluation.accuracy import evaluate
from atom_fast.evaluation.sets import random_sets, read_set, select
from atom_fast.exports.public import PUBLIC_NORMALIZATION
from atom_fast.names import SELECTIONS
from atom_fast.synthetic import SyntheticSet
from atom_fast.training import get_protocol
from tests.evaluation.small import small_data


@pytest.fixture(scope="module")
def data(device):
    return small_data(train=48).to(device)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(network_cache, "cache_folder", lambda: folder)
        yield


@pytest.mark.parametrize("method", SELECTIONS)
def test_a_selected_set_holds_real_images_of_every_class(method, data, tmp_path):
    chosen = select(data, method, 2, epochs=1, progress=False)
    indices = torch.tensor(chosen.metadata["selection"]["indices"])
    sizes = data.class_sizes if method == "full" else (2, 2, 2)
    assert chosen.class_sizes == sizes and indices.unique().numel() == sum(sizes)
    assert torch.equal(chosen.labels, torch.arange(3).repeat_interleave(torch.tensor(sizes)))
    torch.testing.assert_close(chosen.pixels() * 255, data.train_images.cpu()[indices].float(), rtol=0, atol=1e-3)
    loaded = SyntheticSet.load(chosen.save(tmp_path / "chosen.safetensors"))
    assert loaded.metadata["method"] == method and loaded.metadata["dataset_fingerprint"] == data.fingerprint


@pytest.mark.parametrize("method", [method for method in SELECTIONS if method != "full"])
def test_a_partition_puts_shrunk_real_images_of_a_class_on_each_sheet(method, data, tmp_path):
    chosen = select(data, method, 2, partition=2, epochs=1, progress=False)
    indices = torch.tensor(chosen.metadata["selection"]["indices"])
    assert chosen.partition == 2 and chosen.ipc == 2 and chosen.class_sizes == (8, 8, 8)
    assert indices.unique().numel() == 24
    assert torch.equal(data.train_labels.cpu()[indices], chosen.labels)
    assert chosen.sheet_labels.tolist() == [0, 0, 1, 1, 2, 2]
    shrunk = make_sheets(chosen.preprocessing.to_model(data.train_images.cpu()[indices]), 2)
    torch.testing.assert_close(chosen.sheets, shrunk)
    loaded = SyntheticSet.load(chosen.save(tmp_path / "chosen.safetensors"))
    assert loaded.partition == 2 and torch.equal(loaded.images, chosen.images)


def test_easy_images_are_random_ones_of_the_easiest_half(data, capsys):
    config = preset("best", pool_epochs=1).for_data(data.image_shape, data.name)
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    scores = trained_pool(data, space, config, progress=False).scores
    capsys.readouterr()
    seen = set()
    for seed in range(8):
        chosen = select(data, "easy", 2, preprocessing=space, epochs=1, seed=seed, progress=False)
        seen |= set(chosen.metadata["selection"]["indices"])
    assert capsys.readouterr().err == "", "the networks are those of the preset"
    half = set()
    for indices in data.class_index.split(data.class_sizes):
        half |= set(indices[scores[indices].argsort()[: -(-len(indices) // 2)]].tolist())
    assert seen <= half and len(seen) > 6
    with pytest.raises(ValueError, match="of the easiest half of small has"):
        select(data, "easy", max(data.class_sizes), progress=False)


def test_random_beside_a_partitioned_set_has_its_partition(data):
    synthetic = select(data, "herding", 2, partition=2, features="pixels", progress=False)
    random = random_sets(data, synthetic)
    assert random(0).partition == 2 and random(0).ipc == 2 and not torch.equal(random(0).sheets, random(1).sheets)
    larger = select(data, "random", 3, partition=2, progress=False)
    larger = SyntheticSet(
        larger.sheets.repeat(2, 1, 1, 1), larger.sheet_labels.repeat(2), larger.class_names, larger.preprocessing,
        partition=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="Random needs 24 images of every class, but 3 of 3 classes have fewer"):
        random_sets(data, larger)


def test_pixels_need_no_network(data, monkeypatch):
    monkeypatch.delattr("atom_fast.evaluation.sets.watch_training")
    chosen = select(data, "herding", 2, features="pixels", progress=False)
    pixels = data.train_images.flatten(1).double() / 255
    assert chosen.metadata["selection"]["indices"] == herding_selection(pixels, data, 2).tolist()


@pytest.mark.parametrize(
    "method, features, images",
    [("random", "pixels", 6), ("forgetting", "pixels", 54), ("herding", "embedding", 54), ("herding", "pixels", 54)],
)
def test_images_are_brought_to_model_space_once_and_where_they_are_used(method, features, images, data, monkeypatch):
    """The 6 that are chosen, and all 40 where a network or distances need them."""
    counts, to_model = [], Preprocessing.to_model
    monkeypatch.setattr(Preprocessing, "to_model", lambda self, x: counts.append(len(x)) or to_model(self, x))
    select(data, method, 2, features=features, epochs=1, progress=False)
    assert sum(counts) == images


@pytest.mark.parametrize("ipc, norm", [(1, "instance"), (2, "batch")])
def test_real_images_and_foreign_sets_are_tested_as_a_distilled_one(ipc, norm, tmp_path):
    """On the same networks; chosen images in the same model space, too."""
    pytest.importorskip("kornia", reason="ZCA is fitted by kornia")
    data = small_data(channels=3, name="cifar10")
    config = preset("paper", ipc=ipc).for_data(data.image_shape, "cifar10")
    chosen = select(data, "random", ipc, progress=False)
    assert chosen.preprocessing.kind == config.preprocessing == "zca"
    parts = chosen.images, chosen.labels, chosen.class_names, chosen.preprocessing
    distilled = SyntheticSet(*parts, {"config": config.to_dict()})
    foreign = read_set(chosen.export(tmp_path / "public.pt", format="pt"), data)
    protocol = get_protocol("dc", epochs=1)
    options = {"protocol": protocol, "networks": 1, "device": "cpu", "progress": False}
    tested = [evaluate(some, data, **options).architecture for some in (distilled, chosen, foreign)]
    assert tested[0]["norm"] == norm and tested == [tested[0]] * 3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda data: select(data, "herdng"), "method must be one of random, .*; got 'herdng'"),
        (lambda data: select(data, "herding", features="pixel"), "features must be one of embedding, pixels"),
        (lambda data: select(data, "random", preprocessing="zac"), "preprocessing must be one of auto, .*; got 'zac'"),
        (lambda data: select(data, "random", 14, progress=False), "has 13 training images, but 14"),
        (lambda data: select(data, "herding", 1, epochs=0, progress=False), "epochs must be .*; got 0"),
        (lambda data: select(data, "random", 4, partition=2), r"16 .* \(4 on each of 4 sheets\); .* ipc of at most 3"),
        (lambda data: select(data, "random", 1, partition=4), r"16 .* on each of 1 sheets\); give a smaller partition"),
        (lambda data: select(data, "full", partition=2), "method 'full' takes every .* partition must be 1; got 2"),
        *(
            (
                lambda data, partition=partition: select(data, "random", partition=partition),
                f"partition must be a whole number .* of 8x8: one of 1, 2, 4, 8; got {partition!r}$",
            )
            for partition in (0, -1, 3, 2.0, "2", True)
        ),
    ],
)
def test_what_cannot_be_selected_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_data())


def test_a_file_of_the_public_code_is_read_in_its_own_model_space(tmp_path):
    data = small_data(channels=3, name="cifar10")
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    chosen = random_selection(data, 2, seed=0)
    ours = SyntheticSet(
        space.to_model(data.train_images[chosen]), data.train_labels[chosen], data.class_names, space,
        {"dataset": "cifar10"},
    )  # fmt: skip
    path = ours.export(tmp_path / "public.pt", format="pt")
    read = read_set(path, data)
    assert read.preprocessing.mean.tolist() == pytest.approx(PUBLIC_NORMALIZATION["cifar10"][0])
    torch.testing.assert_close(read.pixels(), ours.pixels(), rtol=0, atol=1e-5)
    assert torch.equal(read.labels, ours.labels) and read.metadata["method"] == "public"
    standard = read_set(path, data, preprocessing="standard", progress=False)
    torch.testing.assert_close(standard.preprocessing.mean, space.mean)
    with pytest.raises(ValueError, match="holds 1 sets, numbered from 0; got experiment 1"):
        read_set(path, data, experiment=1)
    with pytest.raises(ValueError, match="labels must be below 2"):
        read_set(path, small_data(channels=3, classes=2, name="cifar10"))


@pytest.mark.parametrize("nested", [True, False])
def test_a_folder_of_images_is_read_by_the_names_of_its_classes(nested, tmp_path):
    data = small_data()
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    chosen = random_selection(data, 2, seed=0)
    ours = SyntheticSet(space.to_model(data.train_images[chosen]), data.train_labels[chosen], data.class_names, space)
    folder = ours.export(tmp_path / "images")  # in folders class_0, class_1, class_2
    read = read_set(folder if nested else folder / "train", data, progress=False)
    torch.testing.assert_close(read.images, ours.images, rtol=0, atol=1e-4)
    assert torch.equal(read.labels, ours.labels)
    (folder / "train" / "class_1").rename(folder / "train" / "dog")
    with pytest.raises(ValueError, match="folders that are not classes of small: .*dog"):
        read_set(folder, data, progress=False)


def test_what_is_no_set_is_refused(tmp_path):
    data = small_data()
    with pytest.raises(FileNotFoundError, match="missing"):
        read_set(tmp_path / "missing.pt", data)
    with pytest.raises(FileNotFoundError, match="no class folders"):
        read_set(tmp_path, data)
    with pytest.raises(ValueError, match="preprocessing must be one of standard, .*; got 'whiten'"):
        read_set(tmp_path, data, preprocessing="whiten")
