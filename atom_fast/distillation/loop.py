"""Algorithm 1 of the ATOM paper from its first iteration to its last."""

from __future__ import annotations

import os

import torch

from atom_fast.data.dataset import ImageData
from atom_fast.data.partition import check_partition
from atom_fast.data.whitening import Preprocessing, fit_preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.pool import trained_pool
from atom_fast.distillation.ranks import own_device
from atom_fast.distillation.run_folder import RunFolder
from atom_fast.distillation.start import check_start
from atom_fast.distillation.step import make_convnet
from atom_fast.synthetic import SyntheticSet


def distill(
    data: ImageData,
    config: DistillConfig,
    output: str | os.PathLike,
    *,
    resume: bool = False,
    start: SyntheticSet | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    preprocessing: Preprocessing | None = None,
    how_to_go_on: str = "call distill again with resume=True",
) -> SyntheticSet:
    """Distil ``data`` into ``config.ipc`` images per class, and keep everything about it in one folder.

    The folder holds ``config.yaml`` (every setting, nothing left open), ``environment.json``, ``log.jsonl``,
    ``tensorboard/``, ``images/`` (PNG grids), ``checkpoints/`` and, at the end, ``synthetic.safetensors``.

    SIGTERM and Ctrl-C finish the step, save, say how to resume, and exit with 143 and 130.

    Under torchrun, within `atom_fast.distillation.ranks.join`, the processes share the classes; each calls this with
    the same arguments and the first one writes the folder. On CPUs the images have the same bits for any number of
    processes, and a run may be resumed by another number.

    Args:
        data: the real images.
        config: the settings; what they leave open is derived from data and device.
        output: the run's folder, new or empty, or with ``resume`` that of an earlier run.
        resume: continue from the newest intact checkpoint, or start where there is none. The settings must be the
            same; ``iterations`` may be higher. On one CPU the result has the same bits as an uninterrupted run.
        start: initial images, instead of ``config.image_init``; same classes, ipc, partition and image shape.
        progress: show a progress bar on standard error.
        device: where to compute; None: the GPU, if there is one. Each of several processes has its own GPU.
        preprocessing: ``config.preprocessing`` as fitted to these images before, on the same device; None: fit it.
        how_to_go_on: advice in the message of a stopped run.

    Returns:
        The synthetic set, on the CPU.

    Raises:
        TypeError: data, config or start is another kind of object.
        ValueError: settings that do not fit the data, the device or the number of processes, or the run to be resumed;
            nothing was changed.
        FileExistsError: the folder is not empty and ``resume`` is not set.
        RuntimeError: another process is writing to the folder; the images diverged (`DivergenceError`: the last good
            checkpoint is kept and named); or another process failed or is lost (`RankError`).
        OSError: a file could not be written (a full disk); the newest checkpoint is named.
        SystemExit: the run was interrupted, and saved.
    """
    _check_kinds(data, config, start)
    device = own_device(device)
    config = config.resolve(data.image_shape, data.name, device)
    _check_fit(config, data, preprocessing)
    if not resume:
        check_start(config, data, start)
    with RunFolder(output, config, data, resume=resume, progress=progress, how_to_go_on=how_to_go_on) as folder:
        real = data.to(device)
        if preprocessing is None:
            preprocessing = fit_preprocessing(data.stored_images, config.preprocessing, progress=progress).to(device)
        pool = trained_pool(real, preprocessing, config, progress=progress) if config.pool_networks else None
        run = folder.start(real, preprocessing, start, pool)
        for iteration in folder.remaining(run):  # ends early, saved, on SIGTERM or Ctrl-C
            run.step(iteration)
            folder.record(run, iteration)  # what is due: log, checkpoint, picture
        return folder.finish(run)


def _check_kinds(data: object, config: object, start: object) -> None:
    """Name an argument that is another kind of object, such as a path in place of the set there."""
    kinds: list[tuple[str, object, type, str]] = [
        ("data", data, ImageData, "load_data(name) reads them"),
        ("config", config, DistillConfig, "preset(name, ...) makes one"),
    ]
    if start is not None:
        kinds.append(("start", start, SyntheticSet, "SyntheticSet.load(path) reads one"))
    for name, value, kind, advice in kinds:
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__} ({advice}); got {type(value).__name__}")


def _check_fit(config: DistillConfig, data: ImageData, preprocessing: Preprocessing | None) -> None:
    """Refuse what cannot work before anything is written."""
    largest = torch.finfo(torch.float32).max
    for name in ("image_lr", "loss_scale", "mmd_weight"):
        if (getattr(config, name) or 0) > largest:
            raise ValueError(f"{name} must be at most {largest:.2g}, float32's limit; got {getattr(config, name):g}")
    check_partition(config.partition, *data.image_shape[1:])
    make_convnet(config, data)  # raises where the images are too small for its depth
    if preprocessing is not None and preprocessing.kind != config.preprocessing:
        raise ValueError(f"preprocessing must be of kind {config.preprocessing!r}; got {preprocessing.kind!r}")
