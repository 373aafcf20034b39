"""Sampling of real images: uniform, without replacement while there are others, of the right class, on the device."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import check_class_sizes, describe_small_classes, sample_class_indices


def data_with_classes(sizes, device="cpu"):
    """Unordered classes of the given sizes; the images are a single pixel."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    images = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)
    names = [f"class {k}" for k in range(len(sizes))]
    return ImageData.from_tensors("made", names, images, labels, images[:1], labels[:1]).to(device)


def generator_on(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


class DispatchedOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", [(5, 5), (7, 3, 11), (1, 40), (4,)])
def test_each_row_holds_distinct_images_of_its_class(sizes, device):
    data, generator = data_with_classes(sizes, device), generator_on(device)
    batch = min(sizes)
    for _ in range(20):
        indices = sample_class_indices(data, batch, generator)
        assert indices.shape == (len(sizes), batch) and indices.dtype == torch.int64
        assert indices.device == data.class_index.device
        assert torch.equal(
            data.train_labels[indices], torch.arange(len(sizes), device=device)[:, None].expand(-1, batch)
        )
        assert all(len(set(row)) == batch for row in indices.tolist())


def test_a_whole_class_can_be_drawn(device):
    data = data_with_classes((6, 6, 6), device)
    indices = sample_class_indices(data, 6, generator_on(device))
    assert sorted(indices.flatten().tolist()) == list(range(18))


@pytest.mark.parametrize(("sizes", "batch"), [((3, 7, 5, 20), 7), ((1, 2), 9), ((4, 4), 9), ((6,), 13)])
def test_a_class_of_fewer_images_is_drawn_in_whole_and_again(sizes, batch, device):
    data, generator = data_with_classes(sizes, device), generator_on(device)
    for _ in range(20):
        indices = sample_class_indices(data, batch, generator)
        assert indices.shape == (len(sizes), batch) and indices.dtype == torch.int64
        for label, (row, size) in enumerate(zip(indices, sizes, strict=True)):
            assert (data.train_labels[row] == label).all()
            times = torch.bincount(row, minlength=sum(sizes))[data.train_labels == label]
            assert times.min() == batch // size and times.max() == -(-batch // size)


def test_which_images_of_a_small_class_are_drawn_once_more_is_random(device):
    size, batch, draws = 10, 13, 3000
    data, generator = data_with_classes((size, 30), device), generator_on(device)
    more = torch.zeros(size + 30, dtype=torch.int64, device=device)
    for _ in range(draws):
        more += torch.bincount(sample_class_indices(data, batch, generator)[0], minlength=size + 30) == 2
    counts, share = more[data.train_labels == 0].double(), (batch - size) / size
    statistic = ((counts - draws * share) ** 2).sum().item() / (draws * share * (1 - share)) * (size - 1) / size
    assert abs(statistic - (size - 1)) < 4.5 * math.sqrt(2 * (size - 1))


@pytest.mark.parametrize(("sizes", "batch"), [((9, 9), 4), ((9, 14, 30), 9)])
def test_classes_that_are_large_enough_are_drawn_as_the_largest_of_random_keys(sizes, batch, device):
    data = data_with_classes(sizes, device)
    keys = torch.rand(len(sizes), max(sizes), device=device, generator=generator_on(device, 3))
    if min(sizes) < max(sizes):
        keys[torch.arange(max(sizes), device=device) >= data.class_counts[:, None]] = -1.0
    positions = keys.topk(batch, dim=1, sorted=False).indices + data.class_offsets[:-1, None]
    assert torch.equal(sample_class_indices(data, batch, generator_on(device, 3)), data.class_index[positions])


def test_every_image_of_a_class_is_as_likely_as_the_others(device):
    sizes, batch, draws = (12, 30, 19), 8, 3000
    data, generator = data_with_classes(sizes, device), generator_on(device)
    seen = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
    for _ in range(draws):
        seen += torch.bincount(sample_class_indices(data, batch, generator).flatten(), minlength=sum(sizes))
    for label, size in enumerate(sizes):
        counts, share = seen[data.train_labels == label].double(), batch / size
        # Inclusions within a draw exclude one another: with this scaling the statistic is chi-square, size - 1 degrees.
        statistic = ((counts - draws * share) ** 2).sum().item() / (draws * share * (1 - share)) * (size - 1) / size
        assert abs(statistic - (size - 1)) < 4.5 * math.sqrt(2 * (size - 1)), f"class of {size}: {statistic}"


def test_draws_of_successive_steps_and_of_classes_are_independent(device):
    size, batch, draws = 20, 5, 2000
    data, generator = data_with_classes((size, size), device), generator_on(device)
    picked = torch.zeros(draws, 2, 2 * size, device=device)
    for step in range(draws):
        picked[step].scatter_(1, sample_class_indices(data, batch, generator), 1.0)
    members = torch.stack([picked[:, label][:, data.train_labels == label] for label in range(2)])  # [2, draws, size]
    overlaps = [(members[:, 1:] * members[:, :-1]).sum(2).flatten(), (members[0] * members[1]).sum(1)]
    variance = batch * (batch / size) * (1 - batch / size) * (size - batch) / (size - 1)  # hypergeometric
    for overlap in overlaps:
        assert abs(overlap.mean().item() - batch**2 / size) < 4.5 * math.sqrt(variance / len(overlap))


def test_a_seed_fixes_the_draws(device):
    data = data_with_classes((9, 14), device)
    draws = [[sample_class_indices(data, 4, generator).tolist() for _ in range(3)]
             for generator in (generator_on(device, 5), generator_on(device, 5), generator_on(device, 6))]  # fmt: skip
    assert draws[0] == draws[1] != draws[2]
    assert draws[0][0] != draws[0][1]


@pytest.mark.parametrize("sizes", [(8,), (5, 8), (2, 8)], ids=["even", "uneven", "small"])
def test_operators_do_not_grow_with_classes_and_read_nothing_back(sizes):
    names = []
    for repeats in (1, 100):
        data = data_with_classes(sizes * repeats)
        with DispatchedOperators() as operators:
            sample_class_indices(data, 3, generator_on("cpu"))
        names.append(operators.names)
    assert names[0] == names[1] and len(names[0]) <= 16
    assert not {"aten._local_scalar_dense.default", "aten.nonzero.default"} & set(names[0])


@pytest.mark.parametrize("batch", [0, -3])
def test_fewer_than_one_image_is_refused(batch):
    data = data_with_classes((5, 3, 9))
    with pytest.raises(ValueError, match=f"images per class must be at least 1; got {batch}"):
        sample_class_indices(data, batch, generator_on("cpu"))
    with pytest.raises(ValueError, match=f"images per class must be 1 to 3 for made; got {batch}"):
        check_class_sizes(data, batch)


def test_a_class_of_too_few_different_images_is_named_with_what_can_be_done():
    data = data_with_classes((5, 3, 9))
    check_class_sizes(data, 3)
    with pytest.raises(ValueError) as refusal:
        check_class_sizes(data, 4, ", or do without")
    assert str(refusal.value) == (
        "class 'class 1' of made has 3 training images, but 4 different ones per class were asked for; give an ipc of "
        "at most 3, or do without"
    )


def test_small_classes_are_counted_and_the_smallest_is_named():
    data = data_with_classes((5, 3, 9))
    assert describe_small_classes(data, 3) is None
    expected = "2 of 3 classes have fewer than 6 training images (the smallest, 'class 1', has 3)"
    assert describe_small_classes(data, 6) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(50, 70), (6, 70)])
def test_sampling_runs_in_a_cuda_graph_with_fresh_draws(device, sizes):
    data, generator = data_with_classes(sizes, device), generator_on(device)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        indices = sample_class_indices(data, 10, generator)
    draws = []
    for _ in range(3):
        graph.replay()
        draws.append(indices.clone())
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
    assert all((data.train_labels[draw] == torch.arange(2, device=device)[:, None]).all() for draw in draws)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(50, 70), (6, 70)])
def test_sampling_never_waits_for_the_device(device, sizes):
    data, generator = data_with_classes(sizes, device), generator_on(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_class_indices(data, 10, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
