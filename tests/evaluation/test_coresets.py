"""Coresets against brute force on small sets, forgetting events against a count by hand, and sets from elsewhere."""

import dataclasses
import itertools

import pytest
import torch

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing, fit_preprocessing
from atom_fast.distillation.config import preset
from atom_fast.evaluation import (
    PROTOCOLS,
    ForgettingCounter,
    forgetting_selection,
    herding_selection,
    k_center_selection,
    random_selection,
    watch_training,
)
from atom_fast.evaluation.comparison import compare
from atom_fast.evaluation.coresets import METHODS
from atom_fast.evaluation.sets import read_set, select
from atom_fast.synthetic import PUBLIC_NORMALIZATION, SyntheticSet


def small_data(train=40, test=10, classes=3, size=8, channels=1, name="small"):
    generator = torch.Generator().manual_seed(0)

    def split(count):
        labels = torch.arange(count) % classes
        images = torch.randint(0, 100, (count, channels, size, size), generator=generator)
        bar = torch.arange(size) // (size // classes) == labels[:, None]
        return (images + 150 * bar[:, None, :, None]).to(torch.uint8), labels

    return ImageData.from_tensors(name, [f"class {k}" for k in range(classes)], *split(train), *split(test))


@pytest.fixture(scope="module")
def data(device):
    return small_data().to(device)


@pytest.fixture(scope="module")
def features(data):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(40, 3, generator=generator, dtype=torch.float64).to(data.train_labels.device)


def brute_force_herding(rows, ipc):
    chosen = []
    for _ in range(ipc):
        distances = {
            i: (rows[[*chosen, i]].mean(0) - rows.mean(0)).norm().item() for i in range(len(rows)) if i not in chosen
        }
        chosen.append(min(distances, key=distances.get))
    return chosen


def brute_force_k_center(rows, ipc):
    chosen = [min(range(len(rows)), key=lambda i: (rows[i] - rows.mean(0)).norm().item())]
    while len(chosen) < ipc:
        rest = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min((rows[i] - rows[c]).norm().item() for c in chosen)))
    return chosen


@pytest.mark.parametrize("ipc", [1, 4, 13])
@pytest.mark.parametrize(
    "select_from, brute_force",
    [(herding_selection, brute_force_herding), (k_center_selection, brute_force_k_center)],
)
def test_equals_brute_force_in_every_class(select_from, brute_force, ipc, data, features):
    chosen = select_from(features, data, ipc)
    assert chosen.dtype == torch.int64 and chosen.device == data.train_labels.device
    for label, of_class in enumerate(chosen.split(ipc)):
        indices = (data.train_labels == label).nonzero().flatten()
        assert of_class.tolist() == indices[brute_force(features[indices], ipc)].tolist()


def test_herding_comes_close_to_the_class_mean(data, features):
    """Closer than nine in ten of all choices of as many images."""
    rows = features[data.train_labels == 0].cpu()
    distances = [(rows[list(c)].mean(0) - rows.mean(0)).norm() for c in itertools.combinations(range(len(rows)), 3)]
    herded = features[herding_selection(features, data, 3)[:3]].cpu().mean(0) - rows.mean(0)
    assert herded.norm() < torch.stack(distances).quantile(0.1)


def test_k_center_is_within_twice_the_best_radius(data, features):
    """The guarantee of the greedy algorithm."""
    rows = features[data.train_labels == 0].cpu()
    distances = torch.cdist(rows, rows)
    best = min(distances[list(c)].amin(0).max() for c in itertools.combinations(range(len(rows)), 3))
    chosen = features[k_center_selection(features, data, 3)[:3]].cpu()
    assert torch.cdist(chosen, rows).amin(0).max() <= 2 * best


@pytest.mark.parametrize("select_from", [herding_selection, k_center_selection])
def test_equal_images_are_each_taken_once(select_from, data):
    chosen = select_from(torch.ones(40, 2, device=data.train_labels.device), data, 13)
    assert chosen.unique().numel() == 39


def test_forgetting_events_counted_by_hand():
    counter = ForgettingCounter(5, "cpu")
    history = [  # correct or not, of each image, as it was shown
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],  # forgotten: 1
        [1, 1, 1, 0, 0],  # forgotten: 3
        [0, 0, 1, 1, 0],  # forgotten: 0, 1
    ]
    for shown in history:
        for indices in ([3, 0], [4, 1, 2]):
            counter.update(torch.tensor(indices), torch.tensor([bool(shown[i]) for i in indices]))
    # 4 was never learned: forgotten at each of four times.
    assert counter.events.tolist() == [1, 2, 0, 1, 4]


def test_forgetting_takes_the_most_or_the_fewest_events(data):
    events = torch.arange(40, device=data.train_labels.device) // 6  # images 6 n to 6 n + 5 have n events
    most, least = forgetting_selection(events, data, 2), forgetting_selection(events, data, 2, least=True)
    # Class k has the images k, k + 3, k + 6, ...; among equals the earlier ones come first.
    assert most.tolist() == [36, 39, 37, 31, 38, 32]
    assert least.tolist() == [0, 3, 1, 4, 2, 5]


def test_watched_training_tells_features_and_events(data):
    preprocessing = fit_preprocessing(data.train_images, "standard", progress=False)
    options = {"epochs": 3, "progress": False}
    state = torch.get_rng_state()
    features, events = watch_training(data, preprocessing, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert features.shape == (40, 128) and features.isfinite().all()
    assert events.shape == (40,) and events.dtype == torch.int64
    assert events.min() >= 0 and events.max() <= 3
    again, same = watch_training(data, preprocessing, **options)
    torch.testing.assert_close(again, features, rtol=1e-3, atol=1e-4)
    other, _ = watch_training(data, preprocessing, seed=1, **options)
    assert not torch.allclose(other, features, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_selected_set_holds_real_images_of_every_class(method, data, tmp_path):
    chosen = select(data, method, 2, epochs=1, progress=False)
    indices = torch.tensor(chosen.metadata["selection"]["indices"])
    sizes = data.class_sizes if method == "full" else (2, 2, 2)
    assert chosen.class_sizes == sizes and indices.unique().numel() == sum(sizes)
    assert torch.equal(chosen.labels, torch.arange(3).repeat_interleave(torch.tensor(sizes)))
    torch.testing.assert_close(chosen.pixels() * 255, data.train_images.cpu()[indices].float(), rtol=0, atol=1e-3)
    loaded = SyntheticSet.load(chosen.save(tmp_path / "chosen.safetensors"))
    assert loaded.metadata["method"] == method and loaded.metadata["dataset_fingerprint"] == data.fingerprint


def test_pixels_need_no_network(data, monkeypatch):
    monkeypatch.delattr("atom_fast.evaluation.sets.watch_training")
    chosen = select(data, "herding", 2, features="pixels", progress=False)
    pixels = data.train_images.flatten(1).double() / 255
    assert chosen.metadata["selection"]["indices"] == herding_selection(pixels, data, 2).tolist()


@pytest.mark.parametrize(
    "method, features, images",
    [("random", "pixels", 6), ("forgetting", "pixels", 46), ("herding", "embedding", 46), ("herding", "pixels", 46)],
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
    protocol = dataclasses.replace(PROTOCOLS["dc"], epochs=1)
    options = {"protocol": protocol, "networks": 1, "random": False, "device": "cpu", "progress": False}
    tested = [compare(some, data, **options)["evaluation"]["architecture"] for some in (distilled, chosen, foreign)]
    assert tested[0]["norm"] == norm and tested == [tested[0]] * 3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda data: select(data, "herdng"), "method must be one of random, .*; got 'herdng'"),
        (lambda data: select(data, "herding", features="pixel"), "features must be one of embedding, pixels"),
        (lambda data: select(data, "random", preprocessing="zac"), "preprocessing must be one of auto, .*; got 'zac'"),
        (lambda data: select(data, "random", 14, progress=False), "has 13 training images, but 14"),
        (lambda data: select(data, "herding", 1, epochs=0, progress=False), "epochs must be .*; got 0"),
        (lambda data: herding_selection(torch.zeros(39, 2), data, 1), "each of the 40 training images .* got 39"),
        (lambda data: k_center_selection(torch.zeros(40), data, 1), r"features must be floating point \[N, D\]"),
        (lambda data: k_center_selection(torch.full((40, 1), torch.nan), data, 1), "features must be finite"),
        (lambda data: forgetting_selection(torch.zeros(3), data, 1), "got 3"),
        (lambda data: herding_selection(torch.zeros(40, 2), data, 0), "got 0"),
    ],
)
def test_what_cannot_be_chosen_is_refused(call, message):
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
