"""CAFE against plain PyTorch in float64; its loops; a resumed run."""

import copy

import pytest
import torch
import torch.nn.functional as F

from atom_fast.data.sampling import sample_class_indices
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.distillation.methods import cafe
from atom_fast.distillation.run import DivergenceError
from atom_fast.distillation.start import initial_images
from tests.distillation.test_step import make_data

SMALL = {"ipc": 2, "real_batch": 5, "width": 8, "depth": 2}


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    """Measure accuracies on few images."""
    monkeypatch.setattr(cafe, "PROBED", 10)


def make_learner(method="cafe", **settings):
    data = make_data()
    config = preset(method=method, **{**SMALL, **settings}).resolve(data.image_shape, data.name, torch.device("cpu"))
    preprocessing = fit_preprocessing(data.train_images, config.preprocessing, progress=False)
    start = initial_images(config, data, preprocessing)
    return cafe.Learner(config, data, preprocessing, start, progress=False)


def plain_terms(network, real, synthetic, classes=3):
    """Return both terms, from the facts of the published loss, class by class."""
    real_embedding, real_maps = network.features(real)
    own_embedding, own_maps = network.features(synthetic)
    layers = [*zip(real_maps, own_maps, (0.1, 1.0), strict=True), (real_embedding, own_embedding, 2.0)]
    distance, centres = 0, []
    for label in range(classes):
        for a, b, weight in layers:
            a, b = a.chunk(classes)[label], b.chunk(classes)[label]
            distance = distance + weight * ((a.mean(0) - b.mean(0)) ** 2).sum()
        centres.append(own_embedding.chunk(classes)[label].mean(0))
    labels = torch.arange(classes).repeat_interleave(len(real) // classes)
    return distance, F.cross_entropy(real_embedding @ torch.stack(centres).T, labels, reduction="sum")


@pytest.mark.parametrize("pixels", [64, 3 * 64, 10 * 64, 2**14])  # an image, a part of a class, two classes, all
@pytest.mark.parametrize("pooling", ["avg2", "max2"])  # fused, and module by module
def test_an_update_is_the_plain_loop_s_in_float64(pixels, pooling, monkeypatch):
    monkeypatch.setattr(cafe, "_PIXELS", pixels)
    run = make_learner(pooling=pooling, momentum=0.0, image_lr=0.02)
    start, twin = run.images.clone(), torch.Generator().manual_seed(5)
    run.generator.manual_seed(5)
    terms = run._align(decay=0.5)

    network = copy.deepcopy(run.network).double()
    real = run._gather_real(sample_class_indices(run.data, 5, twin)).double()
    images = start.double().requires_grad_()
    expected = torch.stack(plain_terms(network, real, images))
    (gradient,) = torch.autograd.grad(expected[0] + 0.01 * expected[1], images)
    torch.testing.assert_close(terms.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.images.double(), start - 0.02 * 0.5 * gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("accuracies", "rounds", "probes"),
    [
        # No change: a window of updates, and a window of epochs after each but the last.
        ([0.5] * 99, 10, 1 + 9 * 10),
        ([0.1, *[0.2] * 99], 11, 2 + 9 * 10),  # a change ends the training after an epoch; then none
        ([number % 2 / 2 for number in range(99)], cafe.ROUNDS, cafe.ROUNDS + 1),  # it never settles
    ],
)
def test_accuracy_decides_how_long_a_network_learns(accuracies, rounds, probes, monkeypatch):
    run, asked = make_learner(), iter(accuracies)
    monkeypatch.setattr(run, "_accuracy", lambda images: next(asked))
    run.step(1)
    assert run.read_terms().rounds == rounds
    assert len(list(asked)) == len(accuracies) - probes


def test_a_probe_is_the_network_s_accuracy():
    run = make_learner()
    images, labels = run._gather_real(torch.arange(30)), run.data.train_labels
    run._probed_labels = labels
    correct = run.network(images).argmax(1) == labels
    assert run._accuracy(images) == pytest.approx(correct.float().mean().item())


@pytest.mark.parametrize("method", ["cafe", "cafe-dsa"])
def test_steps_lower_the_loss(method, monkeypatch):
    monkeypatch.setattr(cafe, "WINDOW", 1)  # one round and one epoch
    run, losses = make_learner(method), []
    for iteration in range(1, 21):
        run.step(iteration)
        losses.append(run.read_terms())
    assert sum(terms.loss for terms in losses[-5:]) < 0.7 * sum(terms.loss for terms in losses[:5])
    assert losses[0].loss == pytest.approx(losses[0].feature_loss + 0.01 * losses[0].discrimination_loss)


def test_the_learning_rate_is_halved(monkeypatch):
    monkeypatch.setattr(cafe, "WINDOW", 1)
    run, decays = make_learner(), []
    monkeypatch.setattr(run, "_align", lambda decay: decays.append(decay) or torch.zeros(2))
    monkeypatch.setattr(run, "_accuracy", lambda images: 0.5)
    for iteration in (1200, 1201, 1601, 1801):
        run.step(iteration)
    assert decays == [1.0, 0.5, 0.25, 0.125]


def test_a_resumed_run_has_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(cafe, "ROUNDS", 2)
    data, settings = make_data(), {"method": "cafe-dsa", **SMALL}
    whole = distill(data, preset(iterations=4, **settings), tmp_path / "whole", progress=False)
    distill(data, preset(iterations=2, **settings), tmp_path / "parts", progress=False)
    resumed = distill(data, preset(iterations=4, **settings), tmp_path / "parts", resume=True, progress=False)
    assert torch.equal(resumed.images, whole.images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 3}, "method 'cafe' has no rounds; got 3"),
        ({"augmentation": "flip"}, "method 'cafe' has no augmentation; got 'flip'"),
        ({"norm": "batch"}, "needs a norm of each sample"),
        ({"label_lr": 0.1}, "method 'cafe' has no label_lr"),
    ],
)
def test_settings_that_it_has_no_use_for_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill(make_data(), preset(method="cafe", **SMALL, **settings), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_images_that_diverge_stop_the_run_with_the_last_checkpoint_named(tmp_path):
    config = preset(method="cafe", **SMALL, iterations=5, image_lr=1e6, log_every=1)
    with pytest.raises(DivergenceError, match=r"lower image_lr.*last good checkpoint is .*iteration-0+\.safetensors"):
        distill(make_data(), config, tmp_path, progress=False)
