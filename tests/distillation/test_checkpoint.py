"""Checkpoints: the same bits back, damage noticed, and nothing lost when the disk is full."""

import errno
import io
import os
import random

import pytest
import torch

from atom_fast import _files
from atom_fast.distillation.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    latest_checkpoint,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
)


def make_checkpoint(iteration=7, size=6):
    generator = torch.Generator().manual_seed(iteration)
    images = torch.randn(4, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    tensors = {"images": images, "momentum": torch.randn(4, 3, size, size, generator=generator)}
    settings = {"ipc": 2, "image_lr": 0.1, "norm": "instance", "depth": None}
    return Checkpoint(iteration, tensors, settings, "f" * 64, 12.5, {"torch": "2"})


def assert_same(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert (one.iteration, one.config, one.seconds) == (other.iteration, other.config, other.seconds)
    assert (one.data_fingerprint, one.versions) == (other.data_fingerprint, other.versions)


def test_everything_comes_back(tmp_path):
    checkpoint = make_checkpoint()
    path = save_checkpoint(tmp_path / "new", checkpoint)
    assert_same(load_checkpoint(path), checkpoint)
    assert_same(latest_checkpoint(tmp_path / "new"), checkpoint)


def test_the_newest_few_are_kept(tmp_path):
    for iteration in (0, 5, 90, 100, 1000):
        save_checkpoint(tmp_path, make_checkpoint(iteration), keep=3)
    assert sorted(int(path.stem.split("-")[1]) for path in tmp_path.iterdir()) == [90, 100, 1000]
    assert latest_checkpoint(tmp_path).iteration == 1000


def test_leftovers_of_later_iterations_do_not_cost_what_was_just_written(tmp_path):
    for iteration in (10, 20, 30, 40):
        save_checkpoint(tmp_path, make_checkpoint(iteration), keep=4)
    for iteration in (20, 30, 40):
        path = tmp_path / f"iteration-000000{iteration}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    assert latest_checkpoint(tmp_path, report=lambda message: None).iteration == 10
    save_checkpoint(tmp_path, make_checkpoint(15), keep=3)
    assert latest_checkpoint(tmp_path, report=lambda message: None).iteration == 15
    assert load_checkpoint(tmp_path / "iteration-00000010.safetensors").iteration == 10


@pytest.mark.fault(
    "Damaged files", "bits flipped at 208 places of a checkpoint", "each is noticed by the checksum, or changes nothing"
)
def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    checkpoint = make_checkpoint()
    path = save_checkpoint(tmp_path, checkpoint)
    content, draw = path.read_bytes(), random.Random(0)
    header = int.from_bytes(content[:8], "little") + 8
    places = [
        *range(8),
        *(draw.randrange(header) for _ in range(100)),
        *(draw.randrange(len(content)) for _ in range(100)),
    ]
    noticed = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert_same(load_checkpoint(path), checkpoint)
        except DamagedCheckpointError:
            noticed += 1
    assert noticed > 190  # the padding of the header is all that may change unnoticed


@pytest.mark.fault("Damaged files", "a checkpoint cut short at 200 random lengths, or followed by more", "noticed")
def test_a_file_cut_short_or_continued_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, make_checkpoint())
    content, draw = path.read_bytes(), random.Random(0)
    lengths = [0, 1, 8, len(content) - 1, *(draw.randrange(len(content)) for _ in range(196))]
    for changed in [*(content[:length] for length in lengths), content + b"\0", content + content]:
        path.write_bytes(changed)
        with pytest.raises(DamagedCheckpointError, match="damaged"):
            load_checkpoint(path)


@pytest.mark.fault("Damaged files", "the newest checkpoint is damaged", "one warning; the previous one is used")
def test_a_damaged_newest_is_reported_and_the_one_before_it_used(tmp_path):
    save_checkpoint(tmp_path, make_checkpoint(10))
    newest = save_checkpoint(tmp_path, make_checkpoint(20))
    newest.write_bytes(newest.read_bytes()[:-1])
    reports = []
    assert latest_checkpoint(tmp_path, report=reports.append).iteration == 10
    assert len(reports) == 1
    assert str(newest) in reports[0]


@pytest.mark.fault("Damaged files", "every checkpoint is damaged", "refused, instead of silently starting over")
def test_nothing_but_damage_is_an_error(tmp_path):
    path = save_checkpoint(tmp_path, make_checkpoint())
    path.write_bytes(b"")
    with pytest.raises(RuntimeError, match="every checkpoint"):
        latest_checkpoint(tmp_path, report=lambda message: None)


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_checkpoint(tmp_path / "nothing")


@pytest.mark.fault("Damaged files", "a checkpoint is of another format version", "refused as such, not as damage")
def test_another_version_of_the_format_is_not_called_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("atom_fast.distillation.checkpoint.FORMAT_VERSION", 99)
    path = save_checkpoint(tmp_path, make_checkpoint())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 99") as refusal:
        load_checkpoint(path)
    assert not isinstance(refusal.value, DamagedCheckpointError)


def test_what_a_killed_process_left_is_removed(tmp_path):
    path = save_checkpoint(tmp_path, make_checkpoint())
    (tmp_path / f".{path.name}.123.part").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.fault("Hostile files", "a checkpoint is a pickle that calls a function", "refused as damaged, unread")
def test_a_file_from_elsewhere_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"images": Trap()}, tmp_path / "iteration-00000001.safetensors")
    with pytest.raises(RuntimeError, match="damaged"):
        latest_checkpoint(tmp_path, report=lambda message: None)
    assert not (tmp_path / "trapped").exists()


class _FullDisk(io.FileIO):
    def write(self, content):
        super().write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, make_checkpoint(1))
    monkeypatch.setattr(_files, "open", _FullDisk, raising=False)
    with pytest.raises(OSError, match="cannot write .*iteration-00000002.*No space left") as error:
        save_checkpoint(tmp_path, make_checkpoint(2))
    assert f"the newest checkpoint is still {tmp_path}/iteration-00000001" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["iteration-00000001.safetensors"]
    assert_same(latest_checkpoint(tmp_path), make_checkpoint(1))
