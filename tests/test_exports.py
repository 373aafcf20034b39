"""Exports: what other programs read is the set, whatever the names in it are."""

import json

import numpy
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from atom_fast import hub
from atom_fast.cli import main
from atom_fast.exports.folder import folder_names
from atom_fast.exports.formats import WRITERS
from atom_fast.exports.public import PUBLIC_NORMALIZATION
from atom_fast.names import EXPORT_FORMATS
from atom_fast.synthetic import load_public
from tests.test_synthetic import make_partitioned, make_set


def test_every_format_that_is_accepted_is_written():
    assert tuple(WRITERS) == EXPORT_FORMATS


def test_folder_export_is_read_by_torchvision(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    synthetic = make_set()
    synthetic.export(tmp_path / "images")
    read = datasets.ImageFolder(tmp_path / "images" / "train")
    assert read.classes == list(synthetic.class_names)
    assert [label for _, label in read.samples] == synthetic.labels.tolist()
    expected = (synthetic.pixels() * 255).round().to(torch.uint8)
    for index, (image, _) in enumerate(read):
        assert torch.equal(torch.from_numpy(numpy.array(image)).permute(2, 0, 1), expected[index])
    described = json.loads((tmp_path / "images" / "metadata.json").read_text("utf-8"))
    about = {"class_names": list(synthetic.class_names), "metadata": synthetic.metadata}
    assert described == {**about, "preprocessing": synthetic.preprocessing.describe()}
    assert described["preprocessing"]["std"] == pytest.approx(synthetic.preprocessing.std.tolist(), abs=1e-6)


def test_soft_labels_are_exported_beside_hard_ones(tmp_path):
    synthetic = make_set()
    soft = torch.rand(len(synthetic), len(synthetic.class_names))
    synthetic.soft_labels = soft / soft.sum(1, keepdim=True)
    content = torch.load(synthetic.export(tmp_path / "set.pt"), weights_only=True)
    assert torch.equal(content["soft_labels"], synthetic.soft_labels)
    described = json.loads((synthetic.export(tmp_path / "images") / "metadata.json").read_text("utf-8"))
    folder = tmp_path / "images" / "train"
    pictures = sorted(path.relative_to(folder) for path in folder.glob("*/*.png"))  # by class, as this set is
    rows = torch.tensor([described["soft_labels"][path.as_posix()] for path in pictures])
    assert torch.equal(rows, synthetic.soft_labels)
    hub.export(synthetic, tmp_path / "hub")
    [table] = tmp_path.glob("hub/*/train/metadata.jsonl")
    rows = sorted((json.loads(line) for line in table.read_text("utf-8").splitlines()), key=lambda row: row["index"])
    assert torch.equal(torch.tensor([row["soft_label"] for row in rows]), synthetic.soft_labels)
    described = CliRunner().invoke(main, ["info", str(synthetic.save(tmp_path / "set.safetensors"))])
    assert "labels: soft: probabilities of the classes" in described.output


def test_a_partitioned_set_is_exported_as_the_images_that_it_trains_as(tmp_path):
    """Programs that know no partition train on what this one does."""
    datasets = pytest.importorskip("torchvision.datasets")
    synthetic = make_partitioned(dataset="cifar10")
    read = datasets.ImageFolder(synthetic.export(tmp_path / "images") / "train")
    assert [label for _, label in read.samples] == synthetic.labels.tolist()
    expected = (synthetic.pixels() * 255).round().to(torch.uint8)
    for index, (image, _) in enumerate(read):
        assert torch.equal(torch.from_numpy(numpy.array(image)).permute(2, 0, 1), expected[index])
    described = json.loads((tmp_path / "images" / "metadata.json").read_text("utf-8"))
    content = torch.load(synthetic.export(tmp_path / "set.pt"), weights_only=True)
    [(images, labels)] = load_public(tmp_path / "set.pt")
    mean, std = (torch.tensor(values)[:, None, None] for values in PUBLIC_NORMALIZATION["cifar10"])
    torch.testing.assert_close((images * std + mean).clamp(0, 1), synthetic.pixels())
    assert torch.equal(labels, synthetic.labels)
    for about in (described, content):
        assert about["partition"] == 2 and about["decoded"] is True
    assert described["preprocessing"] == synthetic.preprocessing.describe()


def test_folder_export_of_grey_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    synthetic = make_set(channels=1)
    synthetic.export(tmp_path / "grey", format="folder")
    with image.open(tmp_path / "grey" / "train" / "dog" / "0001.png") as picture:
        assert picture.mode == "L" and picture.size == (5, 6)


def test_folder_export_refuses_what_is_there(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="full exists and is not an empty folder"):
        make_set().export(tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"
    with pytest.raises(ValueError, match="1 or 3 channels; got 2"):
        make_set(channels=2).export(tmp_path / "two")
    with pytest.raises(ValueError, match="folder, pt, ddranking, eccv24; got 'zip'"):
        make_set().export(tmp_path / "zip", format="zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@settings(max_examples=25)
@given(st.lists(st.text(max_size=100), min_size=1, max_size=12))
@example(["\U0001f130" * 100, "𝔘" * 100])
def test_folder_names_are_safe_distinct_and_in_order(names):
    folders = folder_names(names)
    assert folders == sorted(folders)
    assert len({folder.casefold() for folder in folders}) == len(names)
    for folder in folders:
        assert folder not in ("", ".", "..") and not set(folder) & set('/\\:*?"<>|\0') and not folder.startswith(".")
        assert len(folder.encode()) <= 255


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["dog", "cat"], ["0_dog", "1_cat"]),
        (["a/../../b", "c d"], ["a_.._.._b", "c_d"]),
        ([str(number) for number in range(11)], [f"{number:02d}_{number}" for number in range(11)]),
        (["..", "x"], ["0_", "1_x"]),
    ],
)
def test_folder_names_examples(names, folders):
    assert folder_names(names) == folders


@pytest.mark.fault(
    "Hostile files", "class names such as `../../x`, when a set is exported as folders", "written as harmless names"
)
def test_classes_keep_their_labels_in_a_folder_whatever_their_names(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    synthetic = make_set(classes=("zebra", "../ape", "zebra"), ipc=1)
    synthetic.export(tmp_path / "images")
    read = datasets.ImageFolder(tmp_path / "images" / "train")
    assert [label for _, label in read.samples] == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_pt_export_is_what_the_public_programs_save(tmp_path):
    synthetic = make_set()
    path = synthetic.export(tmp_path / "res_ATOM.pt")
    content = torch.load(path, weights_only=True)
    assert set(content) == {"data", "accs_all_exps", "preprocessing"}
    assert content["preprocessing"] == synthetic.preprocessing.describe()
    images, labels = content["data"][0]
    assert torch.equal(images, synthetic.images) and images.dtype == torch.float32
    assert torch.equal(labels, synthetic.labels)
    [(images, labels)] = load_public(path)
    assert torch.equal(images, synthetic.images) and torch.equal(labels, synthetic.labels)


def test_pt_export_of_cifar_is_normalised_as_the_public_programs_do(tmp_path):
    synthetic = make_set(dataset="cifar10")
    path = synthetic.export(tmp_path / "cifar.pt", format="pt")
    [(images, _)] = load_public(path)
    constants = dict(zip(("mean", "std"), map(list, PUBLIC_NORMALIZATION["cifar10"]), strict=True))
    assert torch.load(path, weights_only=True)["preprocessing"] == {"kind": "standard", **constants}
    mean, std = (torch.tensor(values)[:, None, None] for values in PUBLIC_NORMALIZATION["cifar10"])
    torch.testing.assert_close((images * std + mean).clamp(0, 1), synthetic.pixels())


def test_pt_export_of_a_whitened_set_stays_whitened(tmp_path):
    pytest.importorskip("kornia", reason="ZCA is fitted by kornia")
    synthetic = make_set("zca", dataset="cifar10")
    [(images, _)] = load_public(synthetic.export(tmp_path / "cifar.pt", format="pt"))
    assert torch.equal(images, synthetic.images)


# DD-Ranking


@pytest.mark.parametrize("kind", ["standard", "zca"])
def test_ddranking_gets_images_in_the_space_of_its_test_images(kind, tmp_path):
    if kind == "zca":
        pytest.importorskip("kornia", reason="ZCA is fitted by kornia")
    synthetic = make_set(kind, dataset="cifar100")
    folder = synthetic.export(tmp_path / "dd", format="ddranking")
    images, labels = torch.load(folder / "images.pt"), torch.load(folder / "labels.pt")
    assert images.dtype == torch.float32 and images.is_contiguous() and torch.equal(labels, synthetic.labels)
    if kind == "zca":
        assert torch.equal(images, synthetic.images)
    else:  # by CIFAR-10's constants, for CIFAR-100 too
        mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
        pixels = images * std[:, None, None] + mean[:, None, None]
        torch.testing.assert_close(pixels.clamp(0, 1), synthetic.pixels())
        assert pixels.max() > 1  # what leaves [0, 1] is kept
    settings = yaml.safe_load((folder / "lrs_hard_label.yaml").read_text())
    about = {"dataset": "CIFAR100", "ipc": 2, "im_size": [6, 5], "use_zca": kind == "zca", "eval_full_data": True}
    assert about.items() <= settings.items()
    assert settings["custom_train_trans"] is settings["custom_val_trans"] is None  # it fails without these keys
    compile((folder / "evaluate.py").read_text(), "evaluate.py", "exec")


def test_ddranking_counts_sheets_and_gets_the_images_on_them(tmp_path):
    synthetic = make_partitioned(dataset="cifar10")
    folder = synthetic.export(tmp_path / "dd", format="ddranking")
    assert len(torch.load(folder / "images.pt")) == len(synthetic) == 24
    assert yaml.safe_load((folder / "lrs_hard_label.yaml").read_text())["ipc"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "tiny"}, "sets of cifar10 and cifar100; this one is of 'tiny'"),
        ({"kind": "zca_standardized"}, "standard or zca; this one has zca_standardized"),
        ({"soft": True}, "needs hard labels"),
        ({"classes": ("a", "b", "c", "d"), "drop": True}, "differ in size"),
    ],
)
def test_what_ddranking_cannot_test_is_refused(change, message, tmp_path):
    pytest.importorskip("kornia", reason="ZCA is fitted by kornia")
    soft, drop = change.pop("soft", False), change.pop("drop", False)
    synthetic = make_set(**{"dataset": "cifar10", **change})
    if soft:
        synthetic.soft_labels = torch.full((len(synthetic), 3), 1 / 3)
    if drop:
        synthetic.images, synthetic.labels = synthetic.images[1:], synthetic.labels[1:]
    with pytest.raises(ValueError, match=message):
        synthetic.export(tmp_path / "dd", format="ddranking")
    assert not (tmp_path / "dd").exists()


# The Hugging Face Hub


def read_card(folder):
    _, header, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def evaluation(synthetic, mean, **changed):
    """A record of an evaluation, as far as the card reads it."""
    about = {"dataset": "shapes", "ipc": synthetic.ipc, "partition": synthetic.partition, "method": "atom"}
    how = {"protocol": {"name": "paper"}, "network": "convnet", "architecture": {}, "accuracies": [mean, mean]}
    result = {"accuracy_mean": mean, "accuracy_std": 0.25}
    return {**about, **how, **result, "set_fingerprint": synthetic.fingerprint, **changed}


def test_a_hub_folder_holds_sets_their_pictures_and_a_card(tmp_path):
    small, large = make_set(ipc=1), make_set(ipc=2, classes=("zebra", "../ape", "no"))
    folder = tmp_path / "hub"
    assert hub.export(large, folder, license="mit") == hub.export(small, folder) == folder
    header, _ = read_card(folder)
    assert header["license"] == "mit" and header["size_categories"] == ["n<1K"]
    assert [config["config_name"] for config in header["configs"]] == ["ipc1", "ipc2"]
    label = header["configs"][1]["features"][1]["dtype"]["class_label"]
    assert label == {"names": {"0": "zebra", "1": "../ape", "2": "no"}}  # texts: a bare no would be read as false
    for name, synthetic in (("ipc1", small), ("ipc2", large)):
        read = hub.load(folder, name)
        assert torch.equal(read.images, synthetic.images) and read.metadata == synthetic.metadata
        assert hub.load(folder / name).fingerprint == synthetic.fingerprint
        pictures = folder / name / "train"
        rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
        assert sorted(row["index"] for row in rows) == list(range(len(synthetic)))
        pixels = (synthetic.pixels() * 255).round().to(torch.uint8)
        for row in rows:
            found = torch.from_numpy(numpy.array(Image.open(pictures / row["file_name"]))).permute(2, 0, 1)
            assert torch.equal(found, pixels[row["index"]])
            assert row["label"] == synthetic.labels[row["index"]]
    assert yaml.safe_load((folder / "ipc1" / "config.yaml").read_text()) == small.metadata["config"]


def test_the_card_shows_accuracies_of_this_very_set(tmp_path):
    synthetic = make_set()
    other = make_set(ipc=1)
    random = evaluation(synthetic, 20.5, method="random", set_fingerprint=None)
    results = [
        evaluation(other, 11.5),
        evaluation(synthetic, 31.5),
        random,
        {**random, "accuracy_mean": 99.5, "network": "vgg11"},
        {**evaluation(synthetic, 77.5), "set_fingerprint": "of another"},
    ]
    folder = hub.export(synthetic, tmp_path / "hub", results=results)
    _, text = read_card(folder)
    assert "| ipc2 | 2 | 6 | dm | 31.5 ± 0.2 | 20.5 ± 0.2 | 2 convnet | paper |" in text
    assert json.loads((folder / "ipc2" / "evaluation.json").read_text()) == results[1:3]
    hub.export(other, folder)
    _, text = read_card(folder)
    assert "| ipc1 | 1 | 3 | dm | not measured |" in text and "31.5 ± 0.2" in text


def test_a_set_with_a_partition_is_shown_as_the_images_on_its_sheets(tmp_path):
    synthetic = make_partitioned()
    folder = hub.export(synthetic, tmp_path / "hub")
    assert "| ipc2-partition2 | 2 | 24, cut out of sheets |" in read_card(folder)[1]
    assert len(list((folder / "ipc2-partition2" / "train").glob("*/*.png"))) == 24
    assert hub.load(folder).partition == 2


def test_a_hub_folder_is_not_overwritten(tmp_path):
    synthetic = make_set()
    folder = hub.export(synthetic, tmp_path / "hub")
    card = (folder / "README.md").read_bytes()
    with pytest.raises(FileExistsError, match="hub has a set ipc2 already"):
        hub.export(synthetic, folder)
    assert (folder / "README.md").read_bytes() == card
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder of exported sets"):
        hub.export(synthetic, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]


def test_what_a_hub_folder_lacks_is_named(tmp_path):
    folder = hub.export(make_set(ipc=1), tmp_path / "hub")
    with pytest.raises(ValueError, match="one of ipc1; got 'ipc50'"):
        hub.load(folder, "ipc50")
    hub.export(make_set(ipc=2), folder)
    with pytest.raises(ValueError, match="holds several sets: give a name, one of ipc1, ipc2"):
        hub.load(folder)
    with pytest.raises(FileNotFoundError, match="missing holds no synthetic.safetensors"):
        hub.load(tmp_path / "missing")


@pytest.mark.parametrize("classes", [("cat", "dog", "emu"), ("10", "2", "0"), ("../ape", "no", "no")])
def test_the_datasets_library_loads_a_hub_folder(classes, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the Hub's library is optional")
    synthetic = make_set(classes=classes)
    folder = hub.export(synthetic, tmp_path / "hub")
    hub.export(make_set(ipc=1), folder)
    read = datasets.load_dataset(str(folder), "ipc2", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(read) == len(synthetic)
    assert read.features["label"].names == list(classes) or len(set(classes)) < 3  # which the library does not take
    pixels = (synthetic.pixels() * 255).round().to(torch.uint8)
    for row in read:
        assert row["label"] == synthetic.labels[row["index"]]
        assert torch.equal(torch.from_numpy(numpy.array(row["image"])).permute(2, 0, 1), pixels[row["index"]])


def test_the_command_adds_sets_to_a_hub_folder_with_the_accuracies_beside_them(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(main, ["export", *map(str, arguments)])

    synthetic, folder = make_set(), tmp_path / "hub"
    file = synthetic.save(tmp_path / "run" / "synthetic.safetensors")
    record = {**evaluation(synthetic, 31.5), "hash": "h", "seconds": 1, "curves": [{"5": 31.5}]}
    record["protocol"] = {"name": "paper", "epochs": 5}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps([record]))
    assert run(tmp_path / "run", folder, "--for", "hub", "--license", "mit").exit_code == 0
    header, text = read_card(folder)
    assert header["license"] == "mit" and "31.5 ± 0.2" in text
    again = run(file, folder, "--for", "hub")
    assert again.exit_code == 2 and "has a set ipc2 already" in again.output
    missing = run(file, tmp_path / "other", "--for", "hub", "--results", tmp_path / "none.json")
    assert missing.exit_code == 2 and "none.json does not exist" in missing.output and not (tmp_path / "other").exists()
    elsewhere = run(file, tmp_path / "set.pt", "--license", "mit")
    assert elsewhere.exit_code == 2 and "are for the card of --for hub" in elsewhere.output
