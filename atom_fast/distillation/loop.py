"""Algorithm 1 from its first iteration to its last: a run's folder, logs, pictures, checkpoints and synthetic set."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import describe_small_classes
from atom_fast.data.whitening import Preprocessing, fit_preprocessing
from atom_fast.distillation.checkpoint import Checkpoint, latest_checkpoint, remove_unfinished, save_checkpoint
from atom_fast.distillation.config import ADDED, DistillConfig, affects_result, write_config
from atom_fast.distillation.logs import RunLog, append_environment, environment, peak_memory, say, versions
from atom_fast.distillation.matching import FUSED
from atom_fast.distillation.memory import fit_class_chunk
from atom_fast.distillation.ranks import ALONE, StopSign, World, own_device
from atom_fast.distillation.step import (
    Distillation,
    NonFiniteError,
    check_ranks,
    check_start,
    initial_images,
    make_network,
)
from atom_fast.pictures import save_image_grid
from atom_fast.synthetic import SYNTHETIC_FILE, SyntheticSet

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
CHECKPOINT_FOLDER = "checkpoints"
IMAGE_FOLDER = "images"
LOCK_FILE = ".lock"


def distill(
    config: DistillConfig,
    data: ImageData,
    output: str | os.PathLike,
    *,
    resume: bool = False,
    progress: bool = True,
    synthetic_init: SyntheticSet | None = None,
    device: torch.device | str | None = None,
    preprocessing: Preprocessing | None = None,
    how_to_go_on: str = "call distill again with resume=True",
    world: World = ALONE,
) -> SyntheticSet:
    """Distil ``data`` into ``config.ipc`` images a class, and keep everything about it in one folder.

    The folder holds ``config.yaml`` (every setting, nothing left open), ``environment.json``, ``log.jsonl``,
    ``tensorboard/``, ``images/`` (PNG grids), ``checkpoints/`` and, at the end, ``synthetic.safetensors``.

    SIGTERM and Ctrl-C finish the step, save, say how to resume, and exit with 143 and 130.

    Args:
        config: the settings; what they leave open is derived from data and device.
        data: the real images.
        output: the run's folder, new or empty; with ``resume`` a run to go on with, which is started where there is
            none yet. A run of the same settings may be resumed with more iterations.
        resume: go on from the newest intact checkpoint. On one CPU the result has the same bits as a run that was never
            stopped.
        progress: show a progress bar on standard error.
        synthetic_init: start from this set in place of ``config.image_init``; same classes, ipc and image shape.
        device: where to compute; None: the GPU, if there is one. Each of several processes has a GPU of its own.
        preprocessing: what ``config.preprocessing`` names, fitted to these images before, on the same device; None fits
            it. For several runs on the same data.
        how_to_go_on: what the message of a stopped run advises; commands have their own ways.
        world: several processes that share the classes (`atom_fast.distillation.ranks.join`); each calls this with
            the same arguments, and the first one writes the folder. The images do not depend on how many there
            are, on CPUs to the bit, and a run need not be resumed with as many.

    Returns:
        The synthetic set, on the CPU, in every process.

    Raises:
        ValueError: settings that do not fit the data, the device or the number of processes, or the run to be resumed;
            nothing was changed.
        FileExistsError: the folder is not empty and ``resume`` is not set.
        RuntimeError: another process is writing to the folder; a loss or an image became NaN or infinite
            (`NonFiniteError`: the last good checkpoint is kept and named); or another rank failed or is lost
            (`RankError`).
        OSError: a file could not be written (a full disk); the newest checkpoint is named.
        SystemExit: the run was interrupted, and saved.
    """
    output = Path(output)
    device = own_device(device, world)
    writes = world.rank == 0
    progress = progress and writes
    if synthetic_init is not None:
        config = dataclasses.replace(config, image_init="given")
    config = config.resolve(data.image_shape, data.name, device)
    _check_fit(config, data, synthetic_init is not None or resume)
    check_ranks(config, data, world)
    if preprocessing is not None and preprocessing.kind != config.preprocessing:
        raise ValueError(f"preprocessing must be of kind {config.preprocessing!r}; got {preprocessing.kind!r}")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _locked(output, resume) if writes else contextlib.nullcontext():
        checkpoint = _checkpoint_to_resume(output, config, data) if resume and writes else None
        checkpoint = _agree(world, config, data, checkpoint)
        real = data.to(device)
        if preprocessing is None:
            preprocessing = fit_preprocessing(real.train_images, config.preprocessing, progress=progress)
        run = _start(config, real, preprocessing, checkpoint, synthetic_init, progress, world)
        if writes:
            write_config(config, output / CONFIG_FILE, data.name)
            append_environment(output / ENVIRONMENT_FILE, {**environment(device), "processes": world.size})
        recorder = _Recorder(run, output, checkpoint, preprocessing, progress, how_to_go_on)
        _iterate(run, recorder)
        result = _synthetic_set(recorder)
        if writes:
            with recorder.saying_what_is_saved():
                recorder.check_folder()
                result.save(output / SYNTHETIC_FILE)
    return result


def _check_fit(config: DistillConfig, data: ImageData, given: bool) -> None:
    """Refuse what cannot work before anything is written."""
    if config.image_init == "given" and not given:
        raise ValueError("image_init 'given' needs a synthetic set to start from (synthetic_init, --set)")
    check_start(config, data)
    make_network(config, data)


@contextlib.contextmanager
def _locked(output: Path, resume: bool) -> Iterator[None]:
    """Hold the run's folder, which is made where it is missing, for this process alone (POSIX)."""
    output.mkdir(parents=True, exist_ok=True)
    _check_folder(output, resume)  # before even a lock is left in it
    with open(output / LOCK_FILE, "w") as lock:
        _lock(lock, output)
        _check_folder(output, resume)  # again: another process may have had the lock
        remove_unfinished(output)
        remove_unfinished(output / CHECKPOINT_FOLDER)
        remove_unfinished(output / IMAGE_FOLDER)
        yield


def _check_folder(output: Path, resume: bool) -> None:
    """Refuse a folder that is not empty, unless it holds a run and that is to be resumed."""
    entries = [entry.name for entry in output.iterdir() if not entry.match(f".{CONFIG_FILE}.*.part")]
    if not set(entries) - {LOCK_FILE}:
        return
    if not resume:
        raise FileExistsError(
            f"{output} is not empty: choose another folder, or resume the run in it (resume=True, --resume)"
        )
    if CONFIG_FILE not in entries:
        raise ValueError(f"{output} holds no run to resume: it is not empty, but has no {CONFIG_FILE}")


def _lock(file, output: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(f"another process is writing to {output}; wait for it, or choose another folder") from error
    except OSError as error:  # some network file systems
        say(f"{output} cannot be locked ({error.strerror}): make sure yourself that no other process writes to it")


def _checkpoint_to_resume(output: Path, config: DistillConfig, data: ImageData) -> Checkpoint | None:
    """The newest intact checkpoint, if it belongs to this configuration and data."""
    checkpoint = latest_checkpoint(output / CHECKPOINT_FOLDER, report=say)
    if checkpoint is None:
        if (output / SYNTHETIC_FILE).exists():
            raise ValueError(
                f"{output} holds a finished {SYNTHETIC_FILE}, but no checkpoint to continue from; use another folder"
            )
        say(f"no checkpoint in {output}: starting at the first iteration")
        return None
    before, current = {**ADDED, **checkpoint.config}, config.to_dict()
    names = (name for name in current if affects_result(name) and name != "iterations")
    changed = [
        f"{name} was {before.get(name)!r}, is {current[name]!r}" for name in names if current[name] != before.get(name)
    ]
    if changed:
        raise ValueError(
            f"the run in {output} has other settings: {'; '.join(changed)}; use the same, or another folder"
        )
    if checkpoint.data_fingerprint != data.fingerprint:
        raise ValueError(
            f"the run in {output} was started on other data: its fingerprint is {checkpoint.data_fingerprint[:16]}, "
            f"that of {data.name} is {data.fingerprint[:16]}; use the same data, or another folder"
        )
    if checkpoint.iteration > config.iterations:
        raise ValueError(
            f"the run in {output} has done {checkpoint.iteration} iterations; got iterations {config.iterations}"
        )
    say(f"resuming {output} after iteration {checkpoint.iteration}")
    return checkpoint


def _agree(world: World, config: DistillConfig, data: ImageData, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint that the first rank found; on the others without its tensors.

    Raises:
        ValueError: the ranks have different settings or data.
    """
    if world.size == 1:
        return checkpoint
    place = checkpoint and (checkpoint.iteration, checkpoint.seconds)
    ranks = world.exchange([config.to_dict(), data.fingerprint, place])
    for rank, (settings, fingerprint, _) in enumerate(ranks):
        if (settings, fingerprint) != (ranks[0][0], ranks[0][1]):
            differs = "settings" if settings != ranks[0][0] else "data"
            raise ValueError(f"rank {rank} of {world.size} has other {differs} than rank 0; all need the same")
    if world.rank == 0 or ranks[0][2] is None:
        return checkpoint
    iteration, seconds = ranks[0][2]
    return Checkpoint(iteration, {}, config.to_dict(), data.fingerprint, seconds)


def _start(
    config: DistillConfig,
    data: ImageData,
    preprocessing: Preprocessing,
    checkpoint: Checkpoint | None,
    synthetic_init: SyntheticSet | None,
    progress: bool,
    world: World,
) -> Distillation:
    if world.rank > 0:
        images = None  # of the first rank
    elif checkpoint is not None:
        images = checkpoint.tensors["images"]
    elif synthetic_init is not None:
        images = _given_images(synthetic_init, config, data, preprocessing)
    else:
        images = initial_images(config, data, preprocessing, progress=progress)
    classes = data.num_classes
    own = torch.empty(len(world.share(classes)) * config.ipc, *data.image_shape, device=data.class_index.device)
    images = world.deal(images, own, classes)
    run = Distillation(config, data, preprocessing, images, progress=progress, world=world)
    if checkpoint is not None:
        run.restore(checkpoint.tensors)
    if config.memory_budget is not None:
        chunk = fit_class_chunk(run, config.memory_budget)
        say(f"{world.label}memory_budget {config.memory_budget}: {chunk} classes at once")
    if (small := describe_small_classes(data, config.real_batch)) and world.rank == 0:
        say(f"{small}: each step draws some of their images more than once (real_batch {config.real_batch})")
    if run.fusion != FUSED and world.rank == 0:
        say(f"the network runs {run.fusion}")
    if config.cuda_graph and run.images.device.type == "cuda":
        run.capture()
    return run


def _given_images(given: SyntheticSet, config: DistillConfig, data: ImageData, preprocessing: Preprocessing):
    """A set's images, class-major, in this run's model space."""
    shape = tuple(given.images.shape[1:])
    if given.class_names != data.class_names or given.ipc != config.ipc or shape != data.image_shape:
        raise ValueError(
            f"the set to start from must have {config.ipc} images {list(data.image_shape)} of each of the "
            f"{data.num_classes} classes {', '.join(data.class_names[:3])} ...; got {max(given.class_sizes)} images "
            f"{list(shape)} of {len(given.class_names)} classes {', '.join(given.class_names[:3])} ..."
        )
    given = given.to(data.train_images.device)
    order = torch.argsort(given.labels, stable=True)
    own, others = preprocessing.tensors(), given.preprocessing.tensors()
    if own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own):
        return given.images[order]  # not by way of pixels: they are clamped
    return preprocessing.to_model(given.pixels()[order])


class _Recorder:
    """Everything that is kept of a run as it goes: log and progress bar, pictures, checkpoints.

    Every rank has one, and calls the same of its methods; only the first rank's writes.
    """

    def __init__(
        self,
        run: Distillation,
        output: Path,
        start: Checkpoint | None,
        preprocessing: Preprocessing,
        progress: bool,
        how_to_go_on: str,
    ):
        from tqdm import tqdm

        self.first = start.iteration if start else 0
        self.run = run
        self.output = output
        self.preprocessing = preprocessing
        self.how_to_go_on = how_to_go_on
        self.saved: Path | None = None  # the newest checkpoint that this process wrote
        self.saved_iteration = start.iteration if start else None
        self._fingerprint = run.data.fingerprint
        self._writes = run.world.rank == 0
        self._lock = os.stat(output / LOCK_FILE) if self._writes else None
        self._started = time.monotonic() - (start.seconds if start else 0.0)
        self._last_reading = self.first, time.monotonic()
        self._being_read: int | None = None  # the iteration whose loss terms are on their way from the device
        self._log = RunLog(output, self.first) if self._writes else None
        self._bar = tqdm(
            total=run.config.iterations, initial=self.first, desc="distilling", unit="step", disable=not progress
        )

    def check_folder(self) -> None:
        """Make sure that the folder is still the one that this process holds.

        Raises:
            FileNotFoundError: it was removed; another run may have begun in its place.
        """
        try:
            if not self._writes or os.path.samestat(os.stat(self.output / LOCK_FILE), self._lock):
                return
        except OSError:
            pass
        self.saved_iteration = None
        message = f"the folder {self.output}, or its {LOCK_FILE}, was removed while the run was writing to it"
        raise FileNotFoundError(errno.ENOENT, message)

    def seconds(self) -> float:
        """Spent on this run so far, in this process and before it."""
        return time.monotonic() - self._started

    def advance(self) -> None:
        """Count a step that was handed to the device, and write down what `log` left; raises as `log`."""
        self._finish_reading()
        self._bar.update()

    def log(self, iteration: int) -> None:
        """Read the loss terms back from the device, unless that was done at this iteration, and write them down.

        On a GPU the latter is left to `advance`, so that the device has the next step to do meanwhile.

        Raises:
            NonFiniteError: one of them, or an image, is NaN or infinite.
        """
        if iteration in (self._last_reading[0], self._being_read):
            return
        self.run.start_reading()
        self._being_read = iteration
        if self.run.reads_at_once():
            self._finish_reading()

    def _finish_reading(self) -> None:
        """Write down what `log` began to read, if there is such; raises as `log`."""
        iteration, self._being_read = self._being_read, None
        if iteration is None:
            return
        self.check_folder()
        try:
            terms = self.run.finish_reading()
        except NonFiniteError as error:
            kept = self.saved or f"in {self.output / CHECKPOINT_FOLDER}"
            raise NonFiniteError(f"{error}; the last good checkpoint is {kept}") from error
        before, then = self._last_reading
        now = time.monotonic()
        self._last_reading = iteration, now
        if not self._writes:
            return
        memory = peak_memory(self.run.images.device)
        speed = (iteration - before) / max(now - then, 1e-9)
        record = {"iteration": iteration, **terms._asdict(), "steps_per_second": speed, "peak_memory_bytes": memory}
        self._log.write({**record, "seconds": self.seconds()})
        self._bar.set_postfix_str(
            f"loss {terms.loss:.4g} attention {terms.attention_loss:.4g} mmd {terms.mmd_loss:.4g} "
            f"peak {'GPU' if self.run.images.is_cuda else 'process'} memory {memory / 2**20:.0f} MiB",
            refresh=False,  # with the next step, unless the bar was drawn less than a tenth of a second before
        )

    def save(self, iteration: int) -> None:
        """Write a checkpoint of images that are known to be finite."""
        self.check_folder()
        self.log(iteration)
        self._finish_reading()
        state, config = self.run.state(), self.run.config
        if self._writes:
            checkpoint = Checkpoint(iteration, state, config.to_dict(), self._fingerprint, self.seconds(), versions())
            self.saved = save_checkpoint(self.output / CHECKPOINT_FOLDER, checkpoint)
        self.saved_iteration = iteration

    def draw(self, iteration: int) -> None:
        """Write a picture of the images, a row a class, or ten a row at one image a class."""
        self._finish_reading()
        self.check_folder()
        images = self.run.all_images()
        if images is None:
            return
        pixels = self.preprocessing.to_pixels(images)
        path = self.output / IMAGE_FOLDER / f"iteration-{iteration:08d}.png"
        columns = self.run.config.ipc if self.run.config.ipc > 1 else 10
        save_image_grid(pixels, path, columns=columns, class_names=self.run.data.class_names)

    @contextlib.contextmanager
    def saying_what_is_saved(self) -> Iterator[None]:
        """Where an error ends the run, say from which iteration it can go on."""
        try:
            yield
        except (OSError, RuntimeError):
            if self.saved_iteration is not None and self._writes:
                say(
                    f"stopped by an error; iteration {self.saved_iteration} is saved in {self.output}; to continue, "
                    f"{self.how_to_go_on}"
                )
            raise

    def close(self) -> None:
        """Close the log and the progress bar."""
        self._bar.close()
        if self._log is not None:
            self._log.close()


def _iterate(run: Distillation, recorder: _Recorder) -> None:
    """Run the iterations that are left, and record them.

    Raises:
        SystemExit: a signal asked to stop; everything up to the last finished step is saved.
    """
    config, iteration = run.config, recorder.first
    with contextlib.closing(recorder), recorder.saying_what_is_saved(), _deferred_signals() as received:
        sign = StopSign(run.world, iteration)
        if iteration == 0:
            recorder.save(0)
            recorder.draw(0)
        elif iteration % config.image_every == 0:
            recorder.draw(iteration)  # a kill may have come between checkpoint and picture
        while iteration < config.iterations and not sign.asked(iteration, received):
            iteration += 1
            run.step(iteration)
            recorder.advance()
            if iteration % config.log_every == 0:
                recorder.log(iteration)
            if iteration % config.checkpoint_every == 0:
                recorder.save(iteration)
            if iteration % config.image_every == 0:
                recorder.draw(iteration)
        if recorder.saved_iteration != iteration:
            recorder.save(iteration)
            recorder.draw(iteration)
        # At once: where one rank has ended, what started them ends the others, so that none may before all is saved.
        number = sign.asked(iteration, received, at_once=True)
    if number:
        name = signal.Signals(number).name
        if run.world.rank == 0:
            say(
                f"{name}: stopped after iteration {iteration} of {config.iterations}, which is saved in "
                f"{recorder.output}; to continue, {recorder.how_to_go_on}"
            )
        raise SystemExit(128 + number)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM in a list in place of stopping; the second one of a kind acts at once.

    Only the main thread may handle signals; elsewhere they act as they always do.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _synthetic_set(recorder: _Recorder) -> SyntheticSet:
    run, config = recorder.run, recorder.run.config
    metadata = {
        "config": config.to_dict(),
        "config_hash": config.config_hash(),
        "seed": config.seed,
        "dataset": run.data.name,
        "dataset_fingerprint": run.data.fingerprint,
        "device": str(run.images.device.type),
        "seconds": recorder.seconds(),
        "versions": versions(),
    }
    images = run.all_images(everywhere=True).detach().cpu().contiguous()
    labels = torch.arange(run.data.num_classes).repeat_interleave(config.ipc)
    return SyntheticSet(images, labels, run.data.class_names, recorder.preprocessing.to("cpu"), metadata)
