"""The published steps are honest: the projects' network and losses, exact gradients, one expectation for all."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import atom_fast as af
from atom_fast import reference
from atom_fast.data.sources import load_data
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation import preset
from atom_fast.distillation.matching import describe_fusion, make_extractor, matching_terms
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation, make_convnet
from atom_fast.functional import class_groups
from benchmarks.live_bytes import LiveBytes, count_peak
from benchmarks.methods import TIMED, attention, batched, build_step, dc, dm, fused, mtt, published
from benchmarks.methods import batched_augmentation as batch_wise
from tests.benchmarks.tiny import TINY
from tests.benchmarks.workloads import SMALL, small


def images(count, seed=0, **changes):
    workload = dataclasses.replace(SMALL, **changes)
    shape = (count, workload.channels, workload.resolution, workload.resolution)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return published.fresh_network(SMALL)


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_network_is_the_projects_convnet(network):
    other = af.networks.ConvNet(3, SMALL.classes, SMALL.resolution, width=SMALL.width)
    with torch.no_grad():
        for target, source in zip(other.parameters(), network.parameters(), strict=True):
            assert target.shape == source.shape
            target.copy_(source)
    x = images(5)
    torch.testing.assert_close(network(x), other(x))
    features, embedding = attention.hooked_features(network, x)
    other_embedding, other_features = other.features(x)
    torch.testing.assert_close(embedding, other_embedding)
    for feature, other_feature in zip(features, other_features, strict=True):
        torch.testing.assert_close(feature, other_feature)


def test_redrawn_network_has_the_distribution_of_a_new_one(network):
    generator = torch.Generator().manual_seed(1)
    new = torch.stack([flat(published.fresh_network(SMALL)) for _ in range(300)])
    redrawn = []
    for _ in range(300):
        batched.redraw(network, generator)
        redrawn.append(flat(network))
    redrawn = torch.stack(redrawn)
    torch.testing.assert_close(new.std(0), redrawn.std(0), atol=0.02, rtol=0.15)
    assert (new.mean(0) - redrawn.mean(0)).abs().max() < 0.06


@pytest.mark.parametrize("seed", range(6))
def test_published_augmentation_is_siamese(seed):
    one = images(1)
    many = one.expand(7, -1, -1, -1).contiguous()
    torch.testing.assert_close(published.augment(many, seed), published.augment(one, seed).expand(7, -1, -1, -1))


def test_published_augmentation_draws_every_operation():
    x = images(4)
    results = [published.augment(x, seed, siamese=False) for seed in range(40)]
    assert all(result.shape == x.shape and result.isfinite().all() for result in results)
    drawn = {published.np.random.RandomState(seed).randint(6) for seed in range(40)}
    assert drawn == set(range(6))


def test_batched_augmentation_is_the_projects():
    parameters = torch.arange(6), torch.rand(6, 3, generator=torch.Generator().manual_seed(3))
    x = images(18)
    with af.backend("torch"):
        expected = af.data.augmentation.augment(
            x, af.data.augmentation.AugmentationParameters(*parameters), torch.arange(6).repeat_interleave(3)
        )
    torch.testing.assert_close(batch_wise.augment(x, *parameters), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", TIMED)
def test_step_moves_the_images_and_gives_a_finite_loss(method, monkeypatch):
    moved = []
    create = published.image_optimizer
    remember = lambda x, rate: moved.append((x, x.detach().clone())) or create(x, rate)  # noqa: E731
    monkeypatch.setattr(published, "image_optimizer", remember)
    step = build_step(small(method, ipc=10, class_images=256, real_batch=4))
    loss = step()
    ((now, before),) = moved
    assert loss.dim() == 0 and loss.isfinite()
    assert now.isfinite().all() and not torch.equal(now, before)


@pytest.mark.parametrize("method", ["dm", "atom"])
def test_implementations_reach_the_loss_of_eager(method):
    """Their random numbers differ, so single steps do too; the mean over many is one expectation for all."""
    eager, batched, fused = (
        mean_loss(build_step(small(method, implementation, real_batch=6, ipc=6, class_images=64)))
        for implementation in ("eager", "eager-batched", "fused")
    )
    assert batched == pytest.approx(eager, rel=0.2) and fused == pytest.approx(eager, rel=0.2)


def mean_loss(step, steps=60):
    losses = [step() for _ in range(steps)]
    return losses[-1]() if callable(losses[-1]) else torch.stack(losses).mean().item()


def test_gradient_matching_lowers_its_loss():
    torch.manual_seed(0)
    network = published.fresh_network(SMALL, trained=True)
    real, synthetic = images(8), images(2, seed=1).requires_grad_()
    optimizer = published.image_optimizer(synthetic, dc.IMAGE_RATE)
    losses = []
    for _ in range(10):
        loss = dc.class_matching_loss(network, real, synthetic, label=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_gradient_distance_is_zero_for_parallel_and_two_a_row_for_opposite_gradients():
    gradient = torch.randn(5, 3, 2, 2), torch.randn(5), torch.randn(4, 6)
    assert dc.gradient_distance(gradient, tuple(3 * g for g in gradient)).item() == pytest.approx(0, abs=1e-4)
    assert dc.gradient_distance(gradient, tuple(-g for g in gradient)).item() == pytest.approx(2 * 9, rel=1e-3)


def test_student_ends_where_a_plain_training_loop_does(network):
    x, labels, rate = images(6), torch.arange(3).repeat(2), 0.05
    start = flat(network)
    student = mtt.unroll(network, start, x, labels, torch.tensor(rate), [None] * 5)
    trained = published.fresh_network(SMALL, trained=True)
    torch.nn.utils.vector_to_parameters(start, trained.parameters())
    optimizer = torch.optim.SGD(trained.parameters(), lr=rate)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(trained(x), labels).backward()
        optimizer.step()
    torch.testing.assert_close(student.detach(), flat(trained), atol=1e-5, rtol=1e-4)


def test_trajectory_gradient_is_that_of_finite_differences(network):
    network = network.double()
    x, labels = images(3).double(), torch.arange(3)
    start = flat(network)
    target = start + 0.01 * torch.randn(start.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(x, rate):
        # Batches are the whole set: their order is drawn, and does not matter.
        return mtt.trajectory_distance(mtt.unroll(network, start, x, labels, rate, [None] * 3), start, target)

    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    leaf = x.clone().requires_grad_()
    gradient, rate_gradient = torch.autograd.grad(loss(leaf, rate), (leaf, rate))
    h = 1e-7  # the student's path has kinks
    slope = (loss(x + h * direction, rate) - loss(x - h * direction, rate)).item() / (2 * h)
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-3)
    rate_slope = (loss(x, rate + h) - loss(x, rate - h)).item() / (2 * h)
    assert rate_gradient.item() == pytest.approx(rate_slope, rel=1e-3)


def test_distribution_matching_gradient_is_the_formulas(network):
    """d/dS |mean r - mean e(S)|^2 = -2/n J^T (mean r - mean e(S))."""
    real, synthetic = images(5), images(4, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(dm.class_loss(network, real, synthetic), synthetic)
    embedding = network.embed(synthetic)
    difference = network.embed(real).mean(0) - embedding.mean(0)
    (expected,) = torch.autograd.grad(embedding, synthetic, (-2 / 4 * difference).detach().expand_as(embedding))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("spatial, channel", [(True, False), (False, True), (True, True)])
def test_attention_losses_are_the_reference(network, spatial, channel):
    real, synthetic = images(3 * 4), images(3 * 2, seed=1)
    real_features, real_embedding = attention.hooked_features(network, real)
    features, embedding = attention.hooked_features(network, synthetic)
    labels = torch.arange(3).repeat_interleave(4), torch.arange(3).repeat_interleave(2)
    expected = reference.atom_loss(
        real_features[:-1], features[:-1], real_embedding, embedding, *labels,
        spatial_power=4.0 if spatial else None, channel_power=4.0 if channel else None,
    )  # fmt: skip
    loop = attention.matching_loss(network, real, synthetic, 3, spatial, channel)
    at_once = batched.matching_loss(network, real, synthetic, 3, spatial, channel, attention.MMD_WEIGHT)
    torch.testing.assert_close(loop, expected)
    torch.testing.assert_close(at_once, expected)


def test_fused_step_sees_the_baselines_images():
    workload = small("atom", "fused")
    data = fused.image_data(workload)
    expected = published.normalize(published.random_pixels(workload))
    torch.testing.assert_close(fused.whitening(data).to_model(data.train_images), expected, atol=1e-5, rtol=1e-5)


def test_unknown_method_and_implementation():
    with pytest.raises(ValueError, match=r"method must be one of dc, .*'nope'"):
        build_step(small("nope"))
    with pytest.raises(ValueError, match=r"implementation of dc must be one of eager, fused; got 'compile'"):
        build_step(small("dc", "compile"))
    with pytest.raises(ValueError, match="7"):
        build_step(small("dc", ipc=7))


def test_feature_matching_is_equation_3_with_the_map_itself():
    data = load_data("digits")
    config = preset("paper", ipc=2, spatial_power=None, channel_power=None, feature_maps=True, **TINY)
    config = config.resolve(data.image_shape, "digits", torch.device("cpu"))
    network = make_convnet(config, data)
    network.reset_parameters(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    real, synthetic = (torch.randn(10 * n, 1, 8, 8, generator=generator) for n in (3, 2))
    real_labels, labels = (torch.arange(10).repeat_interleave(n) for n in (3, 2))
    synthetic.requires_grad_()
    assert "feature_maps" in describe_fusion(network, config, synthetic)
    extract = make_extractor(network, config)
    terms = matching_terms(extract(real), extract(synthetic), config, class_groups(real_labels, labels))
    attention = terms[:-1].sum()
    expected = 0
    for layer in range(config.depth - 1):
        f, g = (network.features(images)[1][layer] for images in (real, synthetic))
        for k in range(10):
            ours = torch.stack([x.flatten() / x.norm() for x in g[labels == k]]).mean(0)
            target = torch.stack([x.flatten() / x.norm() for x in f[real_labels == k]]).mean(0)
            expected = expected + (target - ours).square().sum()
    torch.testing.assert_close(attention, expected)
    gradients = [torch.autograd.grad(loss, synthetic)[0] for loss in (attention, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_feature_matching_adds_to_attention():
    data = load_data("digits")
    terms = {}
    for name, settings in {"both": {"feature_maps": True}, "attention": {}}.items():
        config = preset("paper", **TINY, **settings).resolve(data.image_shape, "digits", torch.device("cpu"))
        space = fit_preprocessing(data.train_images, "standard", progress=False)
        steps = Distillation(config, data, space, initial_images(config, data, space))
        steps.step(1)
        terms[name] = steps.read_terms()
    assert terms["both"].attention_loss > terms["attention"].attention_loss > 0
    assert terms["both"].mmd_loss == pytest.approx(terms["attention"].mmd_loss, rel=1e-4)


def test_live_bytes_counts_storages_once_and_until_they_end():
    def work():
        a = torch.zeros(1000)
        b = a.view(10, 100).t()
        c = b + 1
        del a, b
        return c * 2 + 1

    assert count_peak(work) == 3 * 4000


def test_live_bytes_enters_custom_operators():
    @torch.library.custom_op("atom_fast_benchmarks_test::wasteful", mutates_args=())
    def wasteful(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x, x]).sum(0)

    assert count_peak(lambda: wasteful(torch.ones(100))) >= 400 * (1 + 3 + 1)


def test_live_bytes_counts_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as counter:
        y = x.exp().exp()
        held = counter.live
        y.sum().backward()
        del y
    assert held == 8000  # both results are saved for the backward
    assert counter.live == 4000  # the gradient
