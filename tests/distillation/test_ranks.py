"""Several processes: the bits of one, whatever their number; and no waiting for one that failed or is gone."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from atom_fast.data.sources import load_data
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation import network_cache, ranks, run_folder
from atom_fast.distillation.checkpoint import latest_checkpoint
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.distillation.ranks import RankError, StopSign, join, launched, own_device
from atom_fast.distillation.run import DivergenceError
from atom_fast.distillation.step import Distillation
from atom_fast.evaluation.accuracy import evaluate
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import get_protocol
from tests.distillation.test_step import make_data, make_run

SMALL = {"ipc": 2, "real_batch": 4, "width": 8, "depth": 2, "log_every": 2, "checkpoint_every": 2, "image_every": 4}
# Ten classes: shares of two ranks are even, of four not.
CONFIGURATIONS = {
    "augmented": {},
    "one image in chunks": {"ipc": 1, "class_chunk": 2, "image_average": True},
    "batch norm": {"norm": "batch"},
    "batch norm in chunks": {"norm": "batch", "depth": 3, "class_chunk": 2, "real_batch": 1, "image_average": True},
    "layer norm": {"norm": "layer", "augmentation": "none"},
    "matched means": {"name": "dm", "real_batch": 1},
    "with a pool": {
        "partition": 2,
        "synthetic_batch": 3,
        "pool_networks": 3,
        "pool_epochs": 1,
        "calibration_weight": 1.0,
    },
}


RESUMED = ("instance", "batch")  # norms


def small(iterations=4, **settings):
    return preset(**{**SMALL, "iterations": iterations, **settings})


@pytest.fixture(scope="module")
def context():
    """Processes that are forked from one that has imported everything, and so start at once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs processes that can be forked")
    context = multiprocessing.get_context("forkserver")
    # What a first step and a first log import takes seconds, in each of the processes.
    context.set_forkserver_preload(["tests.distillation.test_ranks", "torch._dynamo", "torch.utils.tensorboard"])
    return context


class Launch:
    """``work(*arguments)`` in ``size`` processes, started as torchrun starts them, with one thread each."""

    def __init__(self, context, size, work, *arguments, silence=ranks.SILENCE):
        self.reports = context.Queue()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            context.Process(target=_run, args=(rank, size, port, silence, work, arguments, self.reports))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def results(self, timeout=60, ranks=None):
        """Return what each of the processes (default: all) returned, or the error it raised."""
        expected = range(len(self.processes)) if ranks is None else ranks
        found = dict(self.reports.get(timeout=timeout) for _ in expected)
        for process in self.processes:
            process.join(timeout)
        return [found[rank] for rank in expected]


def _run(rank, size, port, silence, work, arguments, reports):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in address.items()})
    torch.set_num_threads(1)
    ranks.SILENCE = silence
    try:
        with join("cpu"):
            result = work(*arguments)
    except (Exception, SystemExit) as error:
        result = error
    reports.put((rank, result))


def distil_all(folder):
    """One run for each configuration, and one that continues what more ranks left; a refusal, a NaN, an evaluation.

    Every rank must return the same.
    """
    data, size = make_data(classes=10), ranks.count()
    options = {"progress": False, "device": "cpu"}
    network_cache.cache_folder = lambda: (
        folder / f"cache of {size}"
    )  # each number of processes trains the networks anew
    images = {
        name: distill(data, small(**settings), folder / f"{size} {name}", **options).images
        for name, settings in CONFIGURATIONS.items()
    }
    iterations = {4: 3, 2: 5, 1: 6}[size]
    for norm in RESUMED:
        settings = small(iterations, class_chunk=3, norm=norm)
        images[f"resumed {norm}"] = distill(data, settings, folder / f"resumed {norm}", resume=True, **options).images
    with ranks.alone():
        apart = distill(data, small(2), folder / f"apart {size} {os.environ['RANK']}", **options)
    found = {"apart": apart.images.numpy(), "evaluation": _evaluate(data, folder)}
    return {**{name: found.numpy() for name, found in images.items()}, **found, **_refusals(folder)}


def _evaluate(data, folder):
    chosen = data.class_index[:: len(data.class_index) // 10]
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    images = space.to_model(data.train_images[chosen])
    synthetic = SyntheticSet(images, data.train_labels[chosen], data.class_names, space)
    record = folder / f"evaluation {ranks.count()}.json"
    result = evaluate(
        synthetic, data, protocol=get_protocol("digits", epochs=4), networks=3, evaluate_every=2,
        architecture={"width": 8, "depth": 2}, device="cpu", progress=False, record=record,
    )  # fmt: skip
    return result.curves


def _refusals(folder):
    found = {}
    for name, classes, settings in (
        ("unfused batch norm", 10, {"norm": "batch", "pooling": "max2"}),
        ("few classes", 3, {}),
        ("NaN", 10, {"loss_scale": 1e30, "image_lr": 1e30, "augmentation": "none"}),
    ):
        output = folder / f"{ranks.count()} {name}"
        try:
            distill(make_data(classes=classes), small(**settings), output, progress=False, device="cpu")
            found[name] = None
        except (ValueError, DivergenceError) as error:
            found[name] = f"{type(error).__name__}: {error}".replace(output.name, name)
    return found


@pytest.fixture(scope="module")
def shared(context, tmp_path_factory):
    """Return the results of four processes, then two, then one, and the folder that they wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, {size: Launch(context, size, distil_all, folder).results() for size in (4, 2, 1)}


def _raise_errors(results):
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_gives_the_bits_of_one(shared, size):
    folder, found = shared
    (one,) = _raise_errors(found[1])
    for rank, several in enumerate(_raise_errors(found[size])):
        for name in (*CONFIGURATIONS, "apart"):
            assert (several[name] == one[name]).all(), f"{name}, rank {rank}"
    for name in CONFIGURATIONS:
        ends = [latest_checkpoint(folder / f"{number} {name}" / "checkpoints").tensors for number in (1, size)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0]), name


def test_the_folder_is_that_of_one_process(shared):
    folder, found = shared
    for name in CONFIGURATIONS:
        one, four = (sorted(path.name for path in (folder / f"{size} {name}").iterdir()) for size in (1, 4))
        assert one == four
        records = [
            [json.loads(line) for line in (folder / f"{size} {name}" / "log.jsonl").read_text().splitlines()]
            for size in (1, 4)
        ]
        for ours, theirs in zip(*records, strict=True):
            assert ours["iteration"] == theirs["iteration"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    starts = json.loads((folder / "4 augmented" / "environment.json").read_text())
    assert [start["processes"] for start in starts] == [4]


@pytest.mark.fault(
    "More than one process",
    "a run of four processes is resumed by two, then by one",
    "the bits of a run of one process",
)
def test_a_run_of_four_goes_on_with_two_and_with_one(shared, tmp_path):
    folder, found = shared
    for norm in RESUMED:
        starts = json.loads((folder / f"resumed {norm}" / "environment.json").read_text())
        assert [start["processes"] for start in starts] == [4, 2, 1]
        straight = distill(make_data(classes=10), small(6, norm=norm), tmp_path / norm, progress=False, device="cpu")
        assert torch.equal(torch.from_numpy(found[1][0][f"resumed {norm}"]), straight.images)


def test_an_evaluation_does_not_depend_on_the_number_of_processes(shared):
    _, found = shared
    for size in (2, 4):
        for several in _raise_errors(found[size]):
            assert several["evaluation"] == found[1][0]["evaluation"]
    assert len({curve[4] for curve in found[1][0]["evaluation"]}) > 1, "all alike, this would mean little"


@pytest.mark.fault(
    "More than one process",
    "BatchNorm, which couples the classes, where no fused block joins them, in several processes",
    "refused, with the reason",
)
def test_what_couples_the_classes_is_refused(shared):
    _, found = shared
    assert found[1][0]["unfused batch norm"] is None
    for size in (2, 4):
        for several in _raise_errors(found[size]):
            assert f"the classes cannot be split among {size} processes: norm 'batch'" in several["unfused batch norm"]
            assert "its pooling is not 2x2 average pooling" in several["unfused batch norm"]


@pytest.mark.fault(
    "More than one process",
    "more processes than classes",
    "refused",
)
def test_more_processes_than_classes_are_refused(shared):
    _, found = shared
    assert found[2][0]["few classes"] is None
    for several in found[4]:
        assert "4 processes are more than the 3 classes" in several["few classes"]


@pytest.mark.fault(
    "More than one process",
    "NaN or infinity, with several processes",
    "every process ends with the iteration and the classes; the last good checkpoint is kept",
)
def test_a_nan_ends_the_run_in_every_process(shared):
    _, found = shared
    for size in (2, 4):
        for several in found[size]:
            assert "DivergenceError: NaN or infinity" in several["NaN"]
            assert several["NaN"].split("; the last good")[0] == found[1][0]["NaN"].split("; the last good")[0]


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"ipc": 1}, {}),
        ({"ipc": 1, "real_batch": 1}, {"channels": 1}),
        ({"width": 128, "real_batch": 33}, {"per_class": 33}),  # 32 samples fill a piece of the first block
        ({"norm": "none", "pooling": "avg3", "ipc": 1}, {"size": 16}),
    ],
)
def test_an_image_on_a_cpu_does_not_depend_on_how_many_classes_run_at_once(settings, shape):
    found = []
    for chunk in (7, 4, 3, 1):
        run, _ = make_run(make_data(classes=7, **shape), **{"depth": 2, "class_chunk": chunk, **settings})
        run.step(1)
        run.step(2)
        found.append(run.images)
    for chunked in found[1:]:
        assert torch.equal(chunked, found[0])


def fail_to_save(folder):
    if ranks.is_first():

        def full(*_):
            raise OSError(28, "No space left on device")

        run_folder.save_checkpoint = full
    distill(make_data(), small(), folder, progress=False, device="cpu")


@pytest.mark.fault(
    "More than one process",
    "the disk of the first process fills up",
    "every process ends, and says which failed and why",
)
def test_an_error_in_one_process_ends_all_with_its_message(context, tmp_path):
    first, *others = Launch(context, 3, fail_to_save, tmp_path / "run").results()
    assert isinstance(first, OSError)
    for other in others:
        assert isinstance(other, RankError)
        assert "rank 0 of 3 failed" in str(other)
        assert "No space left on device" in str(other)


def differ(folder):
    data = make_data(per_class=10 if ranks.is_first() else 11)
    distill(data, small(), folder, progress=False, device="cpu")


@pytest.mark.fault(
    "More than one process",
    "processes are given different data",
    "refused; the one that differs is named",
)
def test_processes_with_other_data_are_refused(context, tmp_path):
    for error in Launch(context, 2, differ, tmp_path / "run").results():
        assert "rank 1 of 2 has other data than rank 0" in str(error)


def distil_slowly(folder, norm="instance"):
    step = Distillation.step

    def slow_step(self, iteration):
        step(self, iteration)
        time.sleep(0.05)

    Distillation.step = slow_step
    config = small(100_000, checkpoint_every=5, image_every=10**6, norm=norm)
    distill(make_data(), config, folder, progress=False, device="cpu", resume=True)


@pytest.mark.fault(
    "More than one process",
    "SIGKILL to one of three processes",
    "the others notice after 20 s (3 in the test), name it and stop; checkpoints stay",
)
@pytest.mark.parametrize(("killed", "norm"), [(0, "instance"), (1, "instance"), (1, "batch")])
def test_a_killed_process_ends_the_others(context, tmp_path, killed, norm):
    launch = Launch(context, 3, distil_slowly, tmp_path, norm, silence=3.0)
    _wait_for(tmp_path / "checkpoints" / "iteration-00000005.safetensors")
    started = time.monotonic()
    launch.processes[killed].kill()
    errors = launch.results(ranks=[rank for rank in range(3) if rank != killed])
    assert time.monotonic() - started < 30
    for error in errors:
        assert isinstance(error, RankError), error
    if killed:  # it gave no sign of life, or its images did not come
        assert "rank 1" in str(errors[0])
    else:  # the first one held the store
        assert all("rank 0, which connects them, is gone" in str(error) for error in errors)
    assert latest_checkpoint(tmp_path / "checkpoints").iteration >= 5


@pytest.mark.fault(
    "More than one process",
    "SIGTERM to one of two processes",
    "both stop after the same step, which is saved",
)
def test_one_signalled_process_stops_all_at_the_same_step(context, tmp_path):
    launch = Launch(context, 2, distil_slowly, tmp_path)
    _wait_for(tmp_path / "checkpoints" / "iteration-00000005.safetensors")
    os.kill(launch.processes[1].pid, signal.SIGTERM)
    assert [stop.code for stop in launch.results()] == [143, 143]
    stopped = latest_checkpoint(tmp_path / "checkpoints")
    config = small(stopped.iteration)
    again = distill(make_data(), config, tmp_path / "straight", progress=False, device="cpu")
    assert torch.equal(stopped.tensors["images"], again.images)


@pytest.mark.fault(
    "More than one process",
    "SIGTERM to torchrun",
    "the step is saved; one process goes on to the same bits",
)
def test_torchrun_stops_and_goes_on(tmp_path):
    settings = "--ipc 1 --real-batch 4 --width 8 --depth 2 --checkpoint-every 5 --log-every 5 --image-every 100000"
    command = f"distill --device cpu --quiet --output run --resume {settings}".split()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "atom_fast", *command]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    options = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*launcher, "--iterations", "100000"], **options)
    _wait_for(tmp_path / "run" / "checkpoints" / "iteration-00000005.safetensors", process)
    process.send_signal(signal.SIGTERM)
    messages = process.communicate(timeout=60)[1]
    assert messages.count("SIGTERM: stopped after iteration") == 1, messages
    stopped = latest_checkpoint(tmp_path / "run" / "checkpoints").iteration
    assert f"stopped after iteration {stopped} of 100000" in messages
    config = {"ipc": 1, "real_batch": 4, "width": 8, "depth": 2, "log_every": 5, "checkpoint_every": 5}
    data, options = load_data("digits"), {"progress": False, "device": "cpu"}
    config = preset(iterations=stopped + 3, **config)
    resumed = distill(data, config, tmp_path / "run", resume=True, **options)
    assert torch.equal(resumed.images, distill(data, config, tmp_path / "straight", **options).images)


def _wait_for(path, process=None):
    limit = time.monotonic() + 60
    while not path.exists():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.02)


def test_one_process_needs_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not launched()
    with join():
        assert (ranks.is_first(), ranks.count(), ranks.label()) == (True, 1, "")
        assert ranks.local_classes(7) == range(7)
    assert ranks.all_gather_object({"a": 1}) == [{"a": 1}]
    images = torch.rand(6, 1, 2, 2)
    assert ranks.gather(images, 3) is images
    assert ranks.scatter(images, torch.empty(6, 1, 2, 2), 3) is images
    assert ranks.own_jobs([3, 5]) == [3, 5]
    assert list(ranks.share([3, 5], lambda jobs: ((job, {1: job}) for job in jobs))) == [(3, {1: 3}), (5, {1: 5})]
    assert ranks.after_first(lambda: 7) == 7
    assert not torch.distributed.is_initialized()


def test_a_closed_connection_is_explained_by_the_rank_that_closed_it():
    group = object.__new__(ranks._Group)
    group.rank, group.size, group._store = 0, 4, torch.distributed.HashStore()
    lost = "rank 0 of 4 lost contact with the others while it sent: Connection closed"
    with pytest.raises(RankError, match=lost), group._explained("while it sent"):
        raise RuntimeError("Connection closed by peer\nand a long trace")
    group._store.set("failed", json.dumps([2, "No space left on device"]))
    failed = "rank 2 of 4 failed: No space left on device"
    with pytest.raises(RankError, match=failed), group._explained("while it sent"):
        raise RuntimeError("Connection closed by peer")


class Fake:
    """One of ``size`` ranks; the others take 10 ms per step, and no signal."""

    def __init__(self, rank, size):
        self.rank, self.size, self.local_rank, self.meetings = rank, size, rank, 0

    def all_gather_object(self, value):
        self.meetings += 1
        return [value, [[], 0.01]]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_class_and_every_network_has_one_owner(size, monkeypatch):
    jobs, owned = [0, 2, 3, 7, 8], []
    shares = {count: [] for count in range(size, 40)}
    for rank in range(size):
        monkeypatch.setattr(ranks, "_group", Fake(rank, size))
        owned += ranks.own_jobs(jobs)
        for count, found in shares.items():
            found.append(ranks.local_classes(count))
    assert sorted(owned) == jobs
    for count, found in shares.items():
        assert [number for share in found for number in share] == list(range(count))
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_ranks_compare_their_signals_about_once_a_second(monkeypatch):
    now, group = [0.0], Fake(0, 2)
    monkeypatch.setattr(ranks, "_group", group)
    monkeypatch.setattr(ranks.time, "monotonic", lambda: now[0])
    sign = StopSign(0)
    for iteration in range(1, 2001):
        now[0] += 0.001
        assert sign.asked(iteration, []) is None
    assert 20 <= group.meetings <= 40  # 20 s of steps, and a few meetings more in the beginning
    assert sign.asked(2001, [15], at_once=True) == 15


def test_a_device_for_each_process(monkeypatch):
    assert own_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(ranks, "_group", Fake(98, 99))
    assert own_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="99.*on this machine finds"):
            own_device(None)
    else:
        with pytest.raises(ValueError, match="PyTorch sees no GPU"):
            own_device("cuda")


def test_a_set_may_be_distilled_by_ranks_and_read_by_anyone(shared):
    folder, found = shared
    synthetic = SyntheticSet.load(folder / "4 augmented" / "synthetic.safetensors")
    assert torch.equal(synthetic.labels, torch.arange(10).repeat_interleave(2))
    assert (synthetic.images.numpy() == found[4][3]["augmented"]).all()
