"""Data sets from each source, made here in the layout of the real ones, and the errors of layouts that are not."""

import hashlib
import pickle
import shutil
import sys
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

from atom_fast.data import sources
from atom_fast.data.sources import SOURCES, load_data


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def flat(value, size=8):
    """An image of one colour, which JPEG keeps to within a level or two."""
    return np.full((size, size, 3), value, dtype=np.uint8)


def make_image_folder(root, held_out="test"):
    """Classes cat (3 training images), ant (2), bee (1); the brightness tells class and image."""
    for label, (name, count) in enumerate({"cat": 3, "ant": 2, "bee": 1}.items()):
        for i in range(count):
            save(root / "train" / name / f"{i}.png", flat(50 * label + i))
        save(root / held_out / name / "x.png", flat(200 + label))
    return root


# ---------------------------------------------------------------- any source


def test_an_unknown_name_lists_the_accepted_ones():
    with pytest.raises(ValueError, match="digits, cifar10, cifar100, tiny, folder; got 'imagenet'"):
        load_data("imagenet")


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("resolution", [0, -8, 2.5, True, "32"])
def test_a_bad_resolution_is_named(name, resolution, tmp_path):
    with pytest.raises(ValueError, match=f"resolution must be .*got {resolution!r}"):
        load_data(name, tmp_path, resolution=resolution)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny"])
def test_data_that_is_not_there_says_where_it_was_looked_for_and_how_to_get_it(name, tmp_path):
    if name != "tiny":
        pytest.importorskip("torchvision")
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=r"is missing") as error:
        load_data(name, missing)
    assert str(missing) in str(error.value) and "--download" in str(error.value) and "MB" in str(error.value)
    assert not missing.exists()


# ---------------------------------------------------------------- digits


def test_digits_are_split_in_the_stated_sizes_and_stratified():
    data = load_data("digits")
    assert (len(data.train_images), len(data.test_images)) == (1400, 397)
    assert data.image_shape == (1, 8, 8) and data.class_names == tuple("0123456789")
    assert (data.train_images.min(), data.train_images.max()) == (0, 255)
    test_counts = torch.bincount(data.test_labels)
    share = test_counts / (test_counts + data.class_counts)
    assert (share - 397 / 1797).abs().max() < 0.01


def test_digits_are_the_same_in_every_run():
    assert load_data("digits").fingerprint == load_data("digits").fingerprint
    # Accuracies are compared across releases: this changes only together with the split or the digits.
    expected = "0a723fcd0d6ac98e"
    assert load_data("digits").fingerprint.startswith(expected)


def test_no_digit_is_in_both_splits_and_none_is_lost():
    from sklearn.datasets import load_digits

    data = load_data("digits")
    images = torch.cat([data.train_images, data.test_images]).flatten(1)
    originals = torch.from_numpy(np.rint(load_digits().data * 255 / 16)).to(torch.uint8)
    assert sorted(images.tolist()) == sorted(originals.tolist())


def test_digits_are_resized():
    data = load_data("digits", resolution=16)
    assert data.image_shape == (1, 16, 16) and data.test_images.shape == (397, 1, 16, 16)


def test_without_scikit_learn_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_data("digits")


# ---------------------------------------------------------------- CIFAR


def make_cifar(root, dataset, monkeypatch):
    """Ten images a file in torchvision's layout of pickles; their MD5 sums replace the real ones."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    names = [f"name {k}" for k in range(10)]

    def write(file_name, content):
        (folder / file_name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file_name).read_bytes()).hexdigest()

    def write_list(listed):
        label_key = "fine_labels" if dataset.meta["key"] == "fine_label_names" else "labels"
        sums = []
        for position, (file_name, _) in enumerate(listed):
            pixels = np.random.default_rng(position).integers(0, 256, (10, 3072), dtype=np.uint8)
            pixels[:, 0] = np.arange(10)
            sums.append([file_name, write(file_name, {"data": pixels, label_key: list(range(10))})])
        return sums

    monkeypatch.setattr(dataset, "train_list", write_list(dataset.train_list))
    monkeypatch.setattr(dataset, "test_list", write_list(dataset.test_list))
    meta = {**dataset.meta, "md5": write(dataset.meta["filename"], {dataset.meta["key"]: names})}
    monkeypatch.setattr(dataset, "meta", meta)
    return names


def cifar_class(name):
    datasets = pytest.importorskip("torchvision.datasets")
    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


@pytest.mark.parametrize(("name", "count"), [("cifar10", 50), ("cifar100", 10)])
def test_cifar_is_read_from_torchvisions_layout(name, count, tmp_path, monkeypatch):
    names = make_cifar(tmp_path, cifar_class(name), monkeypatch)
    data = load_data(name, tmp_path)
    assert data.image_shape == (3, 32, 32) and data.class_names == tuple(names)
    assert (len(data.train_images), len(data.test_images)) == (count, 10)
    assert torch.equal(data.train_images[:, 0, 0, 0].long(), data.train_labels)
    assert data.train_images.is_contiguous()
    assert load_data(name, tmp_path, resolution=8).image_shape == (3, 8, 8)
    itself = load_data(name, tmp_path / cifar_class(name).base_folder)
    assert itself.fingerprint == data.fingerprint


def make_published_folder(root, classes=10, size=32, held_out="test"):
    for label in range(classes):
        for split in ("train", held_out):
            save(root / split / f"class{label}" / "0.png", flat(20 * label, size))
    return root


@pytest.mark.parametrize("held_out", ["test", "val"])
@pytest.mark.parametrize("given", [".", "cifar10"])
def test_cifar_is_read_from_folders_of_image_files(given, held_out, tmp_path, capsys):
    folder = make_published_folder(tmp_path / "cifar10", held_out=held_out)
    data = load_data("cifar10", tmp_path / given, progress=False)
    assert (data.name, data.num_classes, data.image_shape) == ("cifar10", 10, (3, 32, 32))
    assert torch.equal(data.train_images[:, 0, 0, 0].long(), 20 * torch.arange(10))
    assert capsys.readouterr().err == f"cifar10: reading the image files in {folder}\n"
    assert load_data("cifar10", folder, resolution=8, progress=False).image_shape == (3, 8, 8)


@pytest.mark.parametrize(("classes", "size"), [(3, 32), (10, 16)])
def test_folders_of_other_images_are_not_cifar(classes, size, tmp_path):
    folder = make_published_folder(tmp_path, classes, size)
    found = rf"got {classes} of \[3, {size}, {size}\]"
    with pytest.raises(ValueError, match=rf"{folder} is not cifar10: expected 10 classes .*\[3, 32, 32\], {found}"):
        load_data("cifar10", folder, progress=False)


def test_a_damaged_cifar_is_refused(tmp_path, monkeypatch):
    dataset = cifar_class("cifar10")
    make_cifar(tmp_path, dataset, monkeypatch)
    (tmp_path / dataset.base_folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match="cifar10 is missing or damaged: neither an intact cifar-10-batches-py"):
        load_data("cifar10", tmp_path)


def test_cifar_is_downloaded_only_when_asked_and_says_so(tmp_path, monkeypatch, capsys):
    dataset = cifar_class("cifar10")
    ready, wanted = tmp_path / "ready", tmp_path / "wanted"
    make_cifar(ready, dataset, monkeypatch)

    def fetch(url, root, filename, md5):
        shutil.copytree(ready, root)

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    assert load_data("cifar10", wanted, download=True).num_classes == 10
    out, err = capsys.readouterr()
    assert out == "" and "torchvision downloads 170 MB from https://" in err and str(wanted) in err
    load_data("cifar10", wanted, download=True)
    assert capsys.readouterr().err == ""


def test_a_failed_cifar_download_names_address_and_folder(tmp_path, monkeypatch):
    cifar_class("cifar100")

    def fail(url, root, filename, md5):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(RuntimeError, match="could not download https://.*cifar-100.*no route") as error:
        load_data("cifar100", tmp_path, download=True)
    assert str(tmp_path) in str(error.value)


def test_without_torchvision_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        load_data("cifar10", tmp_path)


# ---------------------------------------------------------------- Tiny ImageNet


def make_tiny(folder):
    """Three classes, two of them called crane, in an order of wnids.txt that is not the alphabet's."""
    wnids = ["n03", "n01", "n02"]
    folder.mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (folder / "words.txt").write_text(
        "n00\tentity\nn01\tcrane\nn02\tgoldfish, Carassius auratus\nn03\tcrane, machine\n"
    )
    for label, wnid in enumerate(wnids):
        for i in range(label + 1):
            save(folder / f"train/{wnid}/images/{wnid}_{i}.JPEG", flat(60 * label))
        (folder / f"train/{wnid}/{wnid}_boxes.txt").write_text("")
    lines = []
    for i, wnid in enumerate(["n02", "n03", "n01", "n02"]):
        save(folder / f"val/images/val_{i}.JPEG", flat(60 * wnids.index(wnid)))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t7\t7\n")
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    return folder


def check_tiny(data):
    assert data.class_names == ("crane (n03)", "crane (n01)", "goldfish")
    assert data.class_sizes == (1, 2, 3)
    assert data.test_labels.tolist() == [2, 0, 1, 2]
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert (images.float().mean((1, 2, 3)) - 60 * labels).abs().max() < 3


def test_tiny_is_read_from_its_folder_or_the_one_above(tmp_path):
    folder = make_tiny(tmp_path / "tiny-imagenet-200")
    for data_dir in (folder, tmp_path, str(tmp_path)):
        data = load_data("tiny", data_dir, progress=False)
        check_tiny(data)
        assert data.image_shape == (3, 8, 8)
    assert load_data("tiny", folder, resolution=4, progress=False).image_shape == (3, 4, 4)


def zip_tiny(tmp_path):
    make_tiny(tmp_path / "made" / "tiny-imagenet-200")
    archive = shutil.make_archive(
        tmp_path / "made" / "tiny-imagenet-200", "zip", tmp_path / "made", "tiny-imagenet-200"
    )
    target = tmp_path / "zipped" / "tiny-imagenet-200.zip"
    target.parent.mkdir()
    shutil.move(archive, target)
    return target


def test_tiny_is_unpacked_from_its_zip(tmp_path, capsys):
    archive = zip_tiny(tmp_path)
    check_tiny(load_data("tiny", archive.parent, progress=False))
    assert f"unpacking {archive}" in capsys.readouterr().err
    assert (archive.parent / "tiny-imagenet-200/wnids.txt").is_file()


def test_tiny_is_downloaded_only_when_asked_and_says_so(tmp_path, monkeypatch, capsys):
    archive = zip_tiny(tmp_path)
    monkeypatch.setattr(sources, "_TINY_URL", archive.as_uri())
    monkeypatch.setattr(sources, "_TINY_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    check_tiny(load_data("tiny", tmp_path / "wanted", download=True, progress=False))
    out, err = capsys.readouterr()
    assert out == "" and f"downloading 248 MB from {archive.as_uri()}" in err and str(tmp_path / "wanted") in err


def test_a_truncated_tiny_zip_is_named(tmp_path):
    archive = zip_tiny(tmp_path)
    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"tiny-imagenet-200.zip is not a complete zip file"):
        load_data("tiny", archive.parent, progress=False)


@pytest.mark.parametrize("part", ["words.txt", "val/val_annotations.txt", "val/images", "train"])
def test_a_missing_part_of_tiny_is_named(tmp_path, part):
    folder = make_tiny(tmp_path / "tiny")
    shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {part}"):
        load_data("tiny", folder, progress=False)


def test_broken_parts_of_tiny_are_named(tmp_path):
    folder = make_tiny(tmp_path / "tiny")
    annotations = folder / "val/val_annotations.txt"
    good = annotations.read_text()
    annotations.write_text(good + "val_9.JPEG\tn99\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"val_annotations.txt, line 5: 'n99' is not a class"):
        load_data("tiny", folder, progress=False)
    annotations.write_text(good + "val_9.JPEG\tn01\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"cannot read the image .*val_9.JPEG"):
        load_data("tiny", folder, progress=False)
    annotations.write_text(good)
    shutil.rmtree(folder / "train/n01")
    with pytest.raises(FileNotFoundError, match=r"train/n01/images contains no image files"):
        load_data("tiny", folder, progress=False)


# ---------------------------------------------------------------- folder


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_is_read_by_class_name_in_order(tmp_path, held_out):
    data = load_data("folder", make_image_folder(tmp_path, held_out), progress=False)
    assert data.class_names == ("ant", "bee", "cat") and data.class_sizes == (2, 1, 3)
    assert data.train_labels.tolist() == [0, 0, 1, 2, 2, 2] and data.test_labels.tolist() == [0, 1, 2]
    assert data.train_images[:, 0, 0, 0].tolist() == [50, 51, 100, 0, 1, 2]
    assert data.test_images[:, 2, 7, 7].tolist() == [201, 202, 200]


def test_test_is_preferred_to_val(tmp_path):
    make_image_folder(tmp_path, "test")
    save(tmp_path / "val/ant/only.png", flat(7))
    assert len(load_data("folder", tmp_path, progress=False).test_images) == 3


def test_other_files_hidden_folders_and_nesting_do_not_disturb(tmp_path, capsys):
    make_image_folder(tmp_path)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/ant/._0.png").write_text("no image")
    (tmp_path / "train/.cache").mkdir()
    save(tmp_path / "train/ant/more/deep.PNG", flat(9))
    data = load_data("folder", tmp_path, progress=False)
    assert data.class_names == ("ant", "bee", "cat") and data.class_sizes == (3, 1, 3)
    assert "folder: 1 files skipped (.txt); accepted: .bmp, " in capsys.readouterr().err


def test_classes_without_test_images_are_reported(tmp_path, capsys):
    make_image_folder(tmp_path)
    assert load_data("folder", tmp_path, progress=False) and not capsys.readouterr().err
    shutil.rmtree(tmp_path / "test/bee")
    assert set(load_data("folder", tmp_path, progress=False).test_labels.tolist()) == {0, 2}
    assert f"{tmp_path / 'test'} lacks bee: accuracy covers the other classes only" in capsys.readouterr().err


def test_a_colour_image_in_either_split_makes_both_colour(tmp_path):
    make_image_folder(tmp_path)
    for file in tmp_path.rglob("*.png"):
        save(file, flat(3)[:, :, 0])
    assert load_data("folder", tmp_path, progress=False).image_shape == (1, 8, 8)
    save(tmp_path / "test/bee/colour.png", flat(3))
    assert load_data("folder", tmp_path, progress=False).image_shape == (3, 8, 8)


def test_one_size_is_asked_of_both_splits_unless_a_resolution_is_given(tmp_path):
    make_image_folder(tmp_path)
    save(tmp_path / "test/bee/large.png", flat(3, size=10))
    with pytest.raises(ValueError, match=r"large.png is 10x10 pixels but .* is 8x8: .*resolution"):
        load_data("folder", tmp_path, progress=False)
    assert load_data("folder", tmp_path, resolution=5, progress=False).image_shape == (3, 5, 5)


def test_a_broken_image_is_named(tmp_path):
    make_image_folder(tmp_path)
    broken = tmp_path / "train/cat/1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cannot read the image .*train/cat/1.png"):
        load_data("folder", tmp_path, progress=False)


def test_layouts_that_do_not_fit_are_explained(tmp_path):
    with pytest.raises(ValueError, match="'folder' needs a data_dir"):
        load_data("folder")
    with pytest.raises(FileNotFoundError, match=r"no folder train/ in .*expected train/<class>/"):
        load_data("folder", tmp_path / "missing")
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="no folder test/ or val/ in"):
        load_data("folder", tmp_path)
    (tmp_path / "test").mkdir()
    save(tmp_path / "train/loose.png", flat(0))
    with pytest.raises(FileNotFoundError, match=r"train contains no class folders; expected train/<class>/"):
        load_data("folder", tmp_path)
    (tmp_path / "train/ant").mkdir()
    save(tmp_path / "test/ant/x.png", flat(0))
    with pytest.raises(FileNotFoundError, match=r"train/ant contains no image files .*\.png"):
        load_data("folder", tmp_path)


def test_classes_of_the_test_set_that_cannot_be_learned_are_named(tmp_path):
    make_image_folder(tmp_path)
    save(tmp_path / "test/dog/x.png", flat(0))
    save(tmp_path / "test/elk/x.png", flat(0))
    with pytest.raises(ValueError, match=r"contains classes that .*train lacks: dog, elk"):
        load_data("folder", tmp_path, progress=False)


def test_a_test_set_may_lack_classes(tmp_path):
    make_image_folder(tmp_path)
    shutil.rmtree(tmp_path / "test/bee")
    assert load_data("folder", tmp_path, progress=False).test_labels.tolist() == [0, 2]
