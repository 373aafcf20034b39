"""Coresets against brute force on small sets, and forgetting events against a count by hand."""

import itertools

import pytest
import torch

from atom_fast.data.whitening import fit_preprocessing
from atom_fast.evaluation import (
    ForgettingCounter,
    forgetting_selection,
    herding_selection,
    k_center_selection,
    random_selection,
    watch_training,
)
from tests.evaluation.small import small_data


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


@pytest.mark.parametrize(
    "call, message",
    [
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


def test_random_selection_is_ordered_by_class_and_without_replacement(data):
    ipc = min(data.class_sizes)
    chosen = random_selection(data, ipc, seed=1)
    assert chosen.shape == (3 * ipc,) and chosen.dtype == torch.int64 and chosen.device == data.train_labels.device
    assert torch.equal(data.train_labels[chosen], torch.arange(3, device=chosen.device).repeat_interleave(ipc))
    assert len(set(chosen.tolist())) == 3 * ipc


def test_random_selection_depends_on_the_seed_alone(data):
    assert torch.equal(random_selection(data, 4, seed=1), random_selection(data, 4, seed=1))
    assert torch.equal(random_selection(data, 4, seed=1).cpu(), random_selection(data.to("cpu"), 4, seed=1))
    counts = torch.zeros(len(data.train_labels))
    for seed in range(300):
        counts[random_selection(data, 4, seed).cpu()] += 1
    expected = 300 * 4 / torch.tensor(data.class_sizes)[data.train_labels.cpu()]
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_random_selection_of_more_than_a_class_has(data):
    with pytest.raises(ValueError, match="asked for"):
        random_selection(data, 14, seed=0)
    with pytest.raises(ValueError, match="got 0"):
        random_selection(data, 0, seed=0)
