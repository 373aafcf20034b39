"""The synthetic set's file: what is read is what was written, damage is noticed, exports open elsewhere."""

import builtins
import copy
import errno
import json
import os
import pickle
import random

import numpy
import pytest
import torch

from atom_fast.data.partition import decode, make_sheets
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.synthetic import (
    FORMAT,
    SyntheticSet,
    _digest,
    _read_file,
    load_public,
)

METADATA = {"dataset": "shapes", "seed": 3, "config": {"ipc": 2, "mmd_weight": 0.01}, "note": "café ✓"}


def make_set(kind="standard", channels=3, classes=("cat", "dog", "emu"), ipc=2, dataset="shapes"):
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (40, channels, 6, 5), generator=generator, dtype=torch.uint8)
    preprocessing = fit_preprocessing(train, kind, progress=False)
    images = preprocessing.to_model(train[: ipc * len(classes)]) + 0.25
    labels = torch.arange(len(classes)).repeat_interleave(ipc)
    return SyntheticSet(images, labels, classes, preprocessing, {**METADATA, "dataset": dataset})


def make_partitioned(kind="standard", channels=3, ipc=2, dataset="shapes"):
    """Sheets of 2x2 images of 6x4 pixels."""
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (40, channels, 6, 4), generator=generator, dtype=torch.uint8)
    preprocessing = fit_preprocessing(train, kind, progress=False)
    sheets = make_sheets(preprocessing.to_model(train[: 12 * ipc]), 2) + 0.25
    labels, metadata = torch.arange(3).repeat_interleave(ipc), {**METADATA, "dataset": dataset}
    return SyntheticSet(sheets, labels, ("cat", "dog", "emu"), preprocessing, metadata, partition=2)


@pytest.fixture
def saved(tmp_path):
    synthetic = make_set()
    return synthetic, synthetic.save(tmp_path / "set.safetensors")


@pytest.mark.parametrize("kind", ["standard", "zca", "zca_standardized"])
def test_round_trip_is_bit_exact(tmp_path, kind):
    if kind != "standard":
        pytest.importorskip("kornia", reason="ZCA is fitted by kornia")
    synthetic = make_set(kind)
    read = SyntheticSet.load(synthetic.save(tmp_path / "new" / "set.safetensors"))
    assert torch.equal(read.images.view(torch.int32), synthetic.images.view(torch.int32))
    assert torch.equal(read.labels, synthetic.labels)
    assert read.class_names == synthetic.class_names
    assert read.metadata == synthetic.metadata
    assert read.preprocessing.kind == kind
    for name, tensor in synthetic.preprocessing.tensors().items():
        assert torch.equal(read.preprocessing.tensors()[name], tensor)
    assert torch.equal(read.pixels(), synthetic.pixels())


def test_a_partitioned_set_stores_sheets_and_trains_as_the_images_on_them(device):
    synthetic = make_partitioned().to(device)
    assert synthetic.sheets.shape == (6, 3, 6, 4) and synthetic.images.shape == (24, 3, 6, 4)
    assert torch.equal(synthetic.images, decode(synthetic.sheets, 2))
    assert synthetic.sheet_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert synthetic.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert len(synthetic) == len(synthetic.labels) == 24
    assert synthetic.class_sizes == (8, 8, 8) and synthetic.ipc == 2
    assert synthetic.pixels().shape == (24, 3, 6, 4) and synthetic.sheet_pixels().shape == (6, 3, 6, 4)
    assert repr(synthetic).startswith("SyntheticSet(24 images [3, 6, 4] on 6 sheets of 'shapes', 3 classes, Prepro")
    uneven = torch.tensor([0, 0, 0, 2, 2, 1], device=device)
    uneven = SyntheticSet(synthetic.sheets, uneven, "abc", synthetic.preprocessing, partition=2)
    assert uneven.class_sizes == (12, 4, 8) and uneven.ipc is None


def test_a_partitioned_set_is_indexed_by_its_images():
    synthetic = make_partitioned()
    for index in (0, 13, -1, torch.tensor(5), numpy.int64(7)):
        image, label = synthetic[index]
        torch.testing.assert_close(image, synthetic.images[index])
        assert label == synthetic.labels[index] and type(label) is int
    for several in (slice(3, 9), [3, -4, 5], synthetic.labels == 1, torch.tensor([9, 3])):
        images, labels = synthetic[several]
        assert torch.equal(images, synthetic.images[several]) and torch.equal(labels, synthetic.labels[several])
    batches = list(torch.utils.data.DataLoader(synthetic, batch_size=10))
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), synthetic.images)
    assert torch.cat([labels for _, labels in batches]).equal(synthetic.labels)
    for beyond in (24, -25):
        with pytest.raises(IndexError):
            synthetic[beyond]


def test_changed_sheets_give_changed_images():
    synthetic = make_partitioned()
    before = synthetic.images
    synthetic.sheets[0] = 0  # in place
    assert not synthetic.images[:4].any() and torch.equal(synthetic.images[4:], before[4:])
    synthetic.sheets = synthetic.sheets * 2
    torch.testing.assert_close(synthetic.images[4:], 2 * before[4:])
    synthetic.sheet_labels = synthetic.sheet_labels.flip(0)
    assert synthetic.labels.tolist() == [2] * 8 + [1] * 8 + [0] * 8


@pytest.mark.parametrize(("name", "instead"), [("images", "sheets"), ("labels", "sheet_labels")])
def test_what_comes_from_the_sheets_is_not_replaced(name, instead):
    synthetic, plain = make_partitioned(), make_set()
    with pytest.raises(AttributeError, match=f"{name} come from the sheets of partition 2: change {instead}$"):
        setattr(synthetic, name, getattr(synthetic, name))
    setattr(plain, name, getattr(plain, name)[:3])
    assert len(getattr(plain, name)) == len(getattr(plain, instead)) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda some: pickle.loads(pickle.dumps(some)), copy.copy])
def test_a_partitioned_set_is_copied(copied, tmp_path):
    synthetic = make_partitioned()
    other = copied(synthetic)
    assert other.partition == 2 and torch.equal(other.images, synthetic.images)
    assert synthetic.save(tmp_path / "a").read_bytes() == other.save(tmp_path / "b").read_bytes()


def test_a_partitioned_file_says_so_and_others_are_what_they_were(tmp_path):
    synthetic = make_partitioned()
    path = synthetic.save(tmp_path / "set.safetensors")
    description, tensors = _read_file(path)
    assert description["format_version"] == 2 and description["partition"] == 2
    assert tensors["images"].shape == (6, 3, 6, 4) and tensors["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    read = SyntheticSet.load(path)
    assert read.partition == 2 and read.metadata == synthetic.metadata and read.class_names == synthetic.class_names
    assert torch.equal(read.sheets, synthetic.sheets) and torch.equal(read.images, synthetic.images)
    assert torch.equal(read.labels, synthetic.labels)
    plain, _ = _read_file(make_set().save(tmp_path / "plain.safetensors"))
    assert plain.keys() == {"format_version", "class_names", "metadata", "sha256"} and plain["format_version"] == 1


@pytest.mark.fault(
    "Damaged files",
    "a set's file whose partition is no whole number or does not divide its images",
    "refused; the message names the partitions that fit, the file stays",
)
@pytest.mark.parametrize("partition", [0, -1, 3, 4, 2.0, "2", True, None])
def test_wrong_partitions_are_refused_and_files_stay(partition, tmp_path):
    synthetic = make_partitioned()
    parts = synthetic.sheets, synthetic.sheet_labels, synthetic.class_names, synthetic.preprocessing
    message = f"partition must be a whole number .* images of 6x4: one of 1, 2; got {partition!r}$"
    with pytest.raises(ValueError, match=message):
        SyntheticSet(*parts, partition=partition)
    path = synthetic.save(tmp_path / "set.safetensors")
    before = path.read_bytes()
    synthetic.partition = partition
    with pytest.raises(ValueError, match=message):
        synthetic.save(path)
    for name in ("set.pt", "images"):
        with pytest.raises(ValueError, match=message):
            synthetic.export(tmp_path / name)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]
    rewrite(path, partition=partition)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"set.safetensors does not hold a usable synthetic set: {message}"):
        SyntheticSet.load(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("labels", [torch.zeros(24, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)])
def test_labels_are_one_per_sheet(labels):
    synthetic = make_partitioned()
    parts = synthetic.class_names, synthetic.preprocessing
    with pytest.raises(ValueError, match=rf"labels must be int64 \[6\], one per sheet; got .*\[{len(labels)}\]"):
        SyntheticSet(synthetic.sheets, labels, *parts, partition=2)
    with pytest.raises(ValueError, match=r"sheets must be float32 \[N, C, H, W\] and not empty; got .*\[3, 6, 4\]"):
        SyntheticSet(synthetic.sheets[0], labels, *parts, partition=2)


def test_same_set_gives_the_same_file(tmp_path):
    first, second = make_set().save(tmp_path / "a"), make_set().save(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_a_run_s_folder_stands_for_the_set_in_it(tmp_path):
    synthetic = make_set()
    synthetic.save(tmp_path / "run" / "synthetic.safetensors")
    assert torch.equal(SyntheticSet.load(tmp_path / "run").images, synthetic.images)


def test_what_is_no_set_is_named_with_what_reads_it(tmp_path):
    synthetic = make_set()
    with pytest.raises(FileNotFoundError, match="a folder without synthetic.safetensors.* evaluate .* --dataset NAME"):
        SyntheticSet.load(synthetic.export(tmp_path / "images"))
    read = SyntheticSet.load(synthetic.export(tmp_path / "set.pt"))
    torch.testing.assert_close(read.pixels(), synthetic.pixels(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="set.safetensors says itself what it holds; partition is for files of other"):
        SyntheticSet.load(synthetic.save(tmp_path / "set.safetensors"), partition=1)
    with pytest.raises(FileNotFoundError, match="images is a folder, not a .pt; .* SyntheticSet.load"):
        load_public(tmp_path / "images")


def test_is_a_dataset():
    synthetic = make_set()
    image, label = synthetic[3]
    assert torch.equal(image, synthetic.images[3]) and label == 1 and type(label) is int
    assert len(synthetic) == len(list(synthetic)) == 6
    batches = list(torch.utils.data.DataLoader(synthetic, batch_size=4))
    assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 6, 5), (2, 3, 6, 5)]
    assert torch.cat([labels for _, labels in batches]).equal(synthetic.labels)
    with pytest.raises(IndexError):
        synthetic[6]
    for several in (slice(1, 4), [1, 2, 3]):
        images, labels = synthetic[several]
        assert torch.equal(images, synthetic.images[1:4]) and torch.equal(labels, synthetic.labels[1:4])


def test_a_set_shows_itself_in_a_line():
    shown = repr(make_set())
    assert shown.startswith("SyntheticSet(6 images [3, 6, 5] of 'shapes', 3 classes, Preprocessing(kind='standard', ")
    assert "\n" not in shown and len(shown) < 250


def test_class_sizes():
    synthetic = make_set()
    assert synthetic.class_sizes == (2, 2, 2) and synthetic.ipc == 2
    uneven = SyntheticSet(synthetic.images, torch.tensor([0, 0, 0, 2, 2, 2]), "abc", synthetic.preprocessing)
    assert uneven.class_sizes == (3, 0, 3) and uneven.ipc is None


@pytest.mark.fault(
    "Damaged files",
    "every byte of a set's header, and a seventh of the others, changed in one of three ways",
    "each is noticed by the checksum, or changes nothing",
)
def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    synthetic = make_set(ipc=1)
    content = synthetic.save(tmp_path / "set.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    positions = [*range(header), *range(header, len(content), 7)]  # every byte of the header, a seventh of the rest
    damaged = tmp_path / "damaged.safetensors"
    for number, position in enumerate(positions):
        changed = bytearray(content)
        changed[position] ^= (0x01, 0x20, 0xFF)[number % 3]
        damaged.write_bytes(changed)
        try:
            read = SyntheticSet.load(damaged)
        except ValueError as error:
            assert str(damaged) in str(error)
            continue
        assert read.metadata == synthetic.metadata and read.class_names == synthetic.class_names, position
        assert torch.equal(read.images, synthetic.images) and torch.equal(read.labels, synthetic.labels), position


@pytest.mark.fault("Damaged files", "a set cut short at 200 random lengths, or followed by more", "noticed")
def test_any_truncation_is_noticed(saved, tmp_path):
    content, draw = saved[1].read_bytes(), random.Random(0)
    damaged = tmp_path / "damaged.safetensors"
    lengths = [0, 1, 7, 8, 100, len(content) - 1, *(draw.randrange(len(content)) for _ in range(194))]
    for changed in [*(content[:length] for length in lengths), content + b"\0", content + content]:
        damaged.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged.safetensors"):
            SyntheticSet.load(damaged)


def rewrite(path, tensors=None, **changes):
    """The file with some tensors and entries of its description replaced, its checksum made right again."""
    from safetensors.torch import save_file

    description, content = _read_file(path)
    content = {name: tensor for name, tensor in {**content, **(tensors or {})}.items() if tensor is not None}
    description |= changes
    description["sha256"] = _digest(content, description)
    save_file(content, path, metadata={FORMAT: json.dumps(description)})


@pytest.mark.parametrize("version", [4, 0, "1", None])
@pytest.mark.parametrize("make", [make_set, make_partitioned])
def test_another_version_is_refused(make, version, tmp_path):
    path = make().save(tmp_path / "set.safetensors")
    rewrite(path, format_version=version)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"format version {version!r}, this atom_fast reads 1 to 3; install the"):
        SyntheticSet.load(path)
    assert path.read_bytes() == before


def test_the_version_decides_what_a_partition_is(tmp_path):
    """Version 1 had none, so that its readers take what is stored for the images; version 2 needs one."""
    path = make_partitioned().save(tmp_path / "set.safetensors")
    rewrite(path, format_version=1)
    assert SyntheticSet.load(path).partition == 1
    path = make_set().save(tmp_path / "set.safetensors")
    rewrite(path, format_version=2)
    with pytest.raises(ValueError, match="set.safetensors does not hold a usable synthetic set: 'partition'"):
        SyntheticSet.load(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"images": torch.zeros(6, 3, 30)}, r"images must be float32 \[N, C, H, W\]"),
        ({"images": torch.zeros(6, 3, 6, 5).double()}, "images must be float32"),
        ({"images": torch.full((6, 3, 6, 5), float("nan"))}, "finite"),
        ({"images": torch.zeros(6, 1, 6, 5)}, "images must be"),
        ({"images": None}, "images"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"int64 \[6\], one per image"),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, "int64"),
        ({"labels": torch.full((6,), 3)}, "below 3"),
        ({"labels": torch.full((6,), -1)}, "at least 0"),
        ({"preprocessing.std": None}, "mean"),
        ({"preprocessing.mean": torch.zeros(7)}, "preprocessing|size|images"),
        ({"preprocessing.std": torch.full((3,), float("inf"))}, "finite"),
    ],
)
def test_wrong_content_is_refused(saved, tensors, message):
    rewrite(saved[1], tensors)
    with pytest.raises(ValueError, match=message):
        SyntheticSet.load(saved[1])


@pytest.mark.fault(
    "Invalid values and mismatched data",
    "a set whose images, labels or preprocessing were replaced by NaN, another type or labels without a class",
    "refused when it is saved or exported; an earlier file stays",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.full((6, 3, 6, 5), float("nan"))}, "images must be finite"),
        ({"images": torch.zeros(6, 3, 6, 5).half()}, "images must be float32 .*; got torch.float16"),
        ({"images": torch.zeros(6, 1, 6, 5)}, "images must be"),
        ({"labels": torch.zeros(6)}, "labels must be int64"),
        ({"labels": torch.full((6,), 3)}, "labels must be below 3"),
        ({"class_names": ("cat",)}, "labels must be below 1"),
        ({"metadata": {"config": "x"}}, "metadata 'config' must not be a str"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(saved, tmp_path, change, message):
    synthetic, path = saved
    before = path.read_bytes()
    for name, value in change.items():
        setattr(synthetic, name, value)
    with pytest.raises(ValueError, match=message):
        synthetic.save(path)
    for name in ("set.pt", "images"):
        with pytest.raises(ValueError, match=message):
            synthetic.export(tmp_path / name)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_is_no_synthetic_set_is_refused(tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"images": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="not a synthetic set"):
        SyntheticSet.load(other)
    other.write_bytes(pickle.dumps({"images": 1}))
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SyntheticSet.load(other)
    with pytest.raises(FileNotFoundError, match="missing.safetensors"):
        SyntheticSet.load(tmp_path / "missing.safetensors")


def test_numbers_as_keys_become_text(tmp_path):
    synthetic = make_set()
    synthetic.metadata = {"curve": {2: 0.5, 10: 0.25}}
    assert SyntheticSet.load(synthetic.save(tmp_path / "set")).metadata == {"curve": {"2": 0.5, "10": 0.25}}


def test_metadata_must_be_json(tmp_path):
    synthetic = make_set()
    for value in (float("nan"), {1, 2}):
        synthetic.metadata["bad"] = value
        with pytest.raises(ValueError, match="metadata .* JSON"):
            synthetic.save(tmp_path / "set.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["fsync", "replace", "write"])
def test_a_full_disk_leaves_the_earlier_file(saved, monkeypatch, failing):
    synthetic, path = saved
    before = path.read_bytes()

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real_open = builtins.open

    def open_full(name, mode="r", *arguments, **keywords):
        file = real_open(name, mode, *arguments, **keywords)
        return _FullFile(file) if "w" in mode else file

    class _FullFile:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        write = full

    if failing == "write":
        monkeypatch.setattr(builtins, "open", open_full)
    else:
        monkeypatch.setattr(os, failing, full)
    synthetic.metadata["seed"] = 4
    message = "cannot write .*set.safetensors: No space left.*earlier file is unchanged"
    with pytest.raises(OSError, match=message) as caught:
        synthetic.save(path)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_saves_to_what_a_link_names_and_to_no_folder_or_device(tmp_path):
    synthetic = make_set()
    (tmp_path / "link").symlink_to(tmp_path / "set.safetensors")
    synthetic.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(SyntheticSet.load(tmp_path / "set.safetensors")) == len(synthetic)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match="cannot write .*: it is not a file"):
            synthetic.save(path)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_public_files_with_numpy_accuracies_are_read(tmp_path, module):
    synthetic = make_set()
    path = tmp_path / "res_DM.pt"
    accuracies = {"ConvNet": [numpy.float64(0.48), numpy.float64(0.49)]}
    torch.save({"data": [[synthetic.images, synthetic.labels]] * 2, "accs_all_exps": accuracies}, path)
    rename_in_archive(path, b"numpy._core.multiarray", module.encode())
    assert len(load_public(path)) == 2


def rename_in_archive(path, old, new):
    """Replace a module's name in the pickle inside a file of ``torch.save``."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        members = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


@pytest.mark.fault("Hostile files", "a `.pt` that calls a function when it is unpickled", "refused; nothing is called")
def test_a_public_file_executes_nothing(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "bad.pt"
    torch.save({"data": Malicious()}, path)
    with pytest.raises(ValueError, match="bad.pt is not a synthetic set"):
        load_public(path)
    assert not (tmp_path / "executed").exists()
    for content in ({"images": 1}, torch.zeros(3), {"data": [[torch.zeros(2, 3), torch.zeros(2)]]}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="bad.pt is not a synthetic set"):
            load_public(path)
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        load_public(tmp_path / "missing.pt")


def test_moves_to_a_device(device):
    moved = make_set().to(device)
    assert moved.images.device.type == moved.labels.device.type == device.type
    torch.testing.assert_close(moved.pixels().cpu(), make_set().pixels())


def test_the_fingerprint_is_of_what_networks_are_trained_on(tmp_path):
    synthetic, same = make_set(), make_set()
    same.metadata = {"seconds": 3.0}
    assert same.fingerprint == synthetic.fingerprint == SyntheticSet.load(same.save(tmp_path / "s.st")).fingerprint
    changed = make_set()
    changed.images[0, 0, 0, 0] += 1e-6
    others = [changed, make_set(classes=("a", "b", "c")), make_set("zca"), make_partitioned()]
    assert len({one.fingerprint for one in (synthetic, *others)}) == 5
