"""Whole runs: what they leave behind, how they stop, and that going on gives the same bits."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.checkpoint import latest_checkpoint, save_checkpoint
from atom_fast.distillation.config import preset, read_config
from atom_fast.distillation.loop import distill
from atom_fast.distillation.step import Distillation, NonFiniteError
from atom_fast.synthetic import SyntheticSet
from tests.distillation.test_step import make_data

SMALL = {"ipc": 2, "real_batch": 4, "width": 8, "depth": 2, "log_every": 2, "checkpoint_every": 4, "image_every": 4}


def small(iterations=6, **settings):
    return preset(**{**SMALL, "iterations": iterations, **settings})


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An uninterrupted run of 6 iterations: its folder and its set."""
    folder = tmp_path_factory.mktemp("run") / "finished"
    return folder, distill(small(), data, folder, progress=False, device="cpu")


def test_a_run_leaves_everything_behind(finished, data):
    folder, synthetic = finished
    names = sorted(entry.name for entry in folder.iterdir())
    assert names == [".lock", "checkpoints", "config.yaml", "environment.json", "images", "log.jsonl",
                     "synthetic.safetensors", "tensorboard"]  # fmt: skip
    config = read_config(folder / "config.yaml")
    assert config == small().resolve(data.image_shape, data.name, torch.device("cpu"))
    assert sorted(path.stem for path in (folder / "images").iterdir()) == [f"iteration-{i:08d}" for i in (0, 4, 6)]
    assert latest_checkpoint(folder / "checkpoints").iteration == 6
    (start,) = json.loads((folder / "environment.json").read_text())
    assert start["versions"]["torch"] == torch.__version__.split("+")[0] or start["versions"]["torch"]
    assert start["device"]


def test_the_progress_bar_says_whose_memory_it_shows(data, tmp_path, capsys):
    distill(small(2), data, tmp_path / "run", device="cpu")
    assert re.search(r"mmd [\d.e-]+ peak process memory \d+ MiB", capsys.readouterr().err)


def test_the_synthetic_set_explains_itself(finished, data):
    folder, synthetic = finished
    loaded = SyntheticSet.load(folder / "synthetic.safetensors")
    assert torch.equal(loaded.images, synthetic.images)
    assert torch.equal(loaded.labels, torch.arange(3).repeat_interleave(2))
    assert loaded.class_names == data.class_names
    metadata = loaded.metadata
    assert metadata["config"] == read_config(folder / "config.yaml").to_dict()
    assert metadata["config_hash"] == read_config(folder / "config.yaml").config_hash()
    assert (metadata["dataset"], metadata["dataset_fingerprint"], metadata["seed"]) == ("made", data.fingerprint, 0)
    assert metadata["seconds"] > 0


def test_the_log_has_a_record_every_few_steps(finished):
    folder, _ = finished
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [2, 4, 6]
    for record in records:
        assert record["loss"] == pytest.approx(10 * (record["attention_loss"] + 0.01 * record["mmd_loss"]), rel=1e-5)
        assert record["steps_per_second"] > 0
        assert record["peak_memory_bytes"] > 0
    assert [record["seconds"] for record in records] == sorted(record["seconds"] for record in records)


@pytest.fixture
def busy_device(monkeypatch):
    """A device whose readings the host waits for after the next step, as a GPU's."""
    monkeypatch.setattr(Distillation, "reads_at_once", lambda run: False)


def test_a_device_that_is_behind_leaves_the_same_log(finished, data, tmp_path, busy_device):
    _, straight = finished
    settings = {"log_every": 1, "checkpoint_every": 4, "image_every": 3}
    late = distill(small(**settings), data, tmp_path / "late", progress=False, device="cpu")
    with pytest.MonkeyPatch.context() as ready:
        ready.setattr(Distillation, "reads_at_once", lambda run: True)
        distill(small(**settings), data, tmp_path / "ready", progress=False, device="cpu")
    assert torch.equal(late.images, straight.images)
    names = ("iteration", "loss", "attention_loss", "mmd_loss")
    one, other = (
        [[record[name] for name in names] for record in map(json.loads, (tmp_path / folder / "log.jsonl").open())]
        for folder in ("late", "ready")
    )
    assert one == other and [record[0] for record in one] == [1, 2, 3, 4, 5, 6]


def test_a_device_that_is_behind_is_stopped_by_a_nan_before_anything_else_is_kept(data, tmp_path, busy_device):
    settings = {"loss_scale": 1e30, "image_lr": 1e30, "augmentation": "none", "log_every": 1, "image_every": 3}
    with pytest.raises(NonFiniteError, match="iteration [12]") as stop:
        distill(small(**settings), data, tmp_path, progress=False, device="cpu")
    assert "iteration-00000000" in str(stop.value)
    for folder in ("checkpoints", "images"):
        assert [path.stem for path in (tmp_path / folder).iterdir()] == ["iteration-00000000"]


def test_resuming_gives_the_bits_of_an_uninterrupted_run(finished, data, tmp_path):
    folder, straight = finished
    for iterations in (3, 5, 6):
        resumed = distill(small(iterations), data, tmp_path, resume=True, progress=False, device="cpu")
    assert torch.equal(resumed.images, straight.images)
    end = latest_checkpoint(tmp_path / "checkpoints").tensors
    assert torch.equal(end["momentum"], latest_checkpoint(folder / "checkpoints").tensors["momentum"])
    iterations = [json.loads(line)["iteration"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert iterations == [2, 3, 4, 5, 6]
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 3


def test_an_averaged_run_resumes_to_the_average_of_an_uninterrupted_one(finished, data, tmp_path):
    average = distill(small(image_average=True), data, tmp_path / "straight", progress=False, device="cpu")
    for iterations in (3, 5, 6):
        resumed = distill(
            small(iterations, image_average=True), data, tmp_path / "resumed", resume=True, progress=False, device="cpu"
        )
    assert torch.equal(resumed.images, average.images)
    end = latest_checkpoint(tmp_path / "resumed" / "checkpoints").tensors
    assert torch.equal(end["average"], average.images)
    assert torch.equal(end["images"], finished[1].images), "the steps are those of a run without"


def test_a_finished_run_resumes_to_itself(finished, data):
    folder, straight = finished
    again = distill(small(log_every=1), data, folder, resume=True, progress=False, device="cpu")
    assert torch.equal(again.images, straight.images)


def test_a_run_of_an_earlier_version_is_resumed(finished, data, tmp_path):
    """Its records hold a setting that no image depended on and that is no more, and lack one that came later."""
    distill(small(4), data, tmp_path, progress=False, device="cpu")
    written = latest_checkpoint(tmp_path / "checkpoints")
    config = {**written.config, "compile": True}
    del config["image_average"]
    save_checkpoint(tmp_path / "checkpoints", dataclasses.replace(written, config=config))
    with pytest.raises(ValueError, match="image_average was False, is True"):
        distill(small(image_average=True), data, tmp_path, resume=True, progress=False, device="cpu")
    resumed = distill(small(), data, tmp_path, resume=True, progress=False, device="cpu")
    assert torch.equal(resumed.images, finished[1].images)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(finished, data, tmp_path, capsys):
    _, straight = finished
    distill(small(5), data, tmp_path, progress=False, device="cpu")
    newest = tmp_path / "checkpoints" / "iteration-00000005.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    resumed = distill(small(), data, tmp_path, resume=True, progress=False, device="cpu")
    messages = capsys.readouterr().err
    assert str(newest) in messages
    assert "resuming" in messages
    assert "iteration 4" in messages
    assert torch.equal(resumed.images, straight.images)


def test_resuming_nothing_starts_and_says_so(data, tmp_path, capsys):
    distill(small(1), data, tmp_path / "new", resume=True, progress=False, device="cpu")
    assert "starting at the first iteration" in capsys.readouterr().err


@pytest.mark.fault(
    "Folders",
    "a new run is given a folder with something in it, or `--resume` one that holds something, but no run",
    "refused, untouched",
)
def test_an_existing_folder_is_refused(finished, data, tmp_path):
    folder, _ = finished
    before = sorted(path for path in folder.rglob("*"))
    with pytest.raises(FileExistsError, match=r"not empty.*--resume"):
        distill(small(), data, folder, progress=False, device="cpu")
    assert sorted(path for path in folder.rglob("*")) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no run to resume"):
        distill(small(), data, tmp_path, resume=True, progress=False, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_lr": 0.5}, "image_lr was 1.0, is 0.5"),
        ({"seed": 1, "pooling": "avg3"}, "pooling was 'avg2', is 'avg3'; seed was 0, is 1"),
        ({"iterations": 5}, "has done 6 iterations; got iterations 5"),
    ],
)
def test_a_run_of_other_settings_is_not_resumed(finished, data, settings, message):
    with pytest.raises(ValueError, match=message):
        distill(small(**settings), data, finished[0], resume=True, progress=False, device="cpu")
    assert read_config(finished[0] / "config.yaml").seed == 0


def test_a_run_on_other_data_is_not_resumed(finished, data):
    other = make_data(per_class=11)
    with pytest.raises(ValueError, match=f"{data.fingerprint[:16]}.*{other.fingerprint[:16]}"):
        distill(small(), other, finished[0], resume=True, progress=False, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ipc": 11}, "class 0.*10 training images.*11.*ipc of at most 10, or start from noise .*--image-init noise"),
        ({"ipc": 11, "image_init": "herding"}, "class 0.*10 training images.*11.*--image-init noise"),
        ({"depth": 5}, "too small for depth 5"),
        ({"precision": "tf32"}, "tf32"),
        ({"image_init": "given"}, "given"),
    ],
)
def test_what_cannot_work_is_refused_before_a_run_begins(data, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        distill(small(**settings), data, tmp_path / "run", progress=False, device="cpu")
    distill(small(1), data, tmp_path / "run", progress=False, device="cpu")  # the folder is still free


def uneven_data():
    """Three classes of 10, 4 and 2 training images."""
    data = make_data()
    kept = torch.cat([(data.train_labels == label).nonzero().flatten()[:size] for label, size in enumerate((10, 4, 2))])
    tensors = data.train_images[kept], data.train_labels[kept], data.test_images, data.test_labels
    return ImageData.from_tensors("uneven", data.class_names, *tensors)


def test_classes_smaller_than_the_batch_are_distilled_and_named(tmp_path, capsys):
    run = distill(small(2, real_batch=6), uneven_data(), tmp_path / "run", progress=False, device="cpu")
    assert run.ipc == 2 and torch.isfinite(run.images).all()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "fewer" in line]
    assert line.startswith("2 of 3 classes have fewer than 6 training images (the smallest, 'class 2', has 2): ")
    distill(small(2, real_batch=2), uneven_data(), tmp_path / "other", progress=False, device="cpu")
    assert "fewer" not in capsys.readouterr().err


def test_more_images_than_a_class_has_can_start_from_noise(tmp_path):
    run = distill(small(2, ipc=3, image_init="noise"), uneven_data(), tmp_path / "run", progress=False, device="cpu")
    assert run.ipc == 3 and torch.isfinite(run.images).all()


def test_two_runs_cannot_write_one_folder(data, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    tmp_path.joinpath(".lock").touch()
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is writing"):
            distill(small(), data, tmp_path, progress=False, device="cpu")


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "a learning rate that makes the images overflow",
    "the run stops; what was lost is named, the last good checkpoint is kept, no set is written",
)
def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path):
    settings = {"loss_scale": 1e30, "image_lr": 1e30, "augmentation": "none", "checkpoint_every": 1, "log_every": 100}
    with pytest.raises(NonFiniteError, match=r"iteration 2|in the images") as stop:
        distill(small(**settings), data, tmp_path, progress=False, device="cpu")
    assert "class 0" in str(stop.value)
    assert "the last good checkpoint is" in str(stop.value)
    kept = latest_checkpoint(tmp_path / "checkpoints")
    assert f"iteration-{kept.iteration:08d}" in str(stop.value)
    assert all(torch.isfinite(tensor).all() for tensor in kept.tensors.values())
    assert not (tmp_path / "synthetic.safetensors").exists()


def test_a_given_set_is_where_the_images_start(finished, data, tmp_path):
    given = finished[1]
    shuffled = torch.tensor([5, 0, 2, 4, 1, 3])
    mixed = SyntheticSet(given.images[shuffled], given.labels[shuffled], given.class_names, given.preprocessing)
    distill(small(1), data, tmp_path / "run", synthetic_init=mixed, progress=False, device="cpu")
    started = _checkpoint_at(tmp_path / "run", 0)
    for label in range(3):
        expected, got = given.images[2 * label : 2 * label + 2], started[2 * label : 2 * label + 2]
        assert any(torch.equal(got, expected[order]) for order in ([0, 1], [1, 0]))
    assert read_config(tmp_path / "run" / "config.yaml").image_init == "given"
    resumed = distill(small(2, image_init="given"), data, tmp_path / "run", resume=True, progress=False, device="cpu")
    assert not torch.equal(resumed.images, given.images)


def test_a_given_set_in_another_model_space_goes_by_way_of_pixels(data, tmp_path):
    pytest.importorskip("kornia")
    preprocessing = fit_preprocessing(data.train_images, "zca", progress=False)
    real = data.train_images[data.class_index[torch.tensor([0, 1, 10, 11, 20, 21])]]
    given = SyntheticSet(
        preprocessing.to_model(real), torch.arange(3).repeat_interleave(2), data.class_names, preprocessing
    )
    distill(small(1), data, tmp_path, synthetic_init=given, progress=False, device="cpu")
    expected = fit_preprocessing(data.train_images, "standard").to_model(real)
    torch.testing.assert_close(_checkpoint_at(tmp_path, 0), expected, rtol=1e-3, atol=1e-3)


def test_a_given_set_that_does_not_fit_is_refused(finished, data, tmp_path):
    with pytest.raises(ValueError, match=r"3 images \[3, 8, 8\].*got 2 images"):
        distill(small(ipc=3), data, tmp_path, synthetic_init=finished[1], progress=False, device="cpu")


def _checkpoint_at(folder, iteration):
    from atom_fast.distillation.checkpoint import load_checkpoint

    return load_checkpoint(folder / "checkpoints" / f"iteration-{iteration:08d}.safetensors").tensors["images"]


def test_without_tensorboard_a_run_says_so_once(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    distill(small(4), data, tmp_path, progress=False, device="cpu")
    assert capsys.readouterr().err.count("TensorBoard cannot be imported") == 1
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "log.jsonl").exists()


def test_the_progress_bar_shows_terms_speed_and_time_left(data, tmp_path, capsys):
    distill(small(4, log_every=1), data, tmp_path, progress=True, device="cpu")
    shown = capsys.readouterr().err
    for word in ("4/4", "loss", "attention", "mmd", "peak", "step/s", "<"):
        assert word in shown


RUN = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from atom_fast.distillation.step import Distillation
from tests.distillation.test_loop import distill, make_data, small

step = Distillation.step
def slow_step(self, iteration):  # so that a signal comes in the middle of the run
    step(self, iteration)
    time.sleep(0.1)
Distillation.step = slow_step
distill(small(40, checkpoint_every=1, image_every=1000), make_data(), sys.argv[2], device="cpu")
"""


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from atom_fast.distillation.step import Distillation
from tests.distillation.test_loop import distill, make_data, small

step = Distillation.step
def step_and_fill_disk(self, iteration):
    step(self, iteration)
    if iteration == 9:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
Distillation.step = step_and_fill_disk
distill(small(40), make_data(), sys.argv[2], device="cpu", progress=False)
"""


@pytest.mark.fault(
    "Full disks",
    "no file can grow any more in the middle of a run, so that the log or a checkpoint cannot be written",
    "the file and the last saved iteration are named; resuming ends with the same bits",
)
@pytest.mark.parametrize(("limit", "file"), [(100, "log.jsonl"), (5000, "iteration-00000012.safetensors")])
def test_a_full_disk_ends_a_run_that_can_go_on(limit, file, data, uninterrupted, tmp_path, request):
    pytest.importorskip("resource")
    command = [sys.executable, "-c", FULL_DISK, str(request.config.rootpath), str(tmp_path), str(limit)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert f"iteration 8 is saved in {tmp_path}" in process.stderr
    assert f"cannot write {tmp_path}" in process.stderr.splitlines()[-1]
    assert file in process.stderr.splitlines()[-1]
    resumed = distill(small(40, checkpoint_every=20), data, tmp_path, resume=True, progress=False, device="cpu")
    assert torch.equal(resumed.images, uninterrupted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    """The images of an uninterrupted run of 40 iterations."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return distill(small(40, checkpoint_every=40), data, folder, progress=False, device="cpu").images


@pytest.mark.fault(
    "Stopped runs",
    "SIGTERM, SIGINT or SIGKILL to a process that distils from Python",
    "as from the command line: saved, 143 or 130; after SIGKILL, too, resuming ends with the same bits",
)
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_a_stopped_process_resumes_to_the_same_bits(number, code, data, uninterrupted, tmp_path, request):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", RUN, str(request.config.rootpath), str(folder)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    _wait_for(folder / "checkpoints" / "iteration-00000003.safetensors", process)
    process.send_signal(getattr(signal, number))
    messages = process.communicate(timeout=60)[1]
    assert process.returncode == code, messages
    stopped = latest_checkpoint(folder / "checkpoints").iteration
    assert 3 <= stopped < 40
    if number != "SIGKILL":
        assert f"{number}: stopped after iteration {stopped} of 40" in messages
        assert "to continue, call distill again with resume=True" in messages
    resumed = distill(small(40, checkpoint_every=20), data, folder, resume=True, progress=False, device="cpu")
    assert torch.equal(resumed.images, uninterrupted)


def _wait_for(path, process):
    limit = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.01)
