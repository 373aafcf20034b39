"""Whole runs: what they leave behind, how they stop, and that going on gives the same bits."""

import dataclasses
import errno
import json
import os
import re
import signal
import sys

import pytest
import torch

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation import logs
from atom_fast.distillation.checkpoint import latest_checkpoint, save_checkpoint
from atom_fast.distillation.config import preset, read_config
from atom_fast.distillation.loop import distill
from atom_fast.distillation.run import DivergenceError
from atom_fast.distillation.step import Distillation
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
    return folder, distill(data, small(), folder, progress=False, device="cpu")


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
    distill(data, small(2), tmp_path / "run", device="cpu")
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


def test_resuming_gives_the_bits_of_an_uninterrupted_run(finished, data, tmp_path):
    folder, straight = finished
    for iterations in (3, 5, 6):
        resumed = distill(data, small(iterations), tmp_path, resume=True, progress=False, device="cpu")
    assert torch.equal(resumed.images, straight.images)
    end = latest_checkpoint(tmp_path / "checkpoints").tensors
    assert torch.equal(end["momentum"], latest_checkpoint(folder / "checkpoints").tensors["momentum"])
    iterations = [json.loads(line)["iteration"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert iterations == [2, 3, 4, 5, 6]
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 3


def test_an_averaged_run_resumes_to_the_average_of_an_uninterrupted_one(finished, data, tmp_path):
    average = distill(data, small(image_average=True), tmp_path / "straight", progress=False, device="cpu")
    for iterations in (3, 5, 6):
        resumed = distill(
            data, small(iterations, image_average=True), tmp_path / "resumed", resume=True, progress=False, device="cpu"
        )
    assert torch.equal(resumed.images, average.images)
    end = latest_checkpoint(tmp_path / "resumed" / "checkpoints").tensors
    assert torch.equal(end["average"], average.images)
    assert torch.equal(end["images"], finished[1].images), "the steps are those of a run without"


def test_a_finished_run_resumes_to_itself(finished, data):
    folder, straight = finished
    again = distill(data, small(log_every=1), folder, resume=True, progress=False, device="cpu")
    assert torch.equal(again.images, straight.images)


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "a run of an earlier version, whose record has settings that are gone, is resumed",
    "it goes on to the same bits if they did nothing, and is refused with the setting's name otherwise",
)
def test_a_run_of_an_earlier_version_is_resumed_or_refused_with_the_reason(finished, data, tmp_path):
    distill(data, small(4), tmp_path, progress=False, device="cpu")
    written = latest_checkpoint(tmp_path / "checkpoints")

    def resume_as_written_with(**settings):
        earlier = dataclasses.replace(written, config={**written.config, **settings})
        save_checkpoint(tmp_path / "checkpoints", earlier)
        return distill(data, small(), tmp_path, resume=True, progress=False, device="cpu")

    with pytest.raises(ValueError, match="cannot be resumed by this version.*herding"):
        resume_as_written_with(image_init="herding")
    assert latest_checkpoint(tmp_path / "checkpoints").iteration == 4
    for harmless in ({"memory_budget": None}, {"memory_budget": "600 MB"}, {"image_init": "given"}):
        assert torch.equal(resume_as_written_with(**harmless).images, finished[1].images)
        (tmp_path / "checkpoints" / f"iteration-{small().iterations:08d}.safetensors").unlink()


def test_an_argument_of_another_kind_is_named_before_anything_is_written(finished, data, tmp_path):
    output, start = tmp_path / "run", finished[1]
    for arguments, message in (
        ((small(), data, output), "data must be of type ImageData .*; got DistillConfig"),
        ((data, "paper", output), r"config must be of type DistillConfig .*preset\(.*; got str"),
        ((start, small(), output), "data must be of type ImageData .*; got SyntheticSet"),
    ):
        with pytest.raises(TypeError, match=message):
            distill(*arguments, progress=False)
    with pytest.raises(TypeError, match=r"start must be of type SyntheticSet .*load\(path\).*; got PosixPath"):
        distill(data, small(), output, start=finished[0], progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda:0' is not available"):  # 0 is a GPU's number, not "choose one"
            distill(data, small(), output, device=0)
    assert not output.exists()


def test_a_damaged_newest_checkpoint_costs_only_its_steps(finished, data, tmp_path, capsys):
    _, straight = finished
    distill(data, small(5), tmp_path, progress=False, device="cpu")
    newest = tmp_path / "checkpoints" / "iteration-00000005.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    resumed = distill(data, small(), tmp_path, resume=True, progress=False, device="cpu")
    messages = capsys.readouterr().err
    assert str(newest) in messages
    assert "resuming" in messages
    assert "iteration 4" in messages
    assert torch.equal(resumed.images, straight.images)


def test_resuming_nothing_starts_and_says_so(data, tmp_path, capsys):
    distill(data, small(1), tmp_path / "new", resume=True, progress=False, device="cpu")
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
        distill(data, small(), folder, progress=False, device="cpu")
    assert sorted(path for path in folder.rglob("*")) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no run to resume"):
        distill(data, small(), tmp_path, resume=True, progress=False, device="cpu")


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
        distill(data, small(**settings), finished[0], resume=True, progress=False, device="cpu")
    assert read_config(finished[0] / "config.yaml").seed == 0


def test_a_run_on_other_data_is_not_resumed(finished, data):
    other = make_data(per_class=11)
    with pytest.raises(ValueError, match=f"{data.fingerprint[:16]}.*{other.fingerprint[:16]}"):
        distill(other, small(), finished[0], resume=True, progress=False, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ipc": 11}, "class 0.*10 training images.*11.*ipc of at most 10, or start from noise .*--image-init noise"),
        ({"depth": 5}, "too small for depth 5"),
        ({"precision": "tf32"}, "tf32"),
        ({"image_lr": 1e300}, r"image_lr must be at most 3.4e\+38, float32's limit; got 1e\+300"),
    ],
)
def test_what_cannot_work_is_refused_before_a_run_begins(data, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        distill(data, small(**settings), tmp_path / "run", progress=False, device="cpu")
    distill(data, small(1), tmp_path / "run", progress=False, device="cpu")  # the folder is still free


def uneven_data():
    """Three classes of 10, 4 and 2 training images."""
    data = make_data()
    kept = torch.cat([(data.train_labels == label).nonzero().flatten()[:size] for label, size in enumerate((10, 4, 2))])
    tensors = data.train_images[kept], data.train_labels[kept], data.test_images, data.test_labels
    return ImageData.from_tensors("uneven", data.class_names, *tensors)


def test_classes_smaller_than_the_batch_are_distilled_and_named(tmp_path, capsys):
    run = distill(uneven_data(), small(2, real_batch=6), tmp_path / "run", progress=False, device="cpu")
    assert run.ipc == 2 and torch.isfinite(run.images).all()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "fewer" in line]
    assert line.startswith("2 of 3 classes have fewer than 6 training images (the smallest, 'class 2', has 2): ")
    distill(uneven_data(), small(2, real_batch=2), tmp_path / "other", progress=False, device="cpu")
    assert "fewer" not in capsys.readouterr().err


def test_more_images_than_a_class_has_can_start_from_noise(tmp_path):
    run = distill(uneven_data(), small(2, ipc=3, image_init="noise"), tmp_path / "run", progress=False, device="cpu")
    assert run.ipc == 3 and torch.isfinite(run.images).all()


def test_two_runs_cannot_write_one_folder(data, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    tmp_path.joinpath(".lock").touch()
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is writing"):
            distill(data, small(), tmp_path, progress=False, device="cpu")


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "a learning rate that makes the images overflow, or leaves them finite but far outside of the data",
    "the run stops and names the setting to lower; the last good checkpoint is kept, no set is written",
)
@pytest.mark.parametrize("loss_scale", [1e30, 10.0])
def test_diverged_images_stop_the_run_and_keep_the_last_good_checkpoint(loss_scale, data, tmp_path, capsys):
    settings = {"image_lr": 1e30, "loss_scale": loss_scale, "augmentation": "none", "log_every": 100}
    with pytest.raises(DivergenceError, match=r"class 0.*lower image_lr \(it is 1e\+30\)") as stop:
        distill(data, small(**settings), tmp_path, progress=False, device="cpu")
    assert "resume" not in str(stop.value) + capsys.readouterr().err, "the same settings would diverge again"
    assert f"the last good checkpoint is {tmp_path}/checkpoints/iteration-00000000" in str(stop.value)
    kept = latest_checkpoint(tmp_path / "checkpoints")
    assert kept.iteration == 0 and all(torch.isfinite(tensor).all() for tensor in kept.tensors.values())
    assert not (tmp_path / "synthetic.safetensors").exists()


def test_a_given_set_is_where_the_images_start(finished, data, tmp_path):
    given = finished[1]
    shuffled = torch.tensor([5, 0, 2, 4, 1, 3])
    mixed = SyntheticSet(given.images[shuffled], given.labels[shuffled], given.class_names, given.preprocessing)
    distill(data, small(1), tmp_path / "run", start=mixed, progress=False, device="cpu")
    started = _checkpoint_at(tmp_path / "run", 0)
    for label in range(3):
        expected, got = given.images[2 * label : 2 * label + 2], started[2 * label : 2 * label + 2]
        assert any(torch.equal(got, expected[order]) for order in ([0, 1], [1, 0]))
    (begun,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert begun["started_from"] == "a given set"
    resumed = distill(data, small(2), tmp_path / "run", resume=True, progress=False, device="cpu")
    assert not torch.equal(resumed.images, given.images)


def test_a_given_set_in_another_model_space_goes_by_way_of_pixels(data, tmp_path):
    pytest.importorskip("kornia")
    preprocessing = fit_preprocessing(data.train_images, "zca", progress=False)
    real = data.train_images[data.class_index[torch.tensor([0, 1, 10, 11, 20, 21])]]
    given = SyntheticSet(
        preprocessing.to_model(real), torch.arange(3).repeat_interleave(2), data.class_names, preprocessing
    )
    distill(data, small(1), tmp_path, start=given, progress=False, device="cpu")
    expected = fit_preprocessing(data.train_images, "standard").to_model(real)
    torch.testing.assert_close(_checkpoint_at(tmp_path, 0), expected, rtol=1e-3, atol=1e-3)


def test_a_given_set_that_does_not_fit_is_refused(finished, data, tmp_path):
    with pytest.raises(ValueError, match=r"3 images \[3, 8, 8\].*got 2 images"):
        distill(data, small(ipc=3), tmp_path, start=finished[1], progress=False, device="cpu")


def _checkpoint_at(folder, iteration):
    from atom_fast.distillation.checkpoint import load_checkpoint

    return load_checkpoint(folder / "checkpoints" / f"iteration-{iteration:08d}.safetensors").tensors["images"]


def test_without_tensorboard_a_run_says_so_once(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    distill(data, small(4), tmp_path, progress=False, device="cpu")
    assert capsys.readouterr().err.count("TensorBoard cannot be imported") == 1
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "log.jsonl").exists()


def test_the_progress_bar_shows_terms_speed_and_time_left(data, tmp_path, capsys):
    distill(data, small(4, log_every=1), tmp_path, progress=True, device="cpu")
    shown = capsys.readouterr().err
    for word in ("4/4", "loss", "attention", "mmd", "peak", "step/s", "<"):
        assert word in shown


class _FullLog:
    """A log file on a disk that takes three records."""

    def __init__(self, path, mode, buffering):
        self.file, self.left = open(path, mode, buffering=buffering), 3  # noqa: SIM115  closed by close()

    def write(self, line):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(line)

    def close(self):
        self.file.close()


@pytest.mark.fault(
    "Full disks",
    "the log cannot grow any more in the middle of a run",
    "the file and the last saved iteration are named; resuming ends with the same bits",
)
def test_a_log_that_cannot_grow_ends_a_run_that_can_go_on(data, tmp_path, monkeypatch, capsys, ten_iterations):
    with monkeypatch.context() as full:
        full.setattr(logs, "open", _FullLog, raising=False)
        with pytest.raises(OSError, match=f"cannot write {tmp_path}/log.jsonl: No space left on device"):
            distill(data, small(10), tmp_path, progress=False, device="cpu")
    assert f"iteration 4 is saved in {tmp_path}; to continue, call distill again" in capsys.readouterr().err
    resumed = distill(data, small(10), tmp_path, resume=True, progress=False, device="cpu")
    assert torch.equal(resumed.images, ten_iterations)


@pytest.fixture(scope="module")
def ten_iterations(tmp_path_factory, data):
    """The images of an uninterrupted run of 10 iterations."""
    return distill(data, small(10), tmp_path_factory.mktemp("ten"), progress=False, device="cpu").images


@pytest.mark.fault(
    "Stopped runs",
    "SIGTERM or SIGINT to a process that distils from Python",
    "as from the command line: saved, exit code 143 or 130; resuming ends with the same bits",
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step_and_resuming_gives_the_same_bits(
    number, code, data, ten_iterations, tmp_path, monkeypatch, capsys
):
    step = Distillation.step

    def signalled(run, iteration):
        if iteration == 7:
            os.kill(os.getpid(), number)
        step(run, iteration)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Distillation, "step", signalled)
        distill(data, small(10), tmp_path, progress=False, device="cpu")
    assert stop.value.code == code and signal.getsignal(number) is before
    assert latest_checkpoint(tmp_path / "checkpoints").iteration == 7
    messages = capsys.readouterr().err
    assert f"{number.name}: stopped after iteration 7 of 10, which is saved in {tmp_path}" in messages
    assert "to continue, call distill again with resume=True" in messages
    resumed = distill(data, small(10), tmp_path, resume=True, progress=False, device="cpu")
    assert torch.equal(resumed.images, ten_iterations)


def test_a_second_signal_acts_at_once(data, tmp_path, monkeypatch):
    def signalled_twice(run, iteration):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Distillation, "step", signalled_twice)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits "ignore"
    with pytest.raises(KeyboardInterrupt):
        distill(data, small(10), tmp_path, progress=False, device="cpu")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
