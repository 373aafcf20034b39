"""Faults in real processes: killed, stopped, out of disk, without their folders. What was finished stays."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from atom_fast.cli import main
from atom_fast.distillation.checkpoint import latest_checkpoint
from atom_fast.distillation.config import preset
from atom_fast.distillation.logs import RunLog
from atom_fast.distillation.loop import distill
from atom_fast.distillation.run_folder import _locked
from atom_fast.distillation.step import Distillation
from atom_fast.evaluation.results import read_records
from atom_fast.synthetic import SyntheticSet
from tests.distillation.test_step import make_data
from tests.processes import ROOT, Server

pytest.importorskip("fcntl", reason="processes and signals as POSIX has them")

ITERATIONS = 24
SETTINGS = (
    f"--ipc 1 --iterations {ITERATIONS} --real-batch 8 --width 8 --depth 2 --log-every 2 --checkpoint-every 3 "
    "--image-every 8 --device cpu --quiet"
).split()
NOBODY = 65534


@pytest.fixture(scope="module")
def server():
    with contextlib.closing(Server()) as server:
        yield server


class Run:
    """A distillation of digits in a folder of its own."""

    def __init__(self, server, folder, printed):
        self.server, self.folder, self.printed = server, folder, printed

    def start(self, *options, **faults):
        """Its exit code."""
        return self.server.run("distill", *SETTINGS, "--output", self.folder, *options, printed=self.printed, **faults)

    def resume(self, *options, **faults):
        return self.start("--resume", *options, **faults)

    def messages(self):
        """Return what was printed since the last call."""
        text = self.printed.read_text("utf-8")
        self.printed.unlink()
        return text

    def outcome(self):
        """All that must not depend on how often a run was stopped: every bit of the images, momentum, and losses."""
        synthetic = SyntheticSet.load(self.folder / "synthetic.safetensors")
        end = latest_checkpoint(self.folder / "checkpoints")
        log = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        losses = [(record["iteration"], record["loss"], record["mmd_loss"]) for record in log]
        pictures = [(path.name, path.read_bytes()) for path in sorted((self.folder / "images").iterdir())]
        bits = [tensor.view(torch.int32).flatten().tolist() for tensor in (synthetic.images, end.tensors["momentum"])]
        return end.iteration, bits, losses, pictures, synthetic.metadata["config"]


@pytest.fixture
def run(server, tmp_path):
    return Run(server, tmp_path / "run", tmp_path / "printed")


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    """The outcome of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = Run(server, folder / "run", folder / "printed")
    assert run.start() == 0, run.messages()
    outcome = run.outcome()
    assert outcome[0] == ITERATIONS and len(outcome[2]) == 16 and len(outcome[3]) == 4
    return outcome


def files_half_written(folder):
    return [path for path in folder.rglob("*.part")]


# ---------------------------------------------------------------- killed


def moments():
    """Ten: two while a run starts, three between its steps, five at a system call of a write."""
    draw = random.Random(0)
    for _ in range(2):
        yield {"signalled": {"number": signal.SIGKILL, "after": draw.uniform(0.0, 0.1)}}
    for _ in range(3):
        log = {"size": draw.randrange(200, 1800), "after": draw.uniform(0.0, 0.03)}
        yield {"signalled": {"number": signal.SIGKILL, **log}}
    for name in ("fsync", "replace", "write", "fsync", "replace"):
        yield {"kill": name, "call": draw.randrange(1, 16), "when": draw.choice(["before", "after"])}


@pytest.mark.fault(
    "Stopped runs",
    "SIGKILL at 10 random moments: while it starts, between steps, before, in and after the system calls of a write",
    "`--resume` ends with the same bits, losses and pictures as a run that was never stopped",
)
@pytest.mark.parametrize("moment", moments(), ids=range(10))
def test_a_killed_run_resumes_to_the_same_bits(moment, run, uninterrupted):
    if "size" in moment.get("signalled", {}):
        moment["signalled"]["file"] = str(run.folder / "log.jsonl")
    assert run.start(**moment) == -signal.SIGKILL, run.messages()
    assert run.resume() == 0, run.messages()
    assert run.outcome() == uninterrupted
    assert not files_half_written(run.folder)


@pytest.mark.fault(
    "Stopped runs",
    "SIGKILL again and again, each time once one more checkpoint is in its place",
    "every start goes on from the last one; the end is the same",
)
def test_a_run_killed_again_and_again_still_gets_on(run, uninterrupted):
    reached = []
    while not reached or reached[-1] < ITERATIONS:
        assert run.resume(kill="replace", call=5, when="after") == -signal.SIGKILL, run.messages()
        reached.append(latest_checkpoint(run.folder / "checkpoints").iteration)
    assert reached == sorted(set(reached)) and len(reached) >= 4
    assert run.resume() == 0, run.messages()
    assert run.outcome() == uninterrupted


@pytest.mark.fault(
    "Stopped runs",
    "SIGTERM, and SIGINT (Ctrl-C), while steps are made",
    "the step is finished and saved, a line says how to go on, exit code 143 or 130; `--resume` gives the same bits",
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(number, code, run, uninterrupted):
    after_a_few_steps = {"number": number, "file": str(run.folder / "log.jsonl"), "size": 500}
    assert run.start("--checkpoint-every", 1000, signalled=after_a_few_steps) == code
    stopped = latest_checkpoint(run.folder / "checkpoints").iteration
    assert 0 < stopped < ITERATIONS
    message = run.messages()
    assert f"{number.name}: stopped after iteration {stopped} of {ITERATIONS}, which is saved in" in message
    assert f"{run.folder}; to continue, run the same command with --resume" in message and "Traceback" not in message
    assert run.resume() == 0, run.messages()
    assert run.outcome()[:2] == uninterrupted[:2]


@pytest.mark.fault("Stopped runs", "Ctrl-C before the first step, or in any other command", "exit code 130, one line")
def test_ctrl_c_outside_of_steps_has_its_exit_code(monkeypatch, tmp_path):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("atom_fast.data.sources.load_data", interrupted)
    result = CliRunner().invoke(main, ["distill", "--output", str(tmp_path / "run")])
    assert result.exit_code == 130 and result.stderr == "Interrupted\n"


@pytest.mark.fault(
    "Stopped runs", "`python -m atom_fast distill`, as a process of its own, killed and resumed", "the same bits"
)
def test_a_process_started_by_its_command_line_is_killed_and_resumed(run, uninterrupted):
    command = [sys.executable, "-m", "atom_fast", "distill", *SETTINGS, "--output", str(run.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    with open(run.printed, "wb") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=printed)
        until(lambda: len(list((run.folder / "checkpoints").glob("iteration-*"))) > 1 or process.poll() is not None)
        process.kill()
        assert process.wait() == -signal.SIGKILL, run.messages()
    assert run.resume() == 0, run.messages()
    assert run.outcome() == uninterrupted


def until(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


# ---------------------------------------------------------------- full disks


@contextlib.contextmanager
def small_disk(kilobytes):
    """A folder on a file system of that size, a function that enlarges it, and the faults of a process to start there.

    Where no file system may be mounted, files that may not grow stand in for it.
    """
    folder = Path(tempfile.mkdtemp())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        if mounted:
            enlarge = ["mount", "-o", "remount,size=64m", str(folder)]
            yield folder, lambda: subprocess.run(enlarge, check=True), {}
        else:
            yield folder, lambda: None, {"full": "*", "limit": 60 * kilobytes}
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder)


@pytest.mark.fault(
    "Full disks",
    "a file system of 12 and of 72 KB fills up somewhere in a run",
    "one line names the file that could not be written; with room again, `--resume` ends with the same bits",
)
@pytest.mark.parametrize("kilobytes", [12, 72])
def test_a_full_file_system_ends_a_run_that_can_go_on(kilobytes, server, tmp_path, uninterrupted):
    with small_disk(kilobytes) as (folder, enlarge, faults):
        run = Run(server, folder / "run", tmp_path / "printed")
        assert run.start(**faults) == 2
        last = run.messages().splitlines()[-1]
        assert last.strip().startswith("Error: cannot write ") and str(run.folder) in last
        assert "No space left on device" in last or "File too large" in last
        enlarge()
        assert run.resume() == 0, run.messages()
        assert run.outcome() == uninterrupted


@pytest.mark.fault(
    "Full disks",
    "the disk is full when the configuration, a checkpoint, a picture, the final set, or the loss curves are written",
    "the file is named, no half file stays, earlier checkpoints are intact, `--resume` ends with the same bits",
)
@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("config.yaml", None),
        ("iteration-*9.safetensors", 6),
        ("iteration-*16.png", 15),
        ("synthetic.safetensors", ITERATIONS),
        ("loss.png", ITERATIONS),
    ],
)
def test_a_full_disk_at_any_file_ends_a_run_that_can_go_on(name, reached, run, uninterrupted):
    assert run.start(full=name) == 2
    text = run.messages()
    *before, last = text.splitlines()
    # The bar may leave blanks before it, where it was drawn longer before.
    assert last.strip().startswith(f"Error: cannot write {run.folder}") and "File too large" in last, text
    assert not files_half_written(run.folder)
    saved = latest_checkpoint(run.folder / "checkpoints")
    if name == "synthetic.safetensors":
        advice = "to continue, run the same command with --resume"
        assert f"stopped by an error; iteration {ITERATIONS} is saved in {run.folder}; {advice}" in before
    assert getattr(saved, "iteration", None) == reached
    assert run.resume() == 0, run.messages()
    assert run.outcome() == uninterrupted


@pytest.mark.fault(
    "Full disks",
    "the disk is full when an evaluation writes its JSON after a network",
    "one line names it, what stood there stays; called again, it goes on from there",
)
def test_a_full_disk_keeps_what_an_evaluation_had_found(server, finished, tmp_path):
    result, printed = tmp_path / "result.json", tmp_path / "printed"
    command = ["evaluate", finished, "--networks", 2, "--together", 1, "--no-random", "--epochs", 1, "--device", "cpu",
               "--quiet", "--json", result]  # fmt: skip
    assert server.run(*command, printed=printed, kill="replace", call=1, when="after") == -signal.SIGKILL
    first = result.read_text()
    (record,) = read_records(result)
    assert record["unfinished"] == [1]
    assert server.run(*command, printed=printed, full="result.json") == 2
    message = printed.read_text().splitlines()[-1]
    assert message == f"Error: cannot write {result}: File too large; the earlier file is unchanged"
    assert result.read_text() == first
    assert server.run(*command, printed=printed) == 0
    (whole,) = read_records(result)
    assert whole["unfinished"] == [] and whole["accuracies"][0] == record["accuracies"][0]


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory):
    """A set to evaluate."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "set.safetensors"
    arguments = ("select", "--ipc", 1, "--output", path, "--device", "cpu", "--quiet")
    assert server.run(*arguments, printed=folder / "printed") == 0
    return path


@pytest.mark.fault(
    "Full disks",
    "the disk is full when a selection, a picture or an export is written",
    "one line names the file, an earlier one is unchanged",
)
@pytest.mark.parametrize(
    ("command", "name"), [("select", "out.safetensors"), ("show", "out.png"), ("export", "out.pt")]
)
def test_a_full_disk_leaves_the_earlier_file(command, name, server, finished, tmp_path):
    target, printed = tmp_path / name, tmp_path / "printed"
    target.write_text("earlier")
    arguments = {
        "select": ["select", "--output", target, "--device", "cpu", "--quiet"],
        "show": ["show", finished, "--output", target],
        "export": ["export", finished, target, "--for", "pt"],
    }[command]
    assert server.run(*arguments, printed=printed, full=name) == 2
    assert printed.read_text() == f"Error: cannot write {target}: File too large; the earlier file is unchanged\n"
    assert target.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# ---------------------------------------------------------------- folders


@pytest.fixture
def unwritable():
    """A folder that may be read but not written, and the faults of a process that finds it so."""
    folder = Path(tempfile.mkdtemp())
    faults = {}
    if os.getuid() == 0:
        folder.chmod(0o755)
        faults = {"user": NOBODY}
    yield folder, faults
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.fault(
    "Folders", "the place for a run's folder cannot be written to", "refused in one line that names it, before any work"
)
def test_a_read_only_place_is_refused(unwritable, server, tmp_path):
    folder, faults = unwritable
    if not faults:
        folder.chmod(0o555)
    run = Run(server, folder / "run", tmp_path / "printed")
    assert run.start(**faults) == 2
    assert run.messages() == f"Error: Permission denied: {folder / 'run'}\n"


@pytest.mark.fault(
    "Folders", "a run's folder has become read-only when it is resumed", "refused in one line; the run is unchanged"
)
def test_a_run_that_became_read_only_is_not_resumed(unwritable, server, tmp_path):
    folder, faults = unwritable
    run = Run(server, folder / "run", tmp_path / "printed")
    assert run.start(kill="replace", call=8) == -signal.SIGKILL
    content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in [folder, *folder.rglob("*")] if not faults else []:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert run.resume(**faults) == 2
    assert run.messages().splitlines()[-1] == f"Error: Permission denied: {run.folder / '.lock'}"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == content
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)


@pytest.mark.fault(
    "Folders",
    "the run's folder is removed, or replaced by another, while the run goes on",
    "the run ends with one line that says so, and writes nothing there",
)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_removed_folder_ends_the_run(replaced, tmp_path, monkeypatch):
    folder, step = tmp_path / "run", Distillation.step

    def step_and_remove(run, iteration):
        step(run, iteration)
        if iteration == 3:
            folder.rename(tmp_path / "gone")  # at once, as a removal of many files is not
            if replaced:
                folder.mkdir()
                (folder / ".lock").touch()

    monkeypatch.setattr(Distillation, "step", step_and_remove)
    config = preset(ipc=1, iterations=9, real_batch=2, width=4, depth=1, log_every=2, checkpoint_every=3)
    with pytest.raises(FileNotFoundError, match=f"the folder {folder}, or its .lock, was removed while the run"):
        distill(make_data(), config, folder, progress=False, device="cpu")
    left = [path.name for path in folder.iterdir()] if replaced else folder.exists()
    assert left == ([".lock"] if replaced else False)


@pytest.mark.fault("Folders", "a second process is to write to a run's folder", "it is refused; the first goes on")
def test_two_runs_cannot_write_one_folder(run):
    run.server.start("distill", *SETTINGS, "--iterations", 3000, "--output", run.folder, printed=run.printed)
    until((run.folder / "checkpoints" / "iteration-00000003.safetensors").exists)
    assert run.resume("--iterations", 3000) == 2
    assert f"Error: another process is writing to {run.folder}" in run.messages()
    assert run.server.stop(signal.SIGTERM) == 143


def write_images(folder, per_class=12):
    from PIL import Image

    draw = random.Random(0)
    for split, count in (("train", per_class), ("test", 2)):
        for name in ("left", "right"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = Image.frombytes("L", (8, 8), draw.randbytes(64))
                pixels.save(folder / split / name / f"{number}.png")


@pytest.mark.fault(
    "Folders",
    "the data's folder vanishes while a run goes on, and is not there when it is resumed",
    "the run does not need it any more; resuming is refused in one line, and works once the data is back",
)
def test_a_vanished_data_folder(run, tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write_images(data)
    options = ("--dataset", "folder", "--data-dir", data)
    settings = ["distill", *SETTINGS, *options, "--iterations", 400, "--checkpoint-every", 1000]
    run.server.start(*settings, "--output", run.folder, printed=run.printed)
    until((run.folder / "images" / "iteration-00000000.png").exists)
    data.rename(elsewhere)
    assert run.server.stop(signal.SIGTERM) == 143, run.messages()
    stopped = latest_checkpoint(run.folder / "checkpoints").iteration
    more = ("--iterations", stopped + 5)
    run.messages()
    assert run.resume(*options, *more) == 2
    assert run.messages() == (
        f"Error: no folder train/ in {data}; expected train/<class>/ and test/<class>/ (or val/<class>/), each "
        "with image files\n"
    )
    elsewhere.rename(data)
    assert run.resume(*options, *more) == 0, run.messages()


@pytest.mark.fault("Folders", "the file system has no locks", "one warning; the run goes on")
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    import fcntl

    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with _locked(tmp_path / "run", False):
        pass
    assert f"{tmp_path / 'run'} cannot be locked (No locks available)" in capsys.readouterr().err


@pytest.mark.fault("Full disks", "TensorBoard's files cannot be written", "its folder is named; the run can go on")
def test_an_error_of_tensorboard_names_its_folder(tmp_path):
    log = RunLog(tmp_path, 0)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log._board.add_scalar = full
    message = f"cannot write to {tmp_path}/tensorboard: No space left"
    with contextlib.closing(log), pytest.raises(OSError, match=message):
        log.write({"iteration": 1, "loss": 0.5})


# ---------------------------------------------------------------- what a run must not go on with


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "an image of the data has changed, or a setting, when a run is resumed",
    "refused; both fingerprints, or each setting's old and new value, are shown, and the run is unchanged",
)
def test_other_data_or_settings_are_refused_with_their_difference(run, tmp_path, uninterrupted):
    data = tmp_path / "data"
    write_images(data)
    options = ("--dataset", "folder", "--data-dir", data)
    assert run.start(*options, "--iterations", 2) == 0, run.messages()
    run.messages()
    content = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert run.resume(*options, "--seed", 1, "--image-lr", 3) == 2
    assert "has other settings: image_lr was 1.0, is 3.0; seed was 0, is 1; use the same" in run.messages()
    shutil.copy(data / "train/left/0.png", data / "train/left/1.png")
    assert run.resume(*options) == 2
    assert "was started on other data: its fingerprint is " in run.messages()
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == content


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "an image becomes NaN after a step",
    "the next reading stops the run; terms, iteration and class are named, and the last good checkpoint, which goes on",
)
def test_a_nan_names_iteration_and_class_and_the_run_can_go_on(run, uninterrupted):
    assert run.start(nan_at=7) == 2
    message = run.messages()
    assert "NaN or infinity in attention_loss at iteration 8" in message
    assert "images lost in 1 of 10 classes: 3" in message
    assert f"the last good checkpoint is {run.folder}/checkpoints/iteration-00000006.safetensors" in message
    assert latest_checkpoint(run.folder / "checkpoints").iteration == 6
    assert not (run.folder / "synthetic.safetensors").exists()
    assert run.resume() == 0, run.messages()
    assert run.outcome() == uninterrupted


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "`--image-lr 1e300`, or `1e30`, by which images stay finite and leave the data's range",
    "refused, or stopped at the first reading; the setting is named, and resuming is not advised",
)
def test_a_learning_rate_that_diverges_is_named(run):
    assert run.start("--image-lr", "1e300") == 2
    assert run.messages() == "Error: image_lr must be at most 3.4e+38, float32's limit; got 1e+300\n"
    assert not run.folder.exists()
    assert run.start("--image-lr", "1e30") == 2
    text = run.messages()
    assert "images lost in 10 of 10 classes: 0, 1" in text and "lower image_lr (it is 1e+30) or loss_scale (10)" in text
    assert "resume" not in text and not (run.folder / "synthetic.safetensors").exists()


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "a finished run whose checkpoints were deleted is resumed",
    "refused: the finished set would be replaced",
)
def test_a_finished_set_is_not_made_anew(run):
    assert run.start("--iterations", 2) == 0, run.messages()
    shutil.rmtree(run.folder / "checkpoints")
    content = (run.folder / "synthetic.safetensors").read_bytes()
    assert run.resume("--iterations", 2, "--seed", 1) == 2
    assert "holds a finished synthetic.safetensors, but no checkpoint" in run.messages()
    assert (run.folder / "synthetic.safetensors").read_bytes() == content


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "`evaluate --json` names a file that it did not write",
    "refused; the file stays",
)
@pytest.mark.parametrize("content", ["notes", '{"mine": 1}', "[1]", "[" * 10_000])
def test_a_file_that_is_no_result_is_not_replaced(content, finished, tmp_path):
    file = tmp_path / "notes.json"
    file.write_text(content)
    result = CliRunner().invoke(main, ["evaluate", str(finished), "--json", str(file)])
    assert result.exit_code == 2 and f"{file} is not a record of evaluations" in result.stderr
    assert file.read_text() == content


@pytest.mark.fault(
    "Damaged files", "the result of a part of the demo is damaged", "one warning; it is measured again, its set is kept"
)
def test_a_damaged_result_of_the_demo_is_measured_again(tmp_path, monkeypatch, capsys):
    from atom_fast import demo

    made = {"dataset": "digits", "ipc": 1, "method": "atom", "accuracy_mean": 50.0, "accuracy_std": 1.0}
    monkeypatch.setattr(demo, "evaluate", lambda *arguments, **settings: None)
    monkeypatch.setattr(demo, "summary", lambda *arguments: {**made, "seconds": 1.0})
    overrides = {"iterations": 1, "real_batch": 4, "width": 4, "depth": 1}
    demo.run_demo(tmp_path, device="cpu", progress=False, ipcs=(1,), overrides=overrides)
    result = tmp_path / "digits-ipc1" / "result.json"
    whole = result.read_text()
    for damaged in (whole[:30], "{}", "[]"):
        result.write_text(damaged)
        demo.run_demo(tmp_path, device="cpu", progress=False, ipcs=(1,), overrides=overrides)
        assert "result.json is damaged" in capsys.readouterr().err
        assert result.read_text() == whole
