"""A record: one set from the data to its tested accuracy, with the seconds of every stage on the clock.

The pool is trained in the record's own folder, so that networks of earlier runs shorten no record. An interrupted
record continues where it was; its seconds are then those of all calls, and the page says how many there were.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atom_fast._files import write_atomically
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation import distill, preset
from atom_fast.distillation.logs import versions
from atom_fast.distillation.pool import trained_pool
from atom_fast.distillation.ranks import own_device
from atom_fast.evaluation.accuracy import evaluate
from atom_fast.names import SYNTHETIC_FILE
from atom_fast.ops import native
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import default_protocol, get_protocol
from benchmarks.accuracy.cells import read_json
from benchmarks.accuracy.datasets import DATASETS, load_named
from benchmarks.harness import environment, synchronize

FORMAT = "atom_fast.record"
STAGES = ("load", "pool", "distill", "evaluate")  # data and preprocessing, and then what their names say
PROGRESS_FILE = "progress.json"


def run(
    name: str,
    dataset: str,
    ipc: int,
    output: str | os.PathLike,
    what: str,
    *,
    preset_name: str = "best",
    settings: Mapping[str, Any] | None = None,
    protocol: str | None = None,
    networks: int = 5,
    epochs: int | None = None,
    data_dir: str | os.PathLike | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict:
    """Measure a record, or what is missing of it, and write ``NAME.json``; return its content.

    Args:
        name: of the record and its file: lower-case letters, digits and hyphens.
        dataset, ipc, data_dir: the data (`load_named`) and the stored images per class.
        output: the record's folder: run, pool, evaluation, and the record.
        what: what changed against the records before, in a few words.
        preset_name, settings: settings of the distillation, and those that replace the preset's.
        protocol, networks, epochs: of the evaluation; None: the data set's protocol, and the protocol's epochs.
        device: None: the GPU, if there is one.
        progress: show progress bars on standard error.

    Raises:
        ValueError: a name, data set or setting that is not accepted, or a folder of another record.
        FileNotFoundError: the data are missing.
        OSError, RuntimeError, SystemExit: as `distill` and `evaluate`; the same call continues.
    """
    if not re.fullmatch(r"[a-z0-9-]+", name):
        raise ValueError(f"name must be of lower-case letters, digits and hyphens; got {name!r}")
    if dataset not in DATASETS:
        raise ValueError(f"data set must be one of {', '.join(DATASETS)}; got {dataset!r}")
    output, settings = Path(output), dict(settings or {})
    config = preset(preset_name, **{**settings, "ipc": ipc})
    protocol = protocol or ("digits" if dataset.startswith("digits") else default_protocol(dataset))
    training = get_protocol(protocol) if epochs is None else get_protocol(protocol, epochs=epochs)
    asked = {
        "name": name,
        "dataset": dataset,
        "ipc": ipc,
        "preset": preset_name,
        "settings": settings,
        "protocol": protocol,
        "epochs": epochs,
        "networks": networks,
        "what": what,
    }
    clock = _Clock(output / PROGRESS_FILE, asked)
    target = output / f"{name}.json"
    if target.is_file():
        return read_json(target, "remove it to measure it again")
    clock.start()
    device = own_device(device)
    if device.type == "cpu":
        native.is_built()  # compiled once for all runs of a machine: no part of a record
    with clock.stage("load", device.type):
        data, title = load_named(dataset, data_dir, progress=progress)
        data = data.to(device)
        config = config.resolve(data.image_shape, data.name, device)
        space = fit_preprocessing(data.train_images, config.preprocessing, progress=progress)
    finished = output / "run" / SYNTHETIC_FILE
    if finished.is_file():
        synthetic = SyntheticSet.load(finished)
    else:
        with _own_cache(output / "cache"):
            if config.pool_networks:
                with clock.stage("pool", device.type):
                    trained_pool(data, space, config, progress=progress)
            with clock.stage("distill", device.type):
                synthetic = distill(
                    data, config, output / "run", resume=(output / "run").exists(), progress=progress, device=device,
                    preprocessing=space, how_to_go_on="run the same command again",
                )  # fmt: skip
    with clock.stage("evaluate", device.type):
        result = evaluate(
            synthetic, data, networks=networks, protocol=training, device=device, progress=progress,
            record=output / "evaluation.json",
        )  # fmt: skip
    found = result.to_dict()
    record = {
        "format": FORMAT,
        **asked,
        "data": title,
        "fingerprint": data.fingerprint,
        "accuracy": {
            "mean": found["accuracy_mean"],
            "std": found["accuracy_std"],
            "accuracies": found["accuracies"],
            "epoch": training.epochs,
            "protocol": training.to_dict(),
            "network": found["network"],
            "architecture": found["architecture"],
        },
        "partition": synthetic.partition,
        "seconds": {stage: round(clock.seconds.get(stage, 0.0), 1) for stage in STAGES},
        "calls": clock.calls,
        "config": config.to_dict(),
        "config_hash": config.config_hash(),
        "sha256": set_digest(synthetic),
        "environment": environment(device.type),
        "versions": versions(),
        "command": _command(asked, data_dir),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    write_atomically(target, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record


def set_digest(synthetic: SyntheticSet) -> str:
    """Return the SHA-256 of a set's stored images (float32) and their labels (int64), in the order of the file."""
    digest = hashlib.sha256()
    for tensor in (synthetic.sheets, synthetic.sheet_labels):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


class _Clock:
    """Seconds of every stage over all calls, kept in a file.

    Args:
        path: the file.
        asked: what is measured; the file of something else is refused.
    """

    def __init__(self, path: Path, asked: Mapping[str, object]):
        self._path, self._asked = path, json.loads(json.dumps(asked))
        self.seconds: dict[str, float] = {}
        self.calls = 0
        if path.is_file():
            found = read_json(path, "remove its folder to measure the record again")
            if not isinstance(found, dict) or found.get("asked") != self._asked:
                raise ValueError(f"{path.parent} holds another record: give another --output, or the same options")
            self.seconds, self.calls = found["seconds"], found["calls"]

    def start(self) -> None:
        """Count a call."""
        self.calls += 1
        self._write()

    @contextlib.contextmanager
    def stage(self, name: str, device: str) -> Iterator[None]:
        """Add the seconds of a stage, also of one that ends in an error."""
        started = time.perf_counter()
        try:
            yield
            synchronize(device)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self._write()

    def _write(self) -> None:
        content = {"asked": self._asked, "calls": self.calls, "seconds": self.seconds}
        write_atomically(self._path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Keep the pool in a folder of its own."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def _command(asked: Mapping[str, Any], data_dir: str | os.PathLike | None) -> str:
    """Return the command that measures the same record, with the data in the folder ``data``."""
    words = ["python", "-m", "benchmarks", "record"]
    for name in ("name", "dataset", "ipc", "preset", "protocol", "networks", "epochs", "what"):
        if asked[name] is not None:
            words += [f"--{name}", str(asked[name])]
    for name, value in asked["settings"].items():
        words += ["--set", f"{name}={'none' if value is None else value}"]
    return shlex.join([*words, *(["--data-dir", "data"] if data_dir is not None else [])])
