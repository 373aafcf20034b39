"""Fuzz the readers of files that users may get from others.

``python -m tests.fuzz_readers --seconds 600`` runs until the time is over or a reader fails: a reader may only return
or raise ValueError. Inputs that made a reader fail are kept in ``--keep``, by default ``runs/fuzz``, and are tried
first in the next run.

With atheris, inputs are guided by the coverage of this package and of PyYAML. Where it cannot be imported (there are
wheels for CPython on Linux x86-64), inputs are unguided mutations of valid ones.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

WATCHED = [
    "atom_fast.synthetic", "atom_fast.foreign", "atom_fast.distillation.checkpoint", "atom_fast.distillation.config",
    "atom_fast.data.archives", "atom_fast.pictures", "yaml", "zipfile",
]  # fmt: skip
WORDS = (b"\0" * 8, b"\xff" * 8, b"null", b"-1", b"1e999", b"{}", b"[]", b'""', b"&a ", b"*a", b"!!bool ", b"<<: ")


def import_readers(guided: bool) -> None:
    """Import the readers; if fuzzing is guided, measure their coverage."""
    with atheris.instrument_imports(include=WATCHED) if guided else contextlib.nullcontext():
        import yaml  # noqa: F401

        import atom_fast.cli  # noqa: F401
        import atom_fast.data.archives  # noqa: F401
        import atom_fast.distillation.checkpoint
        import atom_fast.distillation.config
        import atom_fast.pictures
        import atom_fast.synthetic  # noqa: F401


# ---------------------------------------------------------------- targets


def read_set(path: Path) -> None:
    """Read a synthetic set like ``atom-fast info``, ``show`` and ``evaluate``."""
    from atom_fast.cli import _lines
    from atom_fast.evaluation.accuracy import architecture_of
    from atom_fast.exports.folder import folder_names
    from atom_fast.exports.public import public_model_space
    from atom_fast.options import printable
    from atom_fast.pictures import describe
    from atom_fast.synthetic import SyntheticSet

    synthetic = SyntheticSet.load(path)
    assert printable(describe(synthetic)).isprintable()
    for name, value in synthetic.metadata.items():
        assert all(printable(line).isprintable() for line in _lines(name, value))
    assert not any("/" in name or "\\" in name for name in folder_names(synthetic.class_names))
    assert synthetic.pixels().isfinite().all() or synthetic.images.abs().max() > 1e18
    assert len(synthetic.sheet_pixels()) * synthetic.partition**2 == len(synthetic)
    public_model_space(synthetic)
    architecture_of(synthetic, "digits")


def read_described_set(path: Path) -> None:
    """Read a set whose description is the file's text, with the right checksum, as an attacker can write it."""
    from safetensors.torch import save

    from atom_fast.synthetic import FORMAT, _digest

    tensors = _tensors()
    text = path.read_bytes().decode("utf-8", errors="replace")
    try:
        description = dict(json.loads(text))
        description["sha256"] = _digest(tensors, description)
        text = json.dumps(description)
    except (ValueError, TypeError, RecursionError):
        pass
    path.write_bytes(save(tensors, metadata={FORMAT: text}))
    read_set(path)


def read_checkpoint(path: Path) -> None:
    """Read a checkpoint, like a resumed run."""
    from atom_fast.distillation.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    assert isinstance(checkpoint.iteration, int) and isinstance(checkpoint.config, dict)


def read_described_checkpoint(path: Path) -> None:
    """Read a checkpoint whose description is the file's text, with the right checksum."""
    from safetensors.torch import save

    from atom_fast.distillation.checkpoint import FORMAT, FORMAT_VERSION, _digest

    tensors, version = _tensors(), str(FORMAT_VERSION)
    text = path.read_bytes().decode("utf-8", errors="replace")
    header = {"format": FORMAT, "format_version": version, "description": text}
    path.write_bytes(save(tensors, metadata={**header, "sha256": _digest(tensors, text, version)}))
    read_checkpoint(path)


def read_public(path: Path) -> None:
    """Read a ``.pt`` file of the public programs."""
    from atom_fast.synthetic import load_public

    load_public(path)


def read_foreign(path: Path) -> None:
    """Read a file of another project like ``atom-fast info``, whatever its first bytes are."""
    from atom_fast.foreign.files import is_foreign
    from atom_fast.foreign.recognised import open_foreign
    from atom_fast.synthetic import recognised_sets

    is_foreign(path)
    recognised = open_foreign(path)
    json.dumps(recognised.facts())
    synthetic = next(recognised_sets(recognised))
    assert synthetic.sheets.isfinite().all() and len(synthetic.targets) == len(synthetic)


def read_settings(path: Path) -> None:
    """Read a configuration; if it is accepted, write it to a file and read it back."""
    from atom_fast.distillation.config import read_config, write_config

    config = read_config(path)
    write_config(config, path)
    assert read_config(path) == config


def read_archive(path: Path) -> None:
    """Unpack a zip file."""
    from atom_fast.data.archives import unpack_zip

    home = path.parent / "home"
    home.mkdir(exist_ok=True)
    archive = home / "set.zip"
    archive.write_bytes(path.read_bytes())
    before = sorted(entry.name for entry in path.parent.iterdir())
    try:
        unpack_zip(archive, "set", progress=False)
    except OSError:  # invalid file names, or more bytes than the disk has free
        assert not (home / "set").exists()
    finally:
        assert sorted(entry.name for entry in path.parent.iterdir()) == before
        assert {entry.name for entry in home.iterdir()} <= {"set.zip", "set"}
        _remove(home / "set")


TARGETS: dict[str, Callable[[Path], None]] = {
    "set": read_set,
    "described-set": read_described_set,
    "checkpoint": read_checkpoint,
    "described-checkpoint": read_described_checkpoint,
    "public": read_public,
    "foreign": read_foreign,
    "settings": read_settings,
    "archive": read_archive,
}


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _tensors() -> dict:
    import torch

    return {
        "images": torch.zeros(2, 1, 2, 2),
        "labels": torch.tensor([0, 1]),
        "preprocessing.mean": torch.tensor([0.5]),
        "preprocessing.std": torch.tensor([0.25]),
    }


def _foreign_seeds() -> list[bytes]:
    import numpy
    import torch

    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    contents = (
        {"data": [[images, labels]] * 2},
        {"data": [images - 0.5, labels], "preprocessing": {"kind": "standard", "mean": [0.5] * 3, "std": [0.25] * 3}},
        [images, torch.rand(2, 2)],
    )
    found = []
    for content in contents:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        found.append(buffer.getvalue())
    buffer = io.BytesIO()
    numpy.savez(buffer, image=images.permute(0, 2, 3, 1).numpy(), label=torch.eye(2).numpy() - 0.5)
    return [*found, buffer.getvalue()]


def seeds(target: str) -> list[bytes]:
    """Return valid inputs of a target to start from."""
    from atom_fast.data.whitening import Preprocessing
    from atom_fast.distillation.checkpoint import Checkpoint, save_checkpoint
    from atom_fast.distillation.config import preset, write_config
    from atom_fast.synthetic import SyntheticSet

    tensors, config = _tensors(), preset()
    metadata = {"dataset": "digits", "config": config.to_dict(), "seconds": 1.5, "versions": {"torch": "2"}}
    described = {"format_version": 1, "class_names": ["a", "b\u001b[31m"], "metadata": metadata}
    checkpoint = Checkpoint(3, {"images": tensors["images"]}, config.to_dict(), "f" * 64)
    fields = {"iteration": 3, "config": {}, "data_fingerprint": "f", "seconds": 0.5, "versions": {}, "tensors": []}
    preprocessing = Preprocessing(tensors["preprocessing.mean"], tensors["preprocessing.std"])
    synthetic = SyntheticSet(tensors["images"], tensors["labels"], ["a", "b"], preprocessing, metadata)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if target == "set":
            return [synthetic.save(folder / "set").read_bytes()]
        if target == "public":
            return [synthetic.export(folder / "set.pt", "pt").read_bytes()]
        if target == "foreign":
            return _foreign_seeds()
        if target == "checkpoint":
            return [save_checkpoint(folder, checkpoint).read_bytes()]
        if target == "settings":
            return [write_config(config, folder / "config").read_bytes(), b"preset: dm\nipc: 10\n"]
    if target == "archive":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("set/", "")
            archive.writestr("set/a.txt", "a" * 50)
        return [buffer.getvalue()]
    if target == "described-set":
        return [json.dumps(some).encode() for some in (described, {**described, "format_version": 2, "partition": 2})]
    return [json.dumps(fields).encode()]


# ---------------------------------------------------------------- engines


def test_one(targets: list[str], content: bytes, path: Path) -> None:
    """Pass ``content`` to a reader; its first byte selects one of ``targets``."""
    if not content:
        return
    path.write_bytes(content[1:])
    with contextlib.suppress(ValueError):
        TARGETS[targets[content[0] % len(targets)]](path)


test_one.__test__ = False  # not a test of pytest


def mutated(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Return ``content`` with a few random changes."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(len(changed) + 1)
        kind = draw.randrange(6)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + draw.randrange(1, 9)] = draw.randbytes(draw.randrange(9))
        elif kind == 2:
            changed[place:place] = draw.choice(WORDS)
        elif kind == 3:
            del changed[place : place + draw.randrange(1, 64)]
        elif kind == 4:
            changed[place:place] = changed[place : place + draw.randrange(1, 64)] * draw.choice((1, 2, 500))
        else:
            other = draw.choice(others)
            start = draw.randrange(len(other))
            changed[place:place] = other[start : start + draw.randrange(1, 64)]
    return bytes(changed[:100_000])


def fuzz_by_mutation(targets: list[str], seconds: float, keep: Path, path: Path, seed: int = 0) -> int:
    """Try random mutations for ``seconds``; return the number of inputs tried.

    Raises:
        Exception: any exception of a reader except ValueError; its input is in ``keep``.
    """
    draw = random.Random(seed)
    known = [bytes([number]) + content for number, name in enumerate(targets) for content in seeds(name)]
    bodies = [content[1:] for content in known]
    end, count = time.monotonic() + seconds, 0
    inputs = [*(file.read_bytes() for file in sorted(keep.glob("crash-*"))), *known]
    while time.monotonic() < end:
        if count < len(inputs):
            content = inputs[count]
        else:
            base = draw.choice(known)
            content = base[:1] + mutated(base[1:], bodies, draw)
        try:
            test_one(targets, content, path)
        except BaseException:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"crash-{hashlib.sha1(content).hexdigest()}").write_bytes(content)
            raise
        count += 1
    return count


def fuzz_by_coverage(targets: list[str], seconds: float, keep: Path, path: Path) -> None:
    """Run atheris, which ends the process: with status 0 after ``seconds``, with another if a reader fails."""
    corpus = path.parent / "corpus"
    corpus.mkdir()
    for number, name in enumerate(targets):
        for position, content in enumerate(seeds(name)):
            (corpus / f"{name}-{position}").write_bytes(bytes([number]) + content)
    keep.mkdir(parents=True, exist_ok=True)
    for file in keep.glob("crash-*"):
        test_one(targets, file.read_bytes(), path)
    options = [f"-max_total_time={max(1, round(seconds))}", "-max_len=8000", "-len_control=0", "-timeout=20", "-seed=1"]
    memory = ["-rss_limit_mb=4000", "-malloc_limit_mb=2000", f"-artifact_prefix={keep}/"]
    atheris.Setup([sys.argv[0], *options, *memory, str(corpus)], lambda content: test_one(targets, content, path))
    atheris.Fuzz()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder of inputs that made a reader fail")
    parser.add_argument("--unguided", action="store_true", help="mutate without atheris, even if it is installed")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    guided = atheris is not None and not options.unguided
    import_readers(guided)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input"
        if guided:
            print("fuzzing with atheris", flush=True)
            fuzz_by_coverage(options.targets, options.seconds, options.keep, path)
        else:
            print("fuzzing by mutation", flush=True)
            count = fuzz_by_mutation(options.targets, options.seconds, options.keep, path)
            print(f"Done {count} runs", flush=True)


if __name__ == "__main__":
    main()
