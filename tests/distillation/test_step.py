"""One step of Algorithm 1 against the plain loop of ``examples/plain_atom.py``; it never waits nor hides a NaN."""

import collections
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import atom_fast as af
from atom_fast import reference
from atom_fast._device import convolution_precision
from atom_fast._seeds import derive_seed
from atom_fast.data.augmentation import augment, draw_stages
from atom_fast.data.dataset import ImageData
from atom_fast.data.partition import decode
from atom_fast.data.sampling import sample_class_indices
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation import ranks, step
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.distillation.matching import characteristic_loss, draw_frequencies
from atom_fast.distillation.pool import Pool, easiest
from atom_fast.distillation.run import DivergenceError
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation, make_convnet
from atom_fast.ops import native, operators
from benchmarks.digits import plain_loop

ADDITIONS = {
    "partition": 2, "synthetic_batch": 5, "pool_networks": 3, "characteristic_weight": 2.0, "calibration_weight": 0.5,
    "easy_fraction": 0.7, "augmentation": "color+crop_rotate+cutout",
}  # fmt: skip


def make_data(classes=3, per_class=10, channels=3, size=8, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat(per_class)
    noise = torch.rand(len(labels), channels, size, size, generator=generator)
    prototypes = torch.rand(classes, channels, size, size, generator=generator)
    images = ((noise + prototypes[labels]) * 127).to(torch.uint8)
    names = [f"class {k}" for k in range(classes)]
    return ImageData.from_tensors("made", names, images, labels, images[:classes], labels[:classes]).to(device)


def make_run(data=None, name="paper", **settings):
    data = make_data() if data is None else data
    settings = {"ipc": 2, "real_batch": 4, "width": 8, "depth": 3, "loss_scale": 1.0, **settings}
    config = preset(name, **settings).resolve(data.image_shape, data.name, data.train_images.device)
    preprocessing = fit_preprocessing(data.train_images, config.preprocessing, progress=False)
    start, pool = initial_images(config, data, preprocessing), made_pool(config, data)
    return Distillation(config, data, preprocessing, start, pool=pool), preprocessing


def made_pool(config, data):
    """Return a pool of random networks; None where the settings ask for none."""
    if config.pool_networks == 0:
        return None
    generator, network, drawn = torch.Generator().manual_seed(7), make_convnet(config, data.to("cpu")), []
    for _ in range(2 * config.pool_networks):
        network.reset_parameters(generator)
        drawn.append(torch.cat([parameter.reshape(-1) for parameter in network.parameters()]))
    initial, trained = torch.stack(drawn).chunk(2)
    scores = torch.rand(len(data.train_images), generator=generator)
    return Pool(initial, trained, scores, "made").to(data.train_images.device)


@pytest.mark.parametrize("name", ["paper", "channel", "dm"])
def test_steps_equal_the_plain_loop(name, device):
    run, preprocessing = make_run(make_data(device=device), name, loss_scale=3.0, precision="float32")
    start, expected = run.images.clone(), run.images.clone()
    loop = plain_loop(run, preprocessing, expected)
    *_, last_loss = (next(loop).item() for _ in range(6))
    expected = expected.detach()
    for iteration in range(1, 7):
        if iteration == 6:
            run.read_terms()
        run.step(iteration)
    terms = run.read_terms()
    assert (expected - start).abs().max() > 1e-2, "the images must have moved for this to mean anything"
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-5, atol=1e-5)
    assert terms.loss == pytest.approx(last_loss, rel=1e-4)


def test_a_step_with_every_addition_equals_its_definition(device):
    """Lines 3 to 7 in plain PyTorch, from the same random draws."""
    data = make_data(device=device)
    run, preprocessing = make_run(data, loss_scale=3.0, precision="float32", **ADDITIONS)
    sheets, config, pool = run.images.clone().requires_grad_(), run.config, made_pool(run.config, data)
    generator = torch.Generator(device).manual_seed(derive_seed(config.seed, 1))
    network = make_convnet(config, data).to(device)
    number = torch.randint(3, (1,), generator=generator, device=device).item()
    age = torch.rand(1, generator=generator, device=device)
    torch.nn.utils.vector_to_parameters(pool.initial[number].lerp(pool.trained[number], age), network.parameters())
    network.requires_grad_(False)
    indices = sample_class_indices(easiest(data, pool.scores, 0.7), config.real_batch, generator)
    stages = draw_stages(3, generator, strategy=config.augmentation)
    keys = torch.rand(3, 8, generator=generator, device=device)
    frequencies = torch.randn(network.embedding_size, 1024, generator=generator, device=device)
    matched = calibration = characteristic = 0
    for label in range(3):
        of_class = torch.zeros(64, dtype=torch.int64, device=device)
        real = preprocessing.to_model(data.train_images[indices[label]])
        synthetic = decode(sheets[2 * label : 2 * label + 2], 2)[keys[label].topk(5).indices.sort().values]
        for stage in stages:
            own = stage.of_groups(slice(label, label + 1))
            real, synthetic = (augment(images, own, of_class[: len(images)]) for images in (real, synthetic))
        (real_embedding, real_maps), (embedding, maps) = network.features(real), network.features(synthetic)
        attention = sum(
            reference.attention_matching_loss(one, other, spatial_power=4.0, channel_power=4.0)
            for one, other in zip(real_maps[:-1], maps[:-1], strict=True)
        )
        matched = matched + attention + 0.01 * (real_embedding.mean(0) - embedding.mean(0)).square().sum()
        waves = [torch.exp(1j * (F.normalize(one, dim=1) @ frequencies)).mean(0) for one in (real_embedding, embedding)]
        characteristic = characteristic + ((waves[0] - waves[1]).abs() / 2**0.5).mean()
        logits = network.classifier(embedding)
        calibration = calibration + F.cross_entropy(logits, torch.full((5,), label, device=device))
    loss = 3.0 * (matched + 2.0 * characteristic + 0.5 * calibration)
    (gradient,) = torch.autograd.grad(loss, sheets)
    run.step(1)
    torch.testing.assert_close(run.momentum, gradient, rtol=1e-4, atol=1e-6)
    terms = run.read_terms()
    assert terms.calibration_loss == pytest.approx(calibration.item(), rel=1e-5)
    assert terms.characteristic_loss == pytest.approx(characteristic.item(), rel=1e-5)
    assert terms.loss == pytest.approx(loss.item(), rel=1e-5)


def test_characteristic_functions_are_float32_under_bfloat16(device):
    generator = torch.Generator(device).manual_seed(0)
    real, synthetic = (torch.randn(6, 32, generator=generator, device=device) for _ in range(2))
    frequencies = draw_frequencies(32, generator)
    expected = characteristic_loss(real.double(), synthetic.double(), frequencies, 2)
    with convolution_precision("bfloat16", device):
        torch.testing.assert_close(characteristic_loss(real, synthetic, frequencies, 2), expected)


def test_images_that_a_step_does_not_draw_do_not_move():
    run, _ = make_run(ipc=1, partition=2, synthetic_batch=1, momentum=0.0)
    before = run.images.clone()
    run.step(1)
    moved = (run.images != before).any(1)  # [K, H, W]
    quarters = moved.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).any(3).flatten(1)
    assert quarters.sum(1).tolist() == [1, 1, 1]


def test_the_loss_is_made_of_its_terms():
    run, _ = make_run(mmd_weight=0.3, loss_scale=7.0)
    run.step(1)
    run.step(2)
    terms = run.read_terms()
    assert terms.attention_loss > 0
    assert terms.mmd_loss > 0
    assert terms.loss == pytest.approx(7 * (terms.attention_loss + 0.3 * terms.mmd_loss), rel=1e-6)
    assert all(value != value for value in run.read_terms()), "no step, no mean"


def test_only_the_product_of_scale_and_learning_rate_counts():
    one, _ = make_run(loss_scale=100.0, image_lr=0.25)
    other, _ = make_run(loss_scale=1.0, image_lr=25.0)
    for iteration in range(1, 4):
        one.step(iteration)
        other.step(iteration)
    torch.testing.assert_close(one.images, other.images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_agree(backend):
    one, _ = make_run()
    other, _ = make_run()
    one.step(1)
    with af.backend(backend):
        other.step(1)
    torch.testing.assert_close(one.images, other.images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"norm": "batch"}, {"pooling": "avg3"}, {"depth": 1, "mmd_weight": 1.0},
                                      {"augmentation": "none"}, {"precision": "bfloat16"}, {"image_init": "noise"},
                                      {"spatial_power": 1.0, "channel_power": 8.0}])  # fmt: skip
def test_every_setting_moves_the_images(settings):
    run, _ = make_run(loss_scale=10.0, **settings)
    before = run.images.detach().clone()
    for iteration in range(1, 4):
        run.step(iteration)
    run.read_terms()
    moved = (run.images - before).flatten(1).norm(dim=1)
    assert (moved > 0).all()
    assert torch.isfinite(run.images).all()


def test_an_iteration_depends_on_its_number_and_the_seed_alone():
    one, _ = make_run(seed=5)
    other, _ = make_run(seed=5)
    torch.manual_seed(1)
    one.step(3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other.generator.manual_seed(99)
    other.step(3)
    assert torch.equal(one.images, other.images)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    for changed in (make_run(seed=6)[0], make_run(seed=5)[0]):
        changed.step(4)
        assert not torch.equal(one.images, changed.images)


def test_seeds_do_not_repeat():
    seeds = [derive_seed(seed, index) for seed in range(100) for index in range(300)]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(1, 2) != derive_seed(2, 1)
    ones = [sum(seed >> bit & 1 for seed in seeds) / len(seeds) for bit in range(64)]
    assert all(0.45 < share < 0.55 for share in ones)


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_dispatches_as_many_operators_for_2_classes_as_for_100_and_reads_nothing_back():
    counts = []
    for classes in (2, 100):
        run, _ = make_run(make_data(classes=classes))
        run.step(1)
        with Operators() as operators:
            run.step(2)
        counts.append(operators.counts)
    assert counts[0] == counts[1]
    assert counts[0].total() <= 250
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "item", "is_nonzero", "equal"}
    assert not waiting & counts[0].keys()


def test_nine_frames_lead_from_distill_to_a_kernel(tmp_path, monkeypatch):
    """Of this package, `distill` the first, without what leads from an operator's call to its body."""
    if not native.is_built():
        pytest.skip("needs the kernels in C")
    package, depths = str(Path(af.__file__).parent), []
    run = native.run

    def counted(*arguments):
        frame, names = sys._getframe(1), []
        while frame.f_code is not distill.__code__:
            code = frame.f_code
            if code.co_filename.startswith(package) and code.co_filename != operators.__file__:
                names += [code.co_name] if code.co_name != "<listcomp>" else []  # from Python 3.12 on it has no frame
            frame = frame.f_back
        depths.append(["distill", *names[::-1]])
        return run(*arguments)

    monkeypatch.setattr(native, "run", counted)
    config = preset(ipc=2, real_batch=4, width=16, depth=2, iterations=1)
    distill(make_data(), config, tmp_path / "run", progress=False, device="cpu")
    assert len(depths) >= 6
    assert max(map(len, depths)) <= 9, max(depths, key=len)


def test_a_step_leaves_no_memory_behind():
    run, _ = make_run()
    run.step(1)
    before = run.images.data_ptr(), run.momentum.data_ptr()
    run.step(2)
    assert before == (run.images.data_ptr(), run.momentum.data_ptr())
    assert run.images.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in run.network.parameters())


def test_restoring_goes_on_with_the_same_bits():
    straight, _ = make_run()
    for iteration in range(1, 4):
        straight.step(iteration)
    state = {name: tensor.clone() for name, tensor in straight.state().items()}
    resumed, _ = make_run(image_init="noise")
    resumed.restore(state)
    for run in (straight, resumed):
        run.step(4)
        run.step(5)
    assert torch.equal(straight.images, resumed.images)
    assert torch.equal(straight.momentum, resumed.momentum)


def test_the_average_weighs_step_t_by_the_third_power_of_t(device):
    """Its weights are the binomials t (t + 1) (t + 2) / 6, whatever the number of steps; no step depends on it."""
    data = make_data(device=device)
    run, _ = make_run(data, image_average=True, loss_scale=100.0)
    plain, _ = make_run(data, loss_scale=100.0)
    assert plain.average is None
    assert torch.equal(run.result, run.images), "before the first step"
    weighted, total = 0.0, 0
    for t in range(1, 8):
        run.step(t)
        plain.step(t)
        weight = t * (t + 1) * (t + 2) // 6
        weighted, total = weighted + weight * run.images.double(), total + weight
        torch.testing.assert_close(run.average.double(), weighted / total, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(run.images, plain.images, rtol=1e-6, atol=1e-6)
    assert run.result is run.average
    assert (run.average - run.images).norm() > 1e-3 * run.images.norm(), "images that move have another mean"


def test_the_average_is_part_of_the_state():
    straight, _ = make_run(image_average=True)
    for iteration in range(1, 4):
        straight.step(iteration)
    resumed, _ = make_run(image_average=True, image_init="noise")
    with pytest.raises(ValueError, match=r"average must be \[6, 3, 8, 8\]; got nothing"):
        resumed.restore({"images": straight.images, "momentum": straight.momentum})
    resumed.restore(straight.state())
    for run in (straight, resumed):
        run.step(4)
    assert torch.equal(straight.average, resumed.average)
    before = resumed.average.clone()
    with resumed._unchanged():
        resumed.step(5)
    assert torch.equal(resumed.average, before), "a capture's steps must not move it"


def test_a_state_that_does_not_fit_is_refused():
    run, _ = make_run()
    with pytest.raises(ValueError, match=r"momentum must be \[6, 3, 8, 8\]; got nothing"):
        run.restore({"images": run.images})
    with pytest.raises(ValueError, match=r"images must be \[6, 3, 8, 8\]; got \[5, 3, 8, 8\]"):
        run.restore({"images": run.images[:5], "momentum": run.momentum})


def test_images_start_as_distinct_real_images_of_their_class():
    data = make_data(classes=4, per_class=6)
    run, preprocessing = make_run(data, ipc=6)
    real = preprocessing.to_model(data.train_images)
    match = (run.images.detach()[:, None] == real[None]).flatten(2).all(dim=2)
    assert (match.sum(dim=1) == 1).all()
    assert (match.sum(dim=0) == 1).all()
    assert torch.equal(data.train_labels[match.int().argmax(dim=1)], run.labels)
    assert torch.equal(run.labels, torch.arange(4).repeat_interleave(6))


def test_noise_has_unit_variance_and_the_seed_counts():
    data = make_data(size=32)
    runs = [make_run(data, image_init="noise", ipc=10, seed=seed)[0].images.detach() for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert runs[0].std().item() == pytest.approx(1, abs=0.02)


def test_what_does_not_fit_the_data_is_refused():
    with pytest.raises(ValueError, match="class 0.*10 training images.*12 different ones per class.*noise"):
        make_run(ipc=12)
    run, preprocessing = make_run()
    with pytest.raises(ValueError, match=r"\[6, 3, 8, 8\]; got \[5, 3, 8, 8\]"):
        Distillation(run.config, run.data, preprocessing, run.images[:5])


def test_a_term_that_is_not_finite_is_named_with_its_iteration():
    run, _ = make_run(augmentation="none")
    run.step(1)
    run.step(2)
    with torch.no_grad():
        run.images[2:4] = float("nan")
    run.step(3)
    run.step(4)
    with pytest.raises(DivergenceError, match="attention_loss at iteration 3.*1 of 3 classes: class 1"):
        run.read_terms()


def test_images_that_are_not_finite_are_noticed_before_a_loss_is():
    run, _ = make_run()
    run.step(1)
    with torch.no_grad():
        run.images[0, 0, 0, 0] = float("inf")
    with pytest.raises(DivergenceError, match="in the images.*class 0"):
        run.read_terms()


@pytest.mark.parametrize(
    ("loss_scale", "message"), [(1e30, "NaN or infinity in the images"), (10.0, r"images diverged: \d.*e\+\d\d times")]
)
def test_images_far_outside_of_the_data_are_noticed_and_the_setting_is_named(loss_scale, message):
    run, _ = make_run(image_lr=1e30, loss_scale=loss_scale)
    run.step(1)
    with pytest.raises(DivergenceError, match=f"{message}.*iteration 1.*3 of 3 classes") as stop:
        run.read_terms()
    assert str(stop.value).endswith(f"lower image_lr (it is 1e+30) or loss_scale ({loss_scale:g})")


@pytest.mark.parametrize("settings", [{}, ADDITIONS])
def test_parts_of_the_classes_have_the_images_and_terms_of_all(settings):
    data = make_data(5)
    whole, preprocessing = make_run(data, **settings)
    start, pool = whole.images.clone(), whole.pool
    parts = [
        Distillation(
            whole.config, data, preprocessing, start[2 * own.start : 2 * own.stop], classes=own, pool=pool
        ) for own in (range(2), range(2, 5))
    ]  # fmt: skip
    for iteration in (1, 2):
        for run in (whole, *parts):
            run.step(iteration)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    readings = [part.read() for part in parts]
    assert whole.terms(readings) == pytest.approx(whole.read_terms(), rel=1e-5)
    with torch.no_grad():
        parts[1].images[2] = float("nan")
    with pytest.raises(DivergenceError, match="1 of 5 classes: class 3"):
        whole.terms([part.read() for part in parts])


def test_precision_is_put_back():
    before = torch.backends.cudnn.conv.fp32_precision
    with convolution_precision("float32", torch.device("cpu")):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    with pytest.raises(KeyError), convolution_precision("bfloat16", torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu")
        raise KeyError
    assert torch.backends.cudnn.conv.fp32_precision == before
    assert not torch.is_autocast_enabled("cpu")


def test_a_graph_needs_a_gpu():
    run, _ = make_run()
    with pytest.raises(RuntimeError, match="GPU.*cpu"):
        run.capture()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "bfloat16"}, {"spatial_power": None}, {"norm": "batch"}, {"image_average": True}, ADDITIONS],
)
def test_a_captured_step_gives_the_same_images(settings):
    data = make_data(classes=5, size=32, device="cuda")
    eager, _ = make_run(data, **settings)
    captured, _ = make_run(data, **settings)
    start = captured.images.detach().clone()
    captured.capture()
    assert torch.equal(captured.images, start), "capturing must not move the images"
    for iteration in range(1, 6):
        eager.step(iteration)
        captured.step(iteration)
    torch.testing.assert_close(captured.images, eager.images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(captured.result, eager.result, rtol=1e-5, atol=1e-5)
    for one, other in zip(captured.read_terms(), eager.read_terms(), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    before = captured.images.detach().clone()
    captured.step(6)
    assert not torch.equal(captured.images, before)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, ADDITIONS])
@pytest.mark.parametrize("graph", [False, True])
def test_a_step_never_waits_for_the_device(graph, settings):
    run, _ = make_run(make_data(classes=5, size=32, device="cuda"), **settings)
    run.step(1)
    if graph:
        run.capture()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step(2)
        run.step(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.read_terms()


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("torch", {}),
        ("triton", {}),
        ("torch", ADDITIONS),
        ("torch", {"norm": "batch"}),
        ("torch", {**ADDITIONS, "norm": "batch"}),
    ],
)
def test_chunks_of_classes_give_the_gradients_of_all_at_once(backend, settings, place):
    """Chunks of two classes and of one, by one setting."""
    results = []
    settings = {**settings, "real_batch": 2, "width": 4, "depth": 2}
    for chunk in (None, 2):
        run = make_run(make_data(3, device=place), class_chunk=chunk, **settings)[0]
        with af.backend(backend):
            run.step(1)
        results.append(run.momentum.double())
    assert (results[1] - results[0]).norm() <= 1e-6 * results[0].norm()


@pytest.mark.parametrize("setting", [{"feature_maps": True}, {"pooling": "max2"}])
def test_chunks_are_refused_where_nothing_joins_the_classes_that_the_norm_couples(setting, device):
    with pytest.raises(ValueError, match="class_chunk must be all 4 classes; got 2: norm 'batch' computes"):
        make_run(make_data(4, device=device), class_chunk=2, norm="batch", **setting)
    make_run(make_data(4, device=device), class_chunk=2, **setting)
    with pytest.raises(ValueError, match="class_chunk must be .*; got 0"):
        make_run(make_data(4, device=device), class_chunk=0)[0]


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_batch_norm_gathers_three_times_a_block(chunk, monkeypatch):
    """Statistics of real and of synthetic images, and the sums of the gradient, whatever the chunk."""
    gathered = []
    monkeypatch.setattr(ranks, "all_gather", lambda part, classes: gathered.append(part) or part)
    run = make_run(make_data(4), norm="batch", depth=2, class_chunk=chunk)[0]
    run.step(1)
    assert [list(part.shape) for part in gathered] == [[4, 2, run.config.width]] * 6


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_running_out_of_memory_halves_the_chunk_and_goes_on_from_the_same_step(device, norm, monkeypatch, capsys):
    expected, run = (make_run(make_data(4, device=device), norm=norm)[0] for _ in range(2))
    for iteration in (1, 2):
        expected.step(iteration)
    match = step.matching_terms

    def limited(real, *rest):
        if len(real[0]) > run.config.real_batch:
            raise torch.OutOfMemoryError("out of memory")
        return match(real, *rest)

    run.step(1)
    monkeypatch.setattr(step, "matching_terms", limited)
    run.step(2)
    assert run.class_chunk == 1
    assert "out of memory with 4 classes at once: continuing with 2" in capsys.readouterr().err
    assert (run.images - expected.images).norm() <= 1e-6 * expected.images.norm()
    before = run.images.clone()
    monkeypatch.setattr(step, "matching_terms", lambda *_: limited([range(1000)]))
    with pytest.raises(torch.OutOfMemoryError):
        run.step(3)
    assert torch.equal(run.images, before)


def test_an_error_that_is_not_about_memory_is_not_retried(device, monkeypatch):
    run = make_run(make_data(4, device=device))[0]

    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(step, "matching_terms", broken)
    with pytest.raises(RuntimeError, match="something else"):
        run.step(1)
    assert run.class_chunk == 4
