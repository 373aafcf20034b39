"""FRePo: its regression and optimisers against plain formulas, a step against a plain loop, and whole runs."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_fast.data.sampling import sample_class_indices
from atom_fast.data.sources import load_data
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.distillation.methods import frepo, make_run
from atom_fast.distillation.run import DivergenceError
from atom_fast.distillation.start import initial_images
from atom_fast.evaluation.accuracy import evaluate
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import get_protocol
from tests.distillation.test_step import make_data

SMALL = {"method": "frepo", "ipc": 2, "real_batch": 4, "width": 8, "depth": 2, "checkpoint_every": 1, "log_every": 1}


def small(**changed):
    return preset(**{**SMALL, "iterations": 4, **changed})


def learner(data=None, **changed):
    data = make_data() if data is None else data
    config = small(**changed).resolve(data.image_shape, data.name, data.train_images.device)
    preprocessing = fit_preprocessing(data.train_images, config.preprocessing, progress=False)
    return make_run(config, data, preprocessing, initial_images(config, data, preprocessing), progress=False)


def named(data, name):
    """Return data under the name of another data set, whose settings they get."""
    object.__setattr__(data, "name", name)
    return data


def plain_regression(s, y, t, targets):
    kernel = s @ s.T
    kernel = kernel + 1e-6 * kernel.trace() / len(s) * torch.eye(len(s), dtype=s.dtype)
    predicted = t @ s.T @ torch.linalg.inv(kernel) @ y
    return 0.5 * (predicted - targets).square().sum(1).mean()


@given(n=st.integers(1, 12), size=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_regression_and_its_gradients_equal_autograd(n, size, seed):
    generator = torch.Generator().manual_seed(seed)
    # More images than features would have a kernel of no full rank, whose gradients no arithmetic has exactly.
    s = torch.randn(n, max(size, n), generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_()
    t = torch.randn(5, s.shape[1], generator=generator, dtype=torch.float64)
    targets = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    loss = plain_regression(s, y, t, targets)
    expected = torch.autograd.grad(loss, [s, y])
    fit = frepo.ridge_regression(s, y, t, targets)
    torch.testing.assert_close(fit.loss, loss.detach(), rtol=1e-6, atol=1e-9)
    for found, wanted in zip((fit.of_embedding, fit.of_labels), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * max(1.0, wanted.abs().max().item()))


def test_regression_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(0)
    s, y, t, targets = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 9), (4, 3), (6, 9), (6, 3))
    )
    fit = frepo.ridge_regression(s, y, t, targets)
    for name, gradient in (("s", fit.of_embedding), ("y", fit.of_labels)):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-5, -1e-5):
            moved = {"s": s, "y": y} | {name: (s if name == "s" else y) + step * direction}
            losses.append(frepo.ridge_regression(moved["s"], moved["y"], t, targets).loss.item())
        assert (gradient * direction).sum().item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


def test_regression_of_500_float32_images_is_well_conditioned():
    """Embeddings after ReLU have a large mean, each flipped copy is nearly its image: float32 kernels fail there."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(250, 512, generator=generator)
    s = torch.cat([image, image + 1e-3 * torch.randn(250, 512, generator=generator)])
    y, t, targets = frepo_labels(50, 10), torch.rand(20, 512, generator=generator), frepo_labels(2, 10)
    exact = plain_regression(s.double(), y.double(), t.double(), targets.double()).item()
    fit = frepo.ridge_regression(s, y, t, targets)
    assert fit.loss.item() == pytest.approx(exact, rel=1e-6)
    assert all(part.isfinite().all() for part in fit)
    in_float32 = plain_regression(s, y, t, targets).item()
    assert not abs(in_float32 - exact) < 0.01 * exact


def frepo_labels(ipc, classes):
    return (torch.eye(classes) - 1 / classes).repeat_interleave(ipc, dim=0)


def test_embeddings_without_a_positive_definite_kernel_have_a_loss_of_nan():
    zeros, y = torch.zeros(3, 4), torch.eye(3)
    assert frepo.ridge_regression(zeros, y, torch.ones(2, 4), torch.zeros(2, 3)).loss.isnan()
    assert frepo.ridge_regression(zeros + math.nan, y, torch.ones(2, 4), torch.zeros(2, 3)).loss.isnan()


def test_label_margin_pulls_only_where_it_is_small():
    labels = torch.tensor([[0.9, -0.1, 0.0], [0.1, 0.3, 0.0]])
    margin, gradient = frepo.label_margin(labels)
    assert margin.item() == pytest.approx((1 / 3 + 0.2) / 2)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.0], [-0.5, 0.5, 0.0]]))


def test_adam_is_pytorchs():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, generator=generator)
    parameter, moments = torch.nn.Parameter(values.clone()), torch.zeros(2, 7)
    optimizer = torch.optim.Adam([parameter], lr=0.01)
    for step in range(1, 6):
        parameter.grad = torch.randn(7, generator=generator)
        optimizer.step()
        values -= 0.01 * frepo.adam_direction(parameter.grad, moments, torch.tensor(step), 1e-8)
    torch.testing.assert_close(values, parameter.detach())


def test_lamb_moves_values_by_the_rate_times_their_norm():
    values, moments = torch.full((4,), 3.0), torch.zeros(2, 4)
    before = values.clone()
    frepo.lamb_step(values, torch.tensor([1.0, -2.0, 3.0, 4.0]), moments, torch.tensor(1), torch.tensor(0.1))
    assert (values - before).norm().item() == pytest.approx(0.1 * before.norm().item())
    assert ((values - before).sign() == torch.tensor([-1.0, 1.0, -1.0, -1.0])).all()
    zero = torch.zeros(4)  # values of norm 0 would never move
    frepo.lamb_step(zero, torch.ones(4), torch.zeros(2, 4), torch.tensor(1), torch.tensor(0.1))
    assert (zero != 0).all()


@pytest.mark.parametrize("flips", [False, True])
def test_a_step_equals_a_plain_loop(flips):
    data = named(make_data(size=16), "cifar10" if flips else "made")
    run = learner(data, preprocessing="standard", seed=3)
    images, labels = run.images.clone().requires_grad_(), run.labels.clone().requires_grad_()
    before = {name: part.clone() for name, part in run.state().items()}
    # The same draws: the network, then the real images.
    generator = torch.Generator()
    run.step(1)
    generator.manual_seed(frepo.derive_seed(3, 1))
    network = run.pool.__class__.draw(copied(run, before), generator)
    real = run._gather_real(sample_class_indices(data, 4, generator))

    def embed(x):
        for block in network.blocks:
            x = F.avg_pool2d(F.relu(F.instance_norm(F.conv2d(x, block.convolution.weight, padding=1))), 2)
        return x.flatten(1)

    used = torch.cat([images, images.flip(3)]) if flips else images
    y = labels.repeat(2, 1) if flips else labels
    targets = frepo_labels(4, 3).double()
    loss = plain_regression(embed(used).double(), y.double(), embed(real).detach().double(), targets)
    of_images, of_labels = torch.autograd.grad(loss, [images, labels], retain_graph=True)
    terms = run.read_terms()
    assert terms.regression_loss == pytest.approx(loss.item(), rel=1e-4)
    assert terms.label_loss == pytest.approx(-1 / 3)
    # The first average is a tenth of the gradient.
    for found, wanted in ((run.image_moments[0], of_images), (run.label_moments[0], of_labels)):
        torch.testing.assert_close(10 * found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())

    fit = 0.5 * (network.classifier(embed(used)) - y.detach()).square().sum(1).mean()
    wanted = torch.autograd.grad(fit, [network.blocks[1].convolution.weight, network.classifier.weight])
    drawn = int(run.pool.ages.argmax())
    assert run.pool.ages.sum() == 1
    changed = (run.pool.weights != before["network_weights"]).any(1)
    assert changed.tolist() == [number == drawn for number in range(frepo.NETWORKS)]
    flat = 10 * run.pool.moments[0, drawn]
    sizes = [parameter.numel() for parameter in network.parameters()]
    found = dict(zip([name for name, _ in network.named_parameters()], flat.split(sizes), strict=True))
    for name, gradient in zip(("blocks.1.convolution.weight", "classifier.weight"), wanted, strict=True):
        torch.testing.assert_close(found[name], gradient.flatten(), rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def copied(run, state):
    """Return the pool of a run as a state has it."""
    pool = frepo.OnlinePool(run.config, run.data, run.images.device)
    pool.weights.copy_(state["network_weights"])
    return pool


def test_networks_are_drawn_anew_at_their_age(monkeypatch):
    monkeypatch.setattr(frepo, "NETWORK_STEPS", 2)
    monkeypatch.setattr(frepo, "NETWORKS", 1)
    run = learner()
    first = run.pool.weights.clone()
    run.step(1)
    distance = (run.pool.weights - first).abs().max().item()
    assert run.pool.ages.tolist() == [1]
    assert 0 < distance <= 1.01 * frepo.NETWORK_RATE
    assert (run.pool.moments[0] != 0).any()
    run.step(2)
    assert run.pool.ages.tolist() == [0]
    assert (run.pool.weights - first).abs().max() > 100 * frepo.NETWORK_RATE
    assert not run.pool.moments.any()


def test_the_rate_falls_to_a_tenth():
    run = learner(iterations=1001, image_lr=2.0)
    rates = []
    for iteration in (1, 501, 1001):
        run._iteration.fill_(iteration)
        rates.append(run._rate().item())
    assert rates == pytest.approx([2.0, 1.1, 0.2], rel=2e-3)


@pytest.mark.parametrize("classes", [2, 10, 25])
def test_labels_begin_as_hard_ones_and_stay_probabilities(classes):
    run = learner(make_data(classes=classes))
    torch.testing.assert_close(run.soft_labels, torch.eye(classes).repeat_interleave(2, dim=0), atol=1e-5, rtol=0)
    torch.testing.assert_close(run.labels.sum(1), torch.zeros(len(run.labels)), atol=1e-6, rtol=0)
    run.labels.sub_(5.0)  # nothing is left above 0
    torch.testing.assert_close(run.soft_labels, torch.full_like(run.labels, 1 / classes))


def test_twenty_steps_lower_the_loss_on_digits():
    data = load_data("digits")
    run = learner(data, real_batch=10, iterations=20, image_lr=0.01)
    losses = []
    for iteration in range(1, 21):
        run.step(iteration)
        losses.append(run.read_terms().loss)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(frepo, "NETWORKS", 2)  # so that networks are drawn again after the stop
    data = make_data()
    whole = distill(data, small(), tmp_path / "whole", progress=False, device="cpu")
    step = frepo.Learner._step

    def stop(run):
        if int(run._iteration) == 3:
            raise RuntimeError("stopped")
        step(run)

    monkeypatch.setattr(frepo.Learner, "_step", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        distill(data, small(), tmp_path / "run", progress=False, device="cpu")
    monkeypatch.setattr(frepo.Learner, "_step", step)
    resumed = distill(data, small(), tmp_path / "run", resume=True, progress=False, device="cpu")
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.soft_labels, whole.soft_labels)
    assert not torch.equal(whole.soft_labels, frepo_labels(2, 3) + 1 / 3)


def test_learnt_labels_are_saved_and_trained_on(tmp_path):
    data = make_data()
    distill(data, small(image_lr=0.05), tmp_path / "run", progress=False, device="cpu")
    saved = SyntheticSet.load(tmp_path / "run")
    assert saved.soft_labels.shape == (6, 3)
    assert saved.soft_labels.max() < 0.9999
    assert torch.equal(saved.soft_labels.argmax(1), saved.labels)
    protocol = get_protocol("dc", epochs=2)
    result = evaluate(saved, data, networks=1, protocol=protocol, progress=False)
    assert result.about["method"] == "frepo"
    assert 0 <= result.mean <= 100


def test_images_that_are_lost_name_the_last_good_checkpoint(tmp_path):
    with pytest.raises(DivergenceError, match=r"lower image_lr .*last good checkpoint is .*iteration-0000000"):
        distill(make_data(), small(image_lr=1e30), tmp_path / "run", progress=False, device="cpu")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"momentum": 0.9}, "method 'frepo' has no momentum; got 0.9: leave it at 0.5"),
        ({"augmentation": "color"}, "method 'frepo' has no augmentation; got 'color': leave it at 'none'"),
        ({"norm": "batch"}, "method 'frepo' needs a norm of each sample; got 'batch': use instance"),
        ({"label_lr": 0.1}, "method 'frepo' has no label_lr; got 0.1: leave it at None"),
        ({"partition": 2}, "method 'frepo' has no partition; got 2: leave it at 1"),
    ],
)
def test_settings_that_frepo_cannot_use_are_named_before_work_starts(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill(make_data(), small(**changed), tmp_path / "run", progress=False, device="cpu")
    assert not (tmp_path / "run").exists()


def test_one_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="method 'frepo' needs at least 2 classes; made has 1"):
        distill(make_data(classes=1), small(), tmp_path / "run", progress=False, device="cpu")


def test_embeddings_of_fewer_values_than_images_are_named(capsys):
    learner(width=1, depth=2, ipc=2)  # 1 channel of 2x2
    assert "embeddings of more values than there are images: 4 are fewer than 6" in capsys.readouterr().err


def test_published_settings():
    cifar = preset(method="frepo", ipc=10).for_data((3, 32, 32), "cifar10")
    assert (cifar.image_lr, cifar.preprocessing, cifar.norm) == (3e-4, "zca_standardized", "instance")
    assert preset(method="frepo").for_data((1, 8, 8), "digits").depth == 2
    assert preset(method="frepo").for_data((3, 64, 64), "tiny").preprocessing == "standard"
    assert preset(method="frepo", preprocessing="zca").for_data((3, 32, 32), "cifar10").preprocessing == "zca"
