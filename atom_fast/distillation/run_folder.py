"""The folder of a run: lock, settings, log, checkpoints, pictures and the set; and the checks before it is resumed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from atom_fast import _threads
from atom_fast._files import lock
from atom_fast.data.dataset import ImageData
from atom_fast.data.partition import sheet_pixels
from atom_fast.data.placement import host_memory, readable
from atom_fast.data.sampling import describe_small_classes
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation import ranks
from atom_fast.distillation.checkpoint import Checkpoint, latest_checkpoint, remove_unfinished, save_checkpoint
from atom_fast.distillation.config import DistillConfig, affects_result, drop_removed_settings, write_config
from atom_fast.distillation.logs import RunLog, append_environment, environment, log, peak_memory, versions
from atom_fast.distillation.matching import FUSED, joint_refusal
from atom_fast.distillation.memory import describe_memory
from atom_fast.distillation.methods import is_used, make_run
from atom_fast.distillation.pool import Pool, easiest
from atom_fast.distillation.run import DivergenceError, Run
from atom_fast.distillation.start import given_images, initial_images
from atom_fast.distillation.step import Distillation, make_convnet
from atom_fast.names import CONFIG_FILE, ENVIRONMENT_FILE, SYNTHETIC_FILE
from atom_fast.pictures import save_image_grid
from atom_fast.synthetic import SyntheticSet

CHECKPOINT_FOLDER = "checkpoints"
IMAGE_FOLDER = "images"
LOCK_FILE = ".lock"
_SHOWN = 3  # terms beside the progress bar


class RunFolder:
    """A run's folder, locked for this process while the context is entered.

    Every rank enters one and calls the same methods in the same order; only the first rank writes.

    Attributes:
        path: the folder.
        iteration: steps done.
        saved_iteration: the iteration of the newest checkpoint; None without one.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: DistillConfig,
        data: ImageData,
        *,
        resume: bool,
        progress: bool,
        how_to_go_on: str,
    ):
        """Describe the run; see `atom_fast.distill` for the arguments. ``config`` is resolved."""
        self.path = Path(path)
        self.iteration = 0
        self.saved_iteration: int | None = None
        self._config = config
        self._data = data
        self._resume = resume
        self._progress = progress
        self._how_to_go_on = how_to_go_on
        self._saved: Path | None = None  # the newest checkpoint that this process wrote
        self._checkpoint: Checkpoint | None = None  # to resume
        self._lock: os.stat_result | None = None
        self._received: list[int] = []  # signals, while steps are made
        self._opened = contextlib.ExitStack()
        self._deferral = contextlib.ExitStack()

    def __enter__(self) -> RunFolder:
        """Lock the folder, which is made where it is missing, and find the checkpoint to resume.

        Raises:
            ValueError, FileExistsError, RuntimeError: as `atom_fast.distill`; the folder is as it was.
        """
        _check_processes(self._config, self._data)
        with contextlib.ExitStack() as stack:
            checkpoint = None
            if ranks.is_first():
                stack.enter_context(_locked(self.path, self._resume))
                self._lock = os.stat(self.path / LOCK_FILE)
                checkpoint = self._checkpoint_to_resume() if self._resume else None
            self._checkpoint = self._agreed(checkpoint)
            self._opened = stack.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Close everything; if an error ends the run, report from which iteration it can continue."""
        with self._opened, self._deferral:
            recoverable = isinstance(error, (OSError, RuntimeError)) and not isinstance(error, DivergenceError)
            if recoverable and self.saved_iteration is not None and ranks.is_first():
                log(
                    f"stopped by an error; iteration {self.saved_iteration} is saved in {self.path}; to continue, "
                    f"{self._how_to_go_on}"
                )

    def start(
        self, data: ImageData, preprocessing: Preprocessing, start: SyntheticSet | None, pool: Pool | None
    ) -> Run:
        """Prepare the run as it begins, or as its checkpoint left it, and write its settings and environment.

        Args:
            data: real images, on the device that computes.
            preprocessing: on the same device.
            start: initial images instead of ``image_init``; not used where there is a checkpoint.
            pool: the trained networks; None without ``pool_networks``.

        Raises:
            ValueError: ``start`` does not fit the settings or the data, or the checkpoint's pool was another one.
            OSError: a file could not be written.
        """
        config, checkpoint, device = self._config, self._checkpoint, data.train_images.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._pool_digest = None if pool is None else pool.digest
        if checkpoint is not None and checkpoint.pool_digest != self._pool_digest:
            raise ValueError(
                f"the run in {self.path} began with other trained networks than those in the cache: on another "
                "device or by another version they come out differently. Use the cache of that run, or another folder"
            )
        classes = ranks.local_classes(data.num_classes)
        images = None
        if ranks.is_first():
            if checkpoint is not None:
                images = checkpoint.tensors["images"]
            elif start is not None:
                images = given_images(start, config, data, preprocessing)
            else:
                used = data if pool is None else easiest(data, pool.scores, config.easy_fraction)
                images = initial_images(config, used, preprocessing)
        own = torch.empty(len(classes) * config.ipc, *data.image_shape, device=device)
        images = ranks.scatter(images, own, data.num_classes)
        assert images is not None  # the first rank has them, the others received theirs
        progress = self._progress and ranks.is_first()
        if config.method == "matching":
            run = Distillation(config, data, preprocessing, images, classes=classes, pool=pool, progress=progress)
        else:
            run = make_run(config, data, preprocessing, images, progress=progress)
        if checkpoint is not None:
            saved = checkpoint.tensors
            run.restore(
                {name: ranks.scatter(saved.get(name), part, data.num_classes) for name, part in run.state().items()}
            )
        self._describe(run)
        if config.cuda_graph and device.type == "cuda" and isinstance(run, Distillation):
            run.capture()
        self.iteration = checkpoint.iteration if checkpoint else 0
        self.saved_iteration = checkpoint.iteration if checkpoint else None
        self._started = time.monotonic() - (checkpoint.seconds if checkpoint else 0.0)
        self._last_reading = self.iteration, time.monotonic()
        self._preprocessing = preprocessing
        self._checkpoint = None  # its tensors are no longer needed
        self._open(device, start)
        return run

    def _describe(self, run: Run) -> None:
        """Log once what a user may not expect of the run."""
        if not ranks.is_first():
            return
        draws = is_used(run.config.method, "real_batch")
        if draws and (small := describe_small_classes(run.data, run.config.real_batch)):
            log(f"{small}: each step draws some of their images more than once (real_batch {run.config.real_batch})")
        if run.data.host_images is not None:
            size, place = readable(run.data.host_images.nbytes), host_memory(run.images.device)
            log(f"the training images ({size}) stay in {place}: each step reads its images from there")
        if run.fusion not in ("", FUSED):
            log(f"the network runs {run.fusion}")
        memory = describe_memory(run.config, run.data, len(run.classes)) if run.config.method == "matching" else None
        if memory:
            log(memory)
        if run.images.device.type == "cpu":
            log(f"CPU threads: {torch.get_num_threads()} ({_threads.reason()})")

    def _open(self, device: torch.device, start: SyntheticSet | None) -> None:
        """Write settings and environment; open log and progress bar."""
        if ranks.is_first():
            write_config(self._config, self.path / CONFIG_FILE, self._data.name)
            origin = "a given set" if start is not None else self._config.image_init
            record = {
                **environment(device),
                "processes": ranks.count(),
                "started_from": f"iteration {self.iteration}" if self.saved_iteration is not None else origin,
            }
            append_environment(self.path / ENVIRONMENT_FILE, record)
            self._log = self._opened.enter_context(contextlib.closing(RunLog(self.path, self.iteration)))
        bar = tqdm(
            total=self._config.iterations, initial=self.iteration, desc="distilling", unit="step",
            disable=not (self._progress and ranks.is_first()),
        )  # fmt: skip
        self._bar = self._opened.enter_context(contextlib.closing(bar))

    def remaining(self, run: Run) -> Iterator[int]:
        """Yield the numbers of the iterations to run, up to ``config.iterations`` or a signal to stop.

        From here to the end of `finish` SIGTERM and Ctrl-C are deferred to the end of a step.
        """
        self._received = self._deferral.enter_context(_deferred_signals())
        self._sign = ranks.StopSign(self.iteration)
        if self.iteration == 0:
            self._save(run)
            self._draw(run)
        elif self.iteration % self._config.image_every == 0:
            self._draw(run)  # a kill may have come between checkpoint and picture
        while self.iteration < self._config.iterations and not self._sign.asked(self.iteration, self._received):
            yield self.iteration + 1

    def record(self, run: Run, iteration: int) -> None:
        """Note that a step was made, and write what is due: a record in the log, a checkpoint, a picture.

        Raises:
            DivergenceError: at a reading of the loss terms; names the last good checkpoint.
            OSError: a file could not be written, or the folder was removed.
        """
        self.iteration = iteration
        self._bar.update()
        if iteration % self._config.log_every == 0:
            self._write_terms(run)
        if iteration % self._config.checkpoint_every == 0:
            self._save(run)
        if iteration % self._config.image_every == 0:
            self._draw(run)

    def finish(self, run: Run) -> SyntheticSet:
        """Save the last step and the set, and return the set, on the CPU; every rank gets all of it.

        Raises:
            SystemExit: a signal asked to stop; everything up to the last finished step is saved.
        """
        if self.saved_iteration != self.iteration:
            self._save(run)
            self._draw(run)
        # All ranks at once: torchrun ends the others when one has ended, so none may before everything is saved.
        number = self._sign.asked(self.iteration, self._received, at_once=True)
        self._deferral.close()
        if number:
            if ranks.is_first():
                log(
                    f"{signal.Signals(number).name}: stopped after iteration {self.iteration} of "
                    f"{self._config.iterations}, which is saved in {self.path}; to continue, {self._how_to_go_on}"
                )
            raise SystemExit(128 + number)
        result = self._synthetic_set(run)
        if ranks.is_first():
            self._check_not_removed()
            result.save(self.path / SYNTHETIC_FILE)
        return result

    def _check_not_removed(self) -> None:
        """Raise FileNotFoundError if the folder is not the one that this process locked."""
        try:
            if self._lock is None or os.path.samestat(os.stat(self.path / LOCK_FILE), self._lock):
                return
        except OSError:
            pass
        self.saved_iteration = None
        message = f"the folder {self.path}, or its {LOCK_FILE}, was removed while the run was writing to it"
        raise FileNotFoundError(errno.ENOENT, message)

    def _seconds(self) -> float:
        """Return the seconds spent on this run so far, in this process and before it."""
        return time.monotonic() - self._started

    def _write_terms(self, run: Run) -> None:
        """Read the loss terms back from the device and log them, unless that was done at this iteration."""
        before, then = self._last_reading
        if self.iteration == before:
            return
        self._check_not_removed()
        try:
            terms = run.terms(ranks.all_gather_object(run.read()))
        except DivergenceError as error:
            kept = self._saved or f"in {self.path / CHECKPOINT_FOLDER}"
            raise DivergenceError(f"{error}; the last good checkpoint is {kept}") from error
        now = time.monotonic()
        self._last_reading = self.iteration, now
        if not ranks.is_first():
            return
        memory = peak_memory(run.images.device)
        speed = (self.iteration - before) / max(now - then, 1e-9)
        record = {"iteration": self.iteration, **terms._asdict(), "steps_per_second": speed}
        self._log.write({**record, "peak_memory_bytes": memory, "seconds": self._seconds()})
        shown = list(terms._asdict().items())[:_SHOWN]
        self._bar.set_postfix_str(
            "".join(f"{name.removesuffix('_loss')} {value:.4g} " for name, value in shown)
            + f"peak {'GPU' if run.images.is_cuda else 'process'} memory {memory / 2**20:.0f} MiB",
            refresh=False,  # with the next step, unless the bar was drawn less than a tenth of a second before
        )

    def _save(self, run: Run) -> None:
        """Write a checkpoint of images that are known to be finite."""
        self._check_not_removed()
        self._write_terms(run)
        state = {name: ranks.gather(part, self._data.num_classes) for name, part in run.state().items()}
        if ranks.is_first():
            settings, fingerprint = self._config.to_dict(), self._data.fingerprint
            tensors = {name: part for name, part in state.items() if part is not None}
            how = self._seconds(), versions(), self._pool_digest
            checkpoint = Checkpoint(self.iteration, tensors, settings, fingerprint, *how)
            self._saved = save_checkpoint(self.path / CHECKPOINT_FOLDER, checkpoint)
        self.saved_iteration = self.iteration

    def _draw(self, run: Run) -> None:
        """Write a picture of the images: one class per row, or ten classes per row at one image per class."""
        self._check_not_removed()
        images = ranks.gather(run.result, self._data.num_classes)
        if images is None:
            return
        columns = self._config.ipc if self._config.ipc > 1 else 10
        save_image_grid(
            sheet_pixels(images, self._config.partition, self._preprocessing),
            self.path / IMAGE_FOLDER / f"iteration-{self.iteration:08d}.png",
            columns=columns,
            class_names=self._data.class_names,
        )

    def _synthetic_set(self, run: Run) -> SyntheticSet:
        config, data = self._config, self._data
        metadata = {
            "config": config.to_dict(),
            "config_hash": config.config_hash(),
            "seed": config.seed,
            "dataset": data.name,
            "dataset_fingerprint": data.fingerprint,
            "device": run.images.device.type,
            **run.learnt,
            **({} if self._pool_digest is None else {"pool_digest": self._pool_digest}),
            "seconds": self._seconds(),
            "versions": versions(),
        }
        images = ranks.gather(run.result, data.num_classes, everywhere=True)
        assert images is not None  # gathered on every rank
        images = images.detach().cpu().contiguous()
        labels = torch.arange(data.num_classes).repeat_interleave(config.ipc)
        space = self._preprocessing.to("cpu")
        soft = None if run.soft_labels is None else run.soft_labels.detach().cpu().contiguous()
        return SyntheticSet(images, labels, data.class_names, space, metadata, config.partition, soft)

    def _checkpoint_to_resume(self) -> Checkpoint | None:
        """Return the newest intact checkpoint, None without any; raise ValueError if it is of another run."""
        checkpoint = latest_checkpoint(self.path / CHECKPOINT_FOLDER, report=log)
        if checkpoint is None:
            if (self.path / SYNTHETIC_FILE).exists():
                raise ValueError(
                    f"{self.path} holds a finished {SYNTHETIC_FILE}, but no checkpoint to continue from; use another "
                    "folder"
                )
            log(f"no checkpoint in {self.path}: starting at the first iteration")
            return None
        self._check_same_run(checkpoint)
        log(f"resuming {self.path} after iteration {checkpoint.iteration}")
        return checkpoint

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        try:
            # A checkpoint needs no start any more, and memory_budget changed no image.
            # Settings that its version lacked have the defaults.
            saved = {**DistillConfig().to_dict(), **checkpoint.config, "memory_budget": None}
            if saved.get("image_init") == "given":
                saved["image_init"] = self._config.image_init
            before, current = drop_removed_settings(saved), self._config.to_dict()
        except ValueError as error:
            raise ValueError(f"the run in {self.path} cannot be resumed by this version: {error}") from error
        names = [name for name in current if affects_result(name) and name != "iterations"]
        changed = [
            f"{name} was {before.get(name)!r}, is {current[name]!r}"
            for name in names
            if current[name] != before.get(name)
        ]
        if changed:
            raise ValueError(
                f"the run in {self.path} has other settings: {'; '.join(changed)}; use the same, or another folder"
            )
        if checkpoint.data_fingerprint != self._data.fingerprint:
            raise ValueError(
                f"the run in {self.path} was started on other data: its fingerprint is "
                f"{checkpoint.data_fingerprint[:16]}, that of {self._data.name} is {self._data.fingerprint[:16]}; use "
                "the same data, or another folder"
            )
        if checkpoint.iteration > self._config.iterations:
            raise ValueError(
                f"the run in {self.path} has done {checkpoint.iteration} iterations; got iterations "
                f"{self._config.iterations}"
            )

    def _agreed(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """Return the checkpoint that the first rank found, without its tensors on the others.

        Raises:
            ValueError: the ranks have different settings or data.
        """
        place = checkpoint and (checkpoint.iteration, checkpoint.seconds, checkpoint.pool_digest)
        everyone = ranks.all_gather_object([self._config.to_dict(), self._data.fingerprint, place])
        settings, fingerprint, place = everyone[0]
        for rank, (other_settings, other_fingerprint, _) in enumerate(everyone):
            if (other_settings, other_fingerprint) != (settings, fingerprint):
                differs = "settings" if other_settings != settings else "data"
                raise ValueError(f"rank {rank} of {len(everyone)} has other {differs} than rank 0; all need the same")
        if ranks.is_first() or place is None:
            return checkpoint
        iteration, seconds, pool_digest = place
        return Checkpoint(iteration, {}, settings, fingerprint, seconds, pool_digest=pool_digest)


def _check_processes(config: DistillConfig, data: ImageData) -> None:
    """Raise ValueError if the processes cannot share the classes: too few of them, or coupled."""
    processes = ranks.count()
    if processes > 1 and config.method != "matching":
        raise ValueError(f"method {config.method!r} runs in one process; got {processes}: start it without torchrun")
    if processes > 1 and (reason := joint_refusal(make_convnet(config, data), config)):
        raise ValueError(f"the classes cannot be split among {processes} processes: {reason}")
    if processes > data.num_classes:
        raise ValueError(
            f"{processes} processes are more than the {data.num_classes} classes of {data.name}, each of which one "
            f"process computes; start at most {data.num_classes}"
        )


@contextlib.contextmanager
def _locked(folder: Path, resume: bool) -> Iterator[None]:
    """Hold the run's folder, which is made where it is missing, for this process alone (POSIX)."""
    folder.mkdir(parents=True, exist_ok=True)
    _check_usable(folder, resume)  # before even a lock is left in it
    with open(folder / LOCK_FILE, "w") as file:
        _lock(file, folder)
        _check_usable(folder, resume)  # again: another process may have held the lock
        remove_unfinished(folder)
        remove_unfinished(folder / CHECKPOINT_FOLDER)
        remove_unfinished(folder / IMAGE_FOLDER)
        yield


def _check_usable(folder: Path, resume: bool) -> None:
    """Refuse a folder that is not empty, unless it holds a run that is to be resumed."""
    entries = [entry.name for entry in folder.iterdir() if not entry.match(f".{CONFIG_FILE}.*.part")]
    if not set(entries) - {LOCK_FILE}:
        return
    if not resume:
        raise FileExistsError(
            f"{folder} is not empty: choose another folder, or resume the run in it (resume=True, --resume)"
        )
    if CONFIG_FILE not in entries:
        raise ValueError(f"{folder} holds no run to resume: it is not empty, but has no {CONFIG_FILE}")


def _lock(file, folder: Path) -> None:
    try:
        held = lock(file, wait=False)
    except OSError as error:
        log(f"{folder} cannot be locked ({error.strerror}): make sure yourself that no other process writes to it")
        return
    if not held:
        raise RuntimeError(f"another process is writing to {folder}; wait for it, or choose another folder")


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of stopping; the second of a kind acts at once.

    Only the main thread may handle signals; elsewhere they act as usual.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
