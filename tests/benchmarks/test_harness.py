"""The benchmarks' opponents take honest steps, and what was measured is never lost."""

import dataclasses
import json
import re
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F

import atom_fast as af
from atom_fast import reference
from benchmarks import (
    cells,
    compare,
    digits,
    gpu,
    harness,
    operators,
    plots,
    report,
    reproduction,
    scaling,
    summary,
    table3,
)
from benchmarks.__main__ import main
from benchmarks.live_bytes import LiveBytes, count_peak
from benchmarks.merging import merge
from benchmarks.methods import (
    ALL_IMPLEMENTATIONS,
    METHODS,
    Workload,
    attention,
    batched,
    build_step,
    dc,
    dm,
    fused,
    mtt,
    published,
)
from benchmarks.methods import batched_augmentation as batch_wise

SMALL = Workload(
    "atom", "eager", ipc=2, classes=3, resolution=16, class_images=12, real_batch=4, width=8, precision="float32",
    device="cpu", inner_divisor=10,
)  # fmt: skip


def small(method, implementation="eager", **changes):
    return dataclasses.replace(SMALL, method=method, implementation=implementation, **changes)


def images(count, seed=0, **changes):
    workload = dataclasses.replace(SMALL, **changes)
    shape = (count, workload.channels, workload.resolution, workload.resolution)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return published.fresh_network(SMALL)


# The network and the augmentation


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


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("seed", range(12))
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


# Every method's step


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("implementation", ["eager-batched", "fused"])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "fused" in method.implementations])
def test_providers_reach_the_loss_of_eager(method, implementation):
    """Their random numbers differ, so single steps do too; the mean over many is one expectation for all."""
    workload = small(method, real_batch=6, ipc=6, class_images=64)
    eager, other = (mean_loss(build_step(dataclasses.replace(workload, implementation=name))) for name in ("eager", implementation))
    assert other == pytest.approx(eager, rel=0.2)


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


def test_unknown_method_and_provider():
    with pytest.raises(ValueError, match=r"method must be one of dc, .*'nope'"):
        build_step(small("nope"))
    with pytest.raises(ValueError, match=r"implementation of dc must be one of eager; got 'fused'"):
        build_step(small("dc", "fused"))
    with pytest.raises(ValueError, match="7"):
        build_step(small("dc", ipc=7))


# Memory


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


# Measuring

PLAN = harness.Plan(iterations=4, seconds=5, limit=60)


def test_cell_is_measured_in_its_own_process():
    record = harness.run_cell(small("dm"), PLAN)
    assert record["status"] == "ok" and len(record["seconds"]) == record["time"]["iterations"] == 4
    assert record["time"]["q20"] <= record["time"]["median"] <= record["time"]["q80"]
    assert record["memory"]["peak_allocated"] > 0


def test_on_a_cpu_a_cell_takes_turns_with_eager():
    plan = dataclasses.replace(PLAN, seconds=0.5, beside_eager=True)
    record = harness.run_cell(small("dm", implementation="fused"), plan)
    assert record["status"] == "ok", record
    assert 0 < record["share_of_eager"] < 100
    assert sum(record["seconds"]) > 3 * harness.TURN and sum(record["eager_seconds"]) > 3 * harness.TURN
    assert "share_of_eager" not in harness.run_cell(small("dm"), plan)  # eager itself


def test_the_share_is_of_neighbouring_turns(monkeypatch):
    """A machine half as fast from some turn on leaves the share as it is."""
    speeds = iter([1, 1, 2, 2, 2, 2, 2, 2])
    monkeypatch.setattr(harness, "_clocked", lambda step: (next(speeds) * step(), 7.0))
    sent = []

    class Neighbour:
        def send(self, message):
            sent.append(message)

        def recv(self):
            return "ready" if len(sent) == 1 else [next(speeds) * 0.8]

    plan = dataclasses.replace(PLAN, seconds=6)
    seconds, beside, loss = harness._time_in_turns(lambda: 0.2, Neighbour(), plan)
    assert sent == ["prepare", True, True, True, True, False] and loss == 7.0
    assert seconds == [0.2, 0.4, 0.4, 0.4] and beside["eager_seconds"] == [0.8, 1.6, 1.6, 1.6]
    assert beside["share_of_eager"] == pytest.approx(0.25)


def test_cells_beside_which_eager_was_slow_are_measured_again(tmp_path, monkeypatch):
    """Once each, the slowest first; kept is what was measured beside a faster eager."""
    answers = {"compile": [1.0], "fused": [1.5, 1.4], "eager-batched": [1.2, 1.3], "fused-graph": [1.05]}
    measured = []

    def run_cell(workload, plan):
        measured.append(workload.implementation)
        seconds = answers[workload.implementation].pop(0)
        record = {"status": "ok", "share_of_eager": 1 / seconds, "eager_seconds": [seconds]}
        return {**record, "time": harness.summary([1.0]), "memory": {"peak_allocated": None}}

    monkeypatch.setattr(cells, "run_cell", run_cell)
    path, chosen = tmp_path / "results.json", [small("dm", implementation=implementation) for implementation in answers]
    cells.measure_cells(path, "table3", "cpu", chosen, PLAN)
    del measured[:]
    cells.measure_slow_again(path, chosen, PLAN, deadline=0.0)
    assert not measured, "there was no time left"
    for _ in range(2):
        cells.measure_slow_again(path, chosen, PLAN)
        assert measured == ["fused", "eager-batched"]
    kept = {record["workload"]["implementation"]: record["eager_seconds"] for record in harness.load_results(path)["cells"]}
    assert kept == {"compile": [1.0], "fused": [1.4], "eager-batched": [1.2], "fused-graph": [1.05]}


def test_out_of_memory_is_an_entry():
    record = harness.run_cell(small("dm", class_images=10**12), PLAN)
    assert record["status"] == "OOM"


def test_cell_that_fails_or_takes_too_long_is_an_entry():
    assert harness.run_cell(small("dm", real_batch=0, ipc=-1), PLAN)["status"] == "failed"
    assert harness.run_cell(small("dm"), dataclasses.replace(PLAN, limit=0.01))["status"] == "timeout"


def test_summary():
    figures = harness.summary([4.0, 1.0, 2.0, 3.0, 5.0])
    assert figures["median"] == 3 and figures["mean"] == 3 and figures["std"] == pytest.approx(2**0.5)
    assert harness.summary([2.0])["q80"] == 2.0


@pytest.fixture
def edition(monkeypatch):
    """An edition of two cells that are not really measured; returns how often each was."""
    counts = {}

    def run_cell(workload, plan):
        key = workload.method, workload.implementation
        counts[key] = counts.get(key, 0) + 1
        if workload.method == "mtt":
            return {"status": "OOM", "message": "", "cell_seconds": 0}
        seconds = [0.1 / (1 + METHODS[workload.method].implementations.index(workload.implementation))] * 3
        memory = {"counted": "", "peak_allocated": 10**7 * len(workload.implementation)}
        return {"status": "ok", "time": harness.summary(seconds), "memory": memory, "seconds": seconds}

    monkeypatch.setattr(cells, "run_cell", run_cell)
    return counts


def test_second_call_continues(edition, tmp_path):
    path = table3.run("cpu", tmp_path, methods=["atom"], ipcs=[1])
    implementations = set(ALL_IMPLEMENTATIONS) - {"fused-graph"}
    assert edition == {("atom", implementation): 1 for implementation in implementations}
    table3.run("cpu", tmp_path, methods=["atom", "mtt"], ipcs=[1])
    table3.run("cpu", tmp_path, methods=["atom", "mtt"], ipcs=[1])
    assert set(edition.values()) == {1}
    results = json.loads(path.read_text())
    assert len(results["cells"]) == 5
    assert {"device", "driver", "torch", "triton", "commit", "clean", "source"} <= results["environment"].keys()


def test_what_failed_is_tried_again_and_what_was_measured_is_kept(edition, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "run_cell", lambda workload, plan: {"status": "failed", "message": "gone"})
    path = table3.run("cpu", tmp_path, methods=["dc"], ipcs=[1])
    assert json.loads(path.read_text())["cells"][0]["status"] == "failed"
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(cells, "run_cell", lambda workload, plan: {"status": "OOM", "message": ""})
        table3.run("cpu", tmp_path, methods=["dc"], ipcs=[1])
    (cell,) = json.loads(path.read_text())["cells"]
    assert cell["status"] == "OOM"


def test_every_edition_has_all_seven_methods():
    for edition in table3.EDITIONS.values():
        cells = table3.settings(edition)
        assert {cell.method for cell in cells} == set(METHODS)
        assert len(set(cells)) == len(cells)
        assert all(cell.device == edition.device for cell in cells)


def test_a_version_is_named_by_its_kernels_too(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "MEASURED", ("kernels",))
    (tmp_path / "kernels").mkdir()
    found = {harness.source_identity()}
    for name in ("norm_block.py", "norm_block.c", "norm_block.h"):
        (tmp_path / "kernels" / name).write_text("one")
        found.add(harness.source_identity())
        (tmp_path / "kernels" / name).write_text("two")
        found.add(harness.source_identity())
    assert len(found) == 7


def test_figures_of_another_version_are_neither_mixed_nor_overwritten(edition, tmp_path):
    path = table3.run("cpu", tmp_path, methods=["dm"], ipcs=[1])
    results = json.loads(path.read_text())
    results["environment"]["source"] = "0123456789ab"
    path.write_text(json.dumps(results))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="source '0123456789ab'"):
        table3.run("cpu", tmp_path, methods=["atom"], ipcs=[1])
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["{ not json", "[]", '{"format": 99, "cells": []}', '{"format": 1}'])
def test_corrupt_results_are_refused_and_left(edition, tmp_path, content):
    path = table3.results_path(tmp_path, "cpu")
    path.write_text(content)
    with pytest.raises(ValueError, match="table3-cpu.json"):
        table3.run("cpu", tmp_path)
    assert path.read_text() == content and not edition


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--edition", "tpu"], "edition must be one of gpu, cpu; got 'tpu'"),
        (["--method", "nope"], "method must be one of"),
        (["--implementation", "nope"], "implementation must be one of"),
        (["--ipc", "3"], "ipc must be one of 1, 10; got 3"),
        (["--iterations", "0"], "--iterations must be above 0"),
    ],
)
def test_bad_names_are_named(arguments, words, tmp_path, capsys):
    assert main(["table3", "--out", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_edition_without_a_gpu(tmp_path, capsys):
    assert main(["table3", "--edition", "gpu", "--out", str(tmp_path)]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


# Showing


@pytest.fixture
def measured(edition, tmp_path):
    """A folder with results of Table 3's CPU edition, and pages with every mark beside it."""
    table3.run("cpu", tmp_path / "results")
    write_pages(tmp_path)
    return tmp_path


def write_pages(root):
    (root / "docs").mkdir(exist_ok=True)
    for page, sections in report.pages(root / "results").items():
        marks = "\n".join(f"<!-- {name}:start -->\nold\n<!-- {name}:end -->" for name in sections)
        (root / page).write_text(f"before\n{marks}\nafter\n")


def test_pages_show_what_was_measured(measured):
    results, page = measured / "results", measured / "docs" / "benchmarks.md"
    sections = sum(map(len, report.pages(results).values()))
    assert len(report.refresh(results, measured, check=True)) == sections
    assert "old" in page.read_text()
    report.refresh(results, measured)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "GPU edition" not in text and "no figure yet" not in text
    assert "| ATOM | `eager` | 100 | 100 |" in text and "`fused` | 25 (4×)" in text
    assert "| MTT | `eager` | OOM | OOM |" in text
    assert "ATOM 100 / 33.3 / 25" in (measured / "README.md").read_text().replace("\n", " ")
    assert report.refresh(results, measured, check=True) == []


def test_what_was_not_measured_is_not_shown(edition, tmp_path):
    path = table3.run("cpu", tmp_path, methods=["atom", "mtt"], implementations=["eager", "fused"], ipcs=[1])
    text = report.table3_markdown([path])
    assert "| ATOM | `eager` | 100 |\n" in text and "| MTT | `eager` | OOM |\n" in text, "a column of one size"
    assert "DSA" not in text.split("| Method |", 1)[1] and "eager-batched" not in text
    table3.run("cpu", tmp_path, methods=["atom"], implementations=["eager"], ipcs=[10])
    assert "| ATOM | `eager` | 100 | 100 |" in report.table3_markdown([path])
    assert "| `fused` | 25 (4×) | – |" in report.table3_markdown([path])
    assert "–: no figure yet." in report.table3_markdown([path])
    path = table3.run("cpu", tmp_path)
    assert "no figure yet" not in report.table3_markdown([path])


def test_scaling_is_drawn(edition, tmp_path):
    path = scaling.run("cpu", tmp_path)
    assert sum(edition.values()) == len(scaling.settings(scaling.EDITIONS["cpu"])) == 3 * 5 + 2 * (4 + 3 - 2)
    plots.plot_scaling(tmp_path / "scaling.png", "cpu", [path])
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_shares_of_bandwidth_are_drawn_and_their_picture_is_checked(measured):
    results, picture = measured / "results", measured / "docs" / "figures" / "bandwidth.png"
    same = {"layout": "nchw", "shape": [1280, 128, 32, 32], "milliseconds": 0.3}
    cases = [
        same | {"operator": name, "direction": way, "dtype": dtype, "implementation": implementation, "share_of_copy": share}
        for name in operators.OPERATORS
        for way in ("forward", "backward")
        for dtype in ("float32", "bfloat16")
        for implementation, share in (("eager", 0.1), ("fused", 0.9))
    ]
    record = {"environment": {"device": "NVIDIA H100 80GB HBM3"}, "cases": cases}
    kept = results / "kernels-gpu.json"
    kept.write_text(json.dumps(record))
    report.refresh(results, measured)
    assert picture.stat().st_size > 10_000 and "| 90 %" in (measured / "docs" / "performance.md").read_text()
    assert report.refresh(results, measured, check=True) == []
    newer = {**record, "cases": [{**cases[-1], "share_of_copy": 0.5}]}
    (results / "kernels-gpu-block.json").write_text(json.dumps(newer))
    assert any("bandwidth.png" in sentence for sentence in report.refresh(results, measured, check=True))
    kept.write_text("{}")
    with pytest.raises(ValueError, match="kernels-gpu.json is not a file of"):
        report.refresh(results, measured, check=True)


def test_the_projects_own_pages_show_the_figures_kept_with_it():
    root = harness.ROOT
    assert report.refresh(root / "benchmarks" / "results", root, check=True) == []


def test_every_results_file_is_shown():
    kept = harness.ROOT / "benchmarks" / "results"
    shown = (harness.ROOT / "docs" / "results.md").read_text()
    for path in kept.glob("reproduce-*.json"):
        name = path.stem.removeprefix("reproduce-")
        assert f"<!-- {name}:start -->" in shown or name in (reproduction.TABLE1, *reproduction.UNSHOWN)
        assert re.search(rf"^atom-fast reproduce .*# .*\b{name}\b", shown, re.M), f"no command for {name}"


def test_ratios_to_eager_stand_beside_ratios_to_compile():
    """No ratio spans two runs."""
    kept = harness.ROOT / "benchmarks" / "results"
    files = [kept / "table3-gpu.json", kept / "table3-gpu-implementations.json"]
    text = summary.steps(files, kept / f"reproduce-{reproduction.TABLE1}.json")
    assert "over eager" in text and "over `torch.compile`" in text and "CUDA graph" in text
    assert "| 35.8 " in text and "2.2×" in text and "over that run's eager step of 46.8 ms" in text, "two runs"
    text = summary.steps(files[1:], kept / f"reproduce-{reproduction.TABLE1}.json")
    assert "that run's" not in text and "| 35.8 " in text, "one run"


def test_table_1_has_the_papers_figures_beside_ours(measured):
    kept = harness.ROOT / "benchmarks" / "results" / f"reproduce-{reproduction.TABLE1}.json"
    copy = measured / "results" / kept.name
    shutil.copy(kept, copy)
    report.refresh(measured / "results", measured)
    text = (measured / "docs" / "results.md").read_text()
    assert "| ATOM " in text and "points below the paper" in text and "ATOM less DAM" in text and "Herding" not in text
    assert "seconds on an NVIDIA" in (measured / "README.md").read_text()
    copy.write_text("{}")
    with pytest.raises(ValueError, match="reproduce-cifar10-table1"):
        report.refresh(measured / "results", measured)


def test_a_provider_that_is_no_more_is_left_out(measured):
    path = table3.results_path(measured / "results", "cpu")
    results = json.loads(path.read_text())
    shown = report.table3_markdown([path])
    for cell in list(results["cells"]):
        if cell["workload"]["implementation"] == "fused":
            results["cells"].append({**cell, "workload": {**cell["workload"], "implementation": "fused-before"}})
    path.write_text(json.dumps(results))
    assert report.table3_markdown([path]) == shown
    plots.plot_table3(measured / "table3.png", "cpu", [path])
    assert (measured / "table3.png").stat().st_size > 10_000
    assert compare.compare(path, path, 0.15) == []


def test_check_sees_a_figure_changed_by_hand(measured):
    page = measured / "docs" / "benchmarks.md"
    report.refresh(measured / "results", measured)
    page.write_text(page.read_text().replace("25 (4×)", "5 (20×)"))
    assert report.refresh(measured / "results", measured, check=True)


def test_a_page_without_marks_is_refused(measured):
    (measured / "docs" / "benchmarks.md").write_text("nothing")
    with pytest.raises(ValueError, match="table3-gpu:start"):
        report.refresh(measured / "results", measured)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report.refresh(measured / "nowhere", measured)


def test_ratios_come_from_the_same_run(measured):
    """A slower machine's eager must not make another run's fused look fast."""
    first = table3.results_path(measured / "results", "cpu")
    results = json.loads(first.read_text())
    (fused_cell,) = [
        cell for cell in results["cells"]
        if (cell["workload"]["method"], cell["workload"]["implementation"], cell["workload"]["ipc"]) == ("atom", "fused", 1)
    ]  # fmt: skip
    fused_cell["measured_at"] = "2999-01-01T00:00:00+00:00"
    second = first.with_name("table3-cpu-later.json")
    second.write_text(json.dumps({**results, "cells": [fused_cell]}))
    merged = merge([first, second])
    own = Workload(**fused_cell["workload"])
    assert merged[own]["eager"] is None
    assert merged[dataclasses.replace(own, implementation="compile")]["eager"]["status"] == "ok"
    second.write_text(json.dumps({**results, "environment": {"device": "other"}}))
    with pytest.raises(ValueError, match="several machines"):
        merge([first, second])


def test_compare_names_what_got_slower_by_ratio(measured, tmp_path):
    old = table3.results_path(measured / "results", "cpu")
    results = json.loads(old.read_text())
    for cell in results["cells"]:  # a machine of half the speed
        if cell["status"] == "ok":
            cell["time"]["median"] *= 2
    new = tmp_path / "new.json"
    new.write_text(json.dumps(results))
    assert compare.compare(old, new, 0.15) == []
    for cell in results["cells"]:
        if (cell["workload"]["method"], cell["workload"]["implementation"]) == ("dm", "fused"):
            cell["time"]["median"] *= 1.3
    new.write_text(json.dumps(results))
    assert len(compare.compare(old, new, 0.15)) == 2  # both sizes
    assert compare.compare(old, new, 0.4) == []
    for cell in results["cells"]:  # measured in turns with eager: that ratio counts
        if cell["workload"]["implementation"] != "eager":
            cell["share_of_eager"] = 0.9
    new.write_text(json.dumps(results))
    assert set(compare.ratios(new).values()) == {0.9}
    assert "(1.11×)" in report.table3_markdown([new])
    with pytest.raises(FileNotFoundError):
        compare.compare(old, tmp_path / "nowhere.json", 0.15)


def test_a_repeated_run_is_compared_either_way(measured, tmp_path, capsys):
    old = table3.results_path(measured / "results", "cpu")
    results = json.loads(old.read_text())
    for cell in results["cells"]:
        if (cell["workload"]["method"], cell["workload"]["implementation"], cell["workload"]["ipc"]) == ("dm", "fused", 1):
            cell["time"]["median"] /= 1.1
    new = tmp_path / "new.json"
    new.write_text(json.dumps(results))
    assert main(["compare", str(old), str(new), "--repeated"]) == 0
    assert "24 ratios; the largest difference is 10.0%, of method=dm ipc=1" in capsys.readouterr().out
    for files in ((old, new), (new, old)):
        largest, beyond = compare.compare_repeated(*files, 0.05)
        assert len(beyond) == 1 and "10.0%" in largest
    assert main(["compare", str(old), str(new), "--repeated", "--tolerance", "0.05"]) == 1
    assert main(["compare", str(old), str(old), "--repeated", "--tolerance", "0"]) == 0


def test_digits_distils_the_same_set_as_the_plain_loop(tmp_path, capsys):
    digits.main(["--steps", "10", "--out", str(tmp_path / "digits.json")])
    record = json.loads((tmp_path / "digits.json").read_text())
    assert record["distance"] < 1e-3
    assert record["ratio"] == pytest.approx(sum(record["plain"]["turns"]) / sum(record["fused"]["turns"]))
    assert f"{record['ratio']:.2f} times faster" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        digits.main(["--steps", "15"])


def test_gpu_script_keeps_going_when_a_part_fails(monkeypatch, tmp_path, capsys):
    def broken(run, limit):
        raise OSError("no")

    monkeypatch.setattr(gpu, "environment", lambda device: {"device": device})
    monkeypatch.setattr(gpu, "PARTS", ((broken, 10), (lambda run, limit: f"{limit:.0f} s", 20)))
    assert gpu.main(["--out", str(tmp_path / "out"), "--minutes", "4"]) == 0
    first, second = json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]
    assert "OSError: no" in first["outcome"] and second["outcome"] == "240 s", "the last one takes what is left"


@pytest.mark.parametrize(
    ("part", "last"),
    [
        ("table1", "45  to do     cifar10 ipc 50 atom seed 4 [5 convnet]"),  # three methods, three sizes, five sets
        ("study", "36  to do     cifar10 ipc 50 atom seed 2 [5 convnet] image_init=herding"),  # six rows, two sizes
    ],
)
def test_gpu_script_reproduces_where_the_images_are(monkeypatch, tmp_path, part, last):
    """Its commands are such as the program takes, and ask for the cells that are meant."""
    measure = getattr(gpu, part)
    assert "no --cifar" in measure(gpu.GpuRun(tmp_path, 0, None, []), 60)
    monkeypatch.setattr(gpu, "REPRODUCE_FOLDER", tmp_path / "cells")
    run = gpu.GpuRun(tmp_path, 0, tmp_path / "images", [])
    outcome = measure(run, 120)
    assert outcome.startswith("failed (exit status 2)") and str(tmp_path / "images") in outcome, "there are none"
    monkeypatch.setattr(gpu, part.upper(), [*getattr(gpu, part.upper()), "--list"])
    assert measure(run, 120).startswith("ok: ")
    listed = (tmp_path / "log.txt").read_text()
    assert last in listed and f"{int(last[:2]) + 1}  to do" not in listed
    assert not (tmp_path / f"{part}.json").exists()
    (tmp_path / "cells").mkdir(exist_ok=True)
    kept = tmp_path / "cells" / f"{part}.json"
    kept.write_text("of an earlier run")
    assert measure(run, 120).startswith("ok") and not (tmp_path / f"{part}.json").exists()
    monkeypatch.setattr(gpu, "REPRODUCE", ["-c", f"open({str(kept)!r}, 'w').write('new')"])
    assert measure(run, 120).startswith("ok") and (tmp_path / f"{part}.json").read_text() == "new"


def test_gpu_script_ends_what_takes_too_long(tmp_path):
    run = gpu.GpuRun(tmp_path, 0, None, [])
    assert run.command(["-c", "print('first'); print('last')"], 60) == ("ok", "last")
    assert run.command(["-c", "raise SystemExit(3)"], 60)[0] == "failed (exit status 3)"
    assert run.command(["-u", "-c", "print('begun'); import time; time.sleep(60)"], 2) == (
        "stopped after 2 s",
        "begun",
    )


def test_gpu_script_lets_a_command_write_what_it_has(tmp_path):
    run = gpu.GpuRun(tmp_path, 0, None, [])
    waits = (
        "import signal, sys, time; signal.signal(signal.{}, lambda *_: sys.exit('kept')); print('ready', flush=True)"
    )
    for name in ("SIGTERM", "SIGINT"):
        outcome = run.command(["-c", waits.format(name) + "; time.sleep(60)"], 4, getattr(signal, name))
        assert outcome == ("stopped after 4 s", "kept")


def test_gpu_script_says_at_once_that_nothing_can_whiten(monkeypatch, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "out"), "--cifar", str(tmp_path)])
    assert "needs kornia" in capsys.readouterr().err and not (tmp_path / "out").exists()
