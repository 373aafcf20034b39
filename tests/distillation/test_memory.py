"""The memory of a step as predicted, against what is counted at every operation."""

import dataclasses
import importlib
import re

import pytest
import torch

import atom_fast as af
from atom_fast.distillation import memory, step
from atom_fast.distillation.config import preset
from atom_fast.distillation.memory import describe_memory, fitting_chunk, free_memory, step_memory
from benchmarks.live_bytes import LiveBytes
from tests import launches
from tests.distillation.test_step import make_data, make_run
from tests.workloads import MODULES, pretended


def allocated(run):
    """Most bytes that a step allocates beside what is there before."""
    run.step(1)
    with LiveBytes() as counter:
        for tensor in (*run.state().values(), *run.network.parameters(), *run.network.buffers()):
            counter.add(tensor)
        before = counter.live
        run.step(2)
    return counter.peak - before


def both(size, classes=3, **settings):
    """What is predicted and what is counted."""
    data = make_data(classes, per_class=40, size=size)
    run, _ = make_run(data, depth=None, **{"width": 16, **settings})
    return step_memory(run.config, data), allocated(run)


@pytest.mark.parametrize(
    ("size", "norm", "chunk", "settings"),
    [
        (32, "instance", None, {"real_batch": 16, "ipc": 1, "width": 32}),
        (32, "instance", 1, {"real_batch": 2, "ipc": 8, "partition": 2, "synthetic_batch": 5}),
        (32, "batch", None, {"real_batch": 2, "ipc": 8}),
        (32, "batch", 1, {"real_batch": 4, "ipc": 8, "spatial_power": None}),
        (64, "instance", 2, {"real_batch": 8, "ipc": 2, "name": "dm"}),
        (64, "batch", 2, {"real_batch": 2, "ipc": 8}),
        (128, "instance", None, {"real_batch": 2, "ipc": 6, "augmentation": "color+flip+crop_scale"}),
        (128, "instance", 1, {"real_batch": 8, "ipc": 1}),
        (128, "batch", None, {"real_batch": 4, "ipc": 2}),
        (224, "instance", 2, {"real_batch": 3, "ipc": 1}),
        (224, "instance", None, {"real_batch": 1, "ipc": 2, "width": 8}),
        (224, "batch", None, {"real_batch": 3, "ipc": 1}),
    ],
)
def test_memory_is_predicted_to_ten_per_cent(size, norm, chunk, settings):
    predicted, counted = both(size, norm=norm, class_chunk=chunk, **settings)
    assert predicted == pytest.approx(counted, rel=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels do not run, their memory is that of a CPU")
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "width", "real_batch", "ipc"), [(32, 64, 1, 2), (48, 16, 1, 4), (48, 16, 4, 1)])
def test_on_a_gpu_too_but_for_the_workspaces_of_cudnn(size, width, real_batch, ipc, precision, norm, monkeypatch):
    """With the kernels for an H100 as they would be launched; the tensors are on the CPU."""
    monkeypatch.setattr(launches, "bind", lambda *_: None)  # it keeps tensors
    modules = [importlib.import_module(f"atom_fast.kernels.{name}") for name in MODULES]
    sizes = {"real_batch": real_batch, "ipc": ipc, "class_chunk": 1, "width": width}
    with pretended(90), launches.recorded(*modules), af.backend("triton"):
        predicted, counted = both(size, 2, **sizes, precision=precision, norm=norm)
    assert predicted == pytest.approx(counted, rel=0.1)


def test_where_memory_is_not_known_nothing_is_said():
    data = make_data(size=32)
    for settings in ({"norm": "layer"}, {"pooling": "avg3"}, {"feature_maps": True}, {"precision": "bfloat16"}):
        config = preset(width=8, **settings).resolve(data.image_shape, data.name, torch.device("cpu"))
        assert step_memory(config, data) is None and describe_memory(config, data) is None


def test_the_largest_chunk_that_fits():
    data = make_data(classes=20, size=32)
    config = preset(width=64).resolve(data.image_shape, data.name, torch.device("cpu"))

    def of(chunk):
        return step_memory(dataclasses.replace(config, class_chunk=chunk), data)

    assert step_memory(config, data) == of(20) > 1.8 * of(10)
    assert [fitting_chunk(config, data, available) for available in (of(1) - 1, of(1), of(7), of(20))] == [0, 1, 7, 20]
    assert fitting_chunk(config, data, of(20), classes=5) == 5, "a process has five of them"


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (10**12, ""),
        (None, ""),
        (5 * 10**8, ", but 500 MB are free: with class_chunk 4 (--class-chunk 4) it fits"),
        (10**6, ", but 1.0 MB are free, too few for one class at a time: lower real_batch (--real-batch) or width "
                "(--width)"),
    ],
)  # fmt: skip
def test_a_user_learns_what_a_large_step_takes_and_what_fits(free, said, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    data = make_data(classes=10, size=128, per_class=1)
    config = preset(real_batch=32, width=96).resolve(data.image_shape, data.name, torch.device("cpu"))
    message = describe_memory(config, data)
    assert re.sub(r"about \S+ GB", "about N GB", message) == "a step takes about N GB of memory" + said


@pytest.mark.parametrize(("size", "gigabytes"), [(128, 0.64), (224, 2.0)])
def test_large_images_take_what_the_page_says(size, gigabytes):
    """docs/usage.md, "Larger images"."""
    data = make_data(classes=10, size=size, per_class=1)
    config = preset(ipc=10).resolve(data.image_shape, "folder", torch.device("cpu"))
    assert (config.width, config.real_batch) == (128, 128)
    assert step_memory(config, data) / 10 / 1e9 == pytest.approx(gigabytes, rel=0.03)


def test_what_does_not_fit_is_said_where_memory_runs_out(monkeypatch, capsys):
    monkeypatch.setattr(step, "step_memory", lambda config, *_: config.class_chunk * 10**9)
    run, _ = make_run(make_data(5, size=8))
    run._halve_class_chunk()
    assert "out of memory with 5 classes at once (5.0 GB): continuing with 3" in capsys.readouterr().err


def test_free_memory_is_that_of_the_machine():
    found = free_memory(torch.device("cpu"))
    assert found is None or 10**7 < found < 10**14
