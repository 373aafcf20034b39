"""A profile names every stage, accounts for the step's time, counts its work, and changes nothing."""

import dataclasses
import json
import timeit

import pytest
import torch

from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.config import preset
from atom_fast.distillation.stages import PREFIX, STAGES, stage
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation
from atom_fast.ops import native
from benchmarks.devices import DEVICES, measure_device
from benchmarks.profile import _floors, _prepare, kernel_times, profile, profile_table, random_data, stage_seconds
from benchmarks.roofline import WAYS, Configuration, stages, totals
from tests.benchmarks.tiny import command

SMALL = {"ipc": 2, "real_batch": 8, "width": 16, "depth": 2}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Result and trace of a profile of some steps."""
    data = random_data(4, 3, 16, 16, per_class=20)
    before = data.train_images.clone()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    file = tmp_path_factory.mktemp("profile") / "new" / "trace.json"
    result = profile(preset(**SMALL), data, file, steps=4, warm_up=2, device=device, progress=False)
    assert torch.equal(data.train_images, before) and list(file.parent.iterdir()) == [file]
    return result, json.loads(file.read_text("utf-8"))


def test_every_stage_takes_time_and_together_they_take_the_steps(profiled):
    result, _ = profiled
    assert [row.name for row in result.stages] == list(STAGES)
    assert all(row.seconds > 0 for row in result.stages)
    together = sum(row.seconds for row in result.stages)
    assert together + result.other_seconds == pytest.approx(result.traced_seconds)
    assert 0.8 * result.traced_seconds < together <= result.traced_seconds


def test_a_step_with_a_pool_draws_from_it_and_is_not_counted(tmp_path, monkeypatch):
    native.is_built()  # from the user's cache, before there is another
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = preset("best", **{**SMALL, "pool_networks": 2})
    run = _prepare(config, random_data(2, 3, 16, 16, per_class=8), torch.device("cpu"), progress=False)
    assert run.pool is not None and run.pool.initial.shape == run.pool.trained.shape and len(run.pool.trained) == 2
    _, not_counted = _floors(run, DEVICES["H100"])
    assert "partition 2" in not_counted and "pool_networks 2" in not_counted


def test_the_trace_is_of_those_steps_and_names_the_stages(profiled):
    result, document = profiled
    names = [event["name"] for event in document["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("step") == result.steps == 4
    for name in STAGES:
        # Real images are drawn and fetched, and synthetic ones drawn; augmentations are drawn and applied.
        assert names.count(PREFIX + name) == 4 * {"sample": 3, "augment": 3}.get(name, 1)


def test_the_work_is_that_of_the_roofline(profiled):
    result, _ = profiled
    size = Configuration(4, 3, 16, 16, ipc=2, real_batch=8, network_width=16, depth=2, precision=result.precision)
    work = stages(size)
    assert {part.part for part in work} == set(STAGES)
    assert sum(row.bytes for row in result.stages) == sum(part.bytes[WAYS.index("floor")] for part in work)
    assert sum(row.operations for row in result.stages) == sum(part.matrix + part.vector for part in work)
    assert sum(row.floor for row in result.stages) == pytest.approx(totals(size, result.device)["floor"]["seconds"])


def test_network_and_whitening_are_counted_as_they_are():
    data = random_data(3, 1, 8, 8, per_class=10)
    config = preset(**SMALL).resolve(data.image_shape, data.name, torch.device("cpu"))
    run = Distillation(config, data, preprocessing := _preprocessing(data), initial_images(config, data, preprocessing))
    size = Configuration(3, 1, 8, 8, ipc=2, real_batch=8, network_width=16, depth=2, precision="float32")
    drawn = next(part for part in stages(size) if part.part == "network")
    assert drawn.bytes[WAYS.index("floor")] == sum(4 * parameter.numel() for parameter in run.network.parameters())
    fetched = [next(part for part in stages(dataclasses.replace(size, whitened=w)) if part.part == "sample")
               for w in (False, True)]  # fmt: skip
    assert fetched[1].matrix - fetched[0].matrix == 2 * 64 * 64 * 3 * 8


def _preprocessing(data):
    return fit_preprocessing(data.train_images, "standard", progress=False)


def test_the_table_shows_every_stage_and_how_the_rates_came(profiled):
    result, _ = profiled
    lines = profile_table(result).splitlines()
    assert [line.split()[0] for line in lines[1 : len(STAGES) + 3]] == [*STAGES, "other", "step"]
    assert ("measured just now" in lines[-1]) == (result.rates_from == "measured")
    if not torch.cuda.is_available():
        assert result.rates_from == "measured"
        assert result.captured_seconds is None


@pytest.mark.parametrize(
    ("name", "value"), [("norm", "batch"), ("pooling", "max2"), ("feature_maps", True), ("image_average", True)]
)
def test_settings_that_are_not_counted_are_named(name, value, profiled):
    config, data = preset(**SMALL, **{name: value}), random_data(2, 1, 8, 8, 10)
    floors, reason = _floors(_prepare(config, data, torch.device("cpu"), progress=False), DEVICES["H100"])
    assert set(floors.values()) == {(None, None, None)} and f"{name} {value!r}" in reason
    result = dataclasses.replace(profiled[0], not_counted=reason)
    assert f"not counted for {reason}" in profile_table(result)


def test_a_profiled_step_gives_the_same_images():
    data = random_data(3, 1, 8, 8, per_class=10)
    images = []
    for profiler in (None, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])):
        preprocessing = _preprocessing(data)
        config = preset(**SMALL).resolve(data.image_shape, data.name, torch.device("cpu"))
        run = Distillation(config, data, preprocessing, initial_images(config, data, preprocessing))
        if profiler:
            profiler.start()
        for iteration in (1, 2):
            run.step(iteration)
        if profiler:
            profiler.stop()
        images.append(run.images)
    assert torch.equal(*images)


def test_a_stage_costs_nothing_worth_naming_without_a_profiler():
    def annotated():
        with stage("real"):
            pass

    assert min(timeit.repeat(annotated, number=100, repeat=100)) / 100 < 20e-6  # of a step's milliseconds


def test_kernels_count_for_the_stage_that_launched_them():
    """A GPU's trace: the kernels run later than they are launched, and the backward's from another thread."""

    def event(cat, name, ts, dur, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    document = {"traceEvents": [
        event("user_annotation", "step", 0, 100), event("user_annotation", PREFIX + "real", 10, 20),
        event("user_annotation", PREFIX + "backward", 40, 20), event("gpu_user_annotation", PREFIX + "real", 300, 9),
        event("cuda_runtime", "cudaLaunchKernel", 15, 2, correlation=1), event("kernel", "a", 300, 5e6, correlation=1),
        event("cuda_driver", "cuLaunchKernel", 45, 2, correlation=2), event("kernel", "b", 400, 3e6, correlation=2),
        event("cuda_runtime", "memset", 35, 2, correlation=3), event("gpu_memset", "c", 500, 1e6, correlation=3),
        event("cuda_runtime", "memcpy", 70, 2, correlation=4), event("gpu_memcpy", "d", 9, 1e6, correlation=4),
    ]}  # fmt: skip
    seconds, whole = stage_seconds(document)
    assert seconds == {name: {"real": 5.0, "backward": 3.0}.get(name, 0.0) for name in STAGES}
    assert whole == 10.0


def test_kernels_of_a_replay_are_listed_in_order():
    def kernel(name, ts, dur):
        return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": {}}

    events = [kernel("b", 20, 3.0), kernel("a", 10, 1.0), kernel("a", 30, 2.0), kernel("b", 40, 5.0)]
    events.append({"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 1, "dur": 1, "args": {}})
    assert kernel_times({"traceEvents": events}, 2) == [("a", 1.5), ("b", 4.0)]
    with pytest.raises(ValueError, match=r"2 steps of the trace differ in their kernels \(3 in all\)"):
        kernel_times({"traceEvents": events[1:]}, 2)
    with pytest.raises(ValueError, match="differ"):
        kernel_times({"traceEvents": [*events[:3], kernel("c", 40, 5.0)]}, 2)


def test_measured_rates_are_plausible():
    rates = measure_device(torch.device("cpu"))
    assert "thread" in rates.name
    assert 1e8 < rates.bandwidth < 1e13
    assert all(1e8 < rate < 1e15 for rate in (rates.vector, *rates.matrix.values()))


TINY = ("--ipc", 1, "--real-batch", 4, "--width", 8, "--device", "cpu", "--quiet")


def test_the_command_prints_the_table_and_keeps_the_figures(tmp_path):
    table, _ = command("profile", *TINY, "--out", tmp_path, "--steps", 1)
    figures = json.loads((tmp_path / "profile.json").read_text("utf-8"))
    assert [row["name"] for row in figures["stages"]] == list(STAGES)
    assert f"{1e3 * figures['traced_seconds']:.3f}" in table
    json.loads((tmp_path / "trace.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be at least 1"),
        (["--warm-up", "-1"], "warm_up at least 0"),
        (["--shape", "2", "1", "0", "8"], "height must be at least 1; got 0"),
        (["--shape", "2", "1", "8", "8", "--dataset", "digits"], "give --shape or --dataset/--resolution, not both"),
        (["--ipc", "1000"], "1000 different ones per class were asked for"),
        (["--device", "mps"], "no other kind is supported"),
        (["--preset", "papre"], "Did you mean 'paper'?"),
    ],
)
def test_bad_input_is_refused(arguments, message, tmp_path):
    _, error = command("profile", *TINY, "--out", tmp_path / "none", *arguments, code=2)
    assert message in error
    assert not (tmp_path / "none").exists()


def test_the_command_runs_in_one_process(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "profile runs in one process" in command("profile", *TINY, "--out", tmp_path / "none", code=2)[1]
    assert not list(tmp_path.iterdir())
