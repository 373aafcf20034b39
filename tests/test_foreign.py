"""Sets of other projects: their formats, spaces, labels and partitions are recognised, and what is none is refused."""

import json
import os
import pickle
import re
import zipfile

import numpy
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_fast.cli import main
from atom_fast.data.partition import make_sheets
from atom_fast.data.sources import load_data
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.evaluation.accuracy import evaluate, likeliest_space
from atom_fast.evaluation.sets import read_set
from atom_fast.foreign.files import named_dataset, read_foreign
from atom_fast.foreign.recognised import open_foreign
from atom_fast.foreign.spaces import CONSTANTS, Candidate, Fits, recognise_partition
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import get_protocol
from tests import foreign_files

pytest.importorskip("kornia", reason="ZCA is fitted by kornia")
COUNT = 25  # files that foreign_files.make writes


@pytest.fixture(scope="module")
def data():
    return foreign_files.photographs()


@pytest.fixture(scope="module")
def fits(data):
    return Fits(data, "cifar10", progress=False)


@pytest.fixture(scope="module")
def files(data, fits, tmp_path_factory):
    return foreign_files.make(data, tmp_path_factory.mktemp("foreign"), fits)


def run(*arguments, code=0):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


# ---------------------------------------------------------------- what the files are


@pytest.mark.parametrize("number", range(COUNT))
def test_every_format_is_recognised_in_its_space(number, files):
    assert len(files) == COUNT
    made = files[number]
    recognised = open_foreign(made.path, **made.given)
    assert [candidate.space for candidate in recognised.candidates] == [made.space]
    assert recognised.partition == made.partition and recognised.dataset == "cifar10"
    assert torch.equal(recognised.foreign.images, made.images)
    assert torch.equal(recognised.foreign.labels, made.labels)
    assert recognised.foreign.images.is_contiguous()
    assert all(recognised.found(recognised.candidates[0]).values())


@pytest.mark.parametrize("space", ["standard_2023", "standard_2470", "zca", "zca_datadam", "zca_frepo", "pixels"])
def test_a_set_trains_like_the_same_images_in_this_format(space, files, data, fits):
    made = next(made for made in files if made.space == space and made.partition == 1)
    read = SyntheticSet.load(made.path, data, **made.given)
    options = {"networks": 1, "protocol": get_protocol("paper", epochs=2), "device": "cpu", "progress": False}
    options["architecture"] = {"width": 8}
    if space == "pixels":
        preprocessing = fits.preprocessing(Candidate("standard_2023", ()))
        images = (made.images - preprocessing.mean[:, None, None]) / preprocessing.std[:, None, None]
    else:
        preprocessing, images = fits.preprocessing(Candidate(space, ())), made.images
    ours = SyntheticSet(images, made.labels, data.class_names, preprocessing, soft_labels=read.soft_labels)
    assert torch.equal(read.images, ours.images) and read.class_names == data.class_names
    for name, tensor in ours.preprocessing.tensors().items():
        assert torch.equal(read.preprocessing.tensors()[name], tensor), name
    results = [evaluate(synthetic, data, **options) for synthetic in (read, ours)]
    assert results[0].curves == results[1].curves


def test_whitened_real_images_are_told_by_undoing_each_whitening(files, data, tmp_path):
    for name, right in (("FTD/cifar10/images_5000.pt", "zca"), ("kip_cifar10_ConvNet3", "zca_frepo")):
        made = next(made for made in files if name in str(made.path))
        torch.save({"data": [[made.images, made.labels]]}, tmp_path / "unnamed.pt")
        [candidate] = open_foreign(tmp_path / "unnamed.pt", data, progress=False).candidates
        assert candidate.space == right and "multiples of 1/255" in candidate.reasons[0]


@pytest.mark.parametrize(
    ("dataset", "space", "size"),
    [
        ("cifar10", "standard_2023", 32), ("cifar10", "standard_2470", 32), ("cifar100", "standard_cifar100", 32),
        ("cifar100", "standard_2023", 32), ("tiny", "standard_imagenet", 64), ("tiny", "standard_tiny", 64),
    ],
)  # fmt: skip
def test_untouched_images_are_told_by_their_levels(dataset, space, size, tmp_path):
    pixels = foreign_files.photographs(size, each=2).train_images.float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in CONSTANTS[space])
    torch.save([(pixels - mean) / std, torch.arange(len(pixels))], tmp_path / "data.pt")
    for known in (dataset, None):
        [candidate] = open_foreign(tmp_path / "data.pt", dataset=known).candidates
        assert candidate.space == space and candidate.certain
    read = SyntheticSet.load(tmp_path / "data.pt")
    torch.testing.assert_close(read.pixels(), pixels, rtol=0, atol=1e-5)


def test_pixels_are_standardised_as_their_programs_do(tmp_path):
    pixels = torch.rand(10, 3, 32, 32) * 1.2 - 0.1  # the last step of a distillation may leave [0, 1]
    torch.save([pixels, torch.arange(10)], tmp_path / "data.pt")
    for dataset, space in (("cifar10", "standard_2023"), ("cifar100", "standard_2023"), ("tiny", "standard_imagenet")):
        [(candidate, images, preprocessing)] = open_foreign(
            tmp_path / "data.pt", dataset=dataset, preprocessing="pixels"
        ).in_model_space()
        assert candidate.space == "pixels"
        torch.testing.assert_close(preprocessing.std, torch.tensor(CONSTANTS[space][1]))
        torch.testing.assert_close(preprocessing.to_pixels(images), pixels.clamp(0, 1))
    unknown = SyntheticSet.load(tmp_path / "data.pt", preprocessing="pixels")
    assert torch.equal(unknown.images, pixels)


def test_what_stays_possible_is_said_and_the_given_space_overrules(data, fits, tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    images = fits.preprocessing(Candidate("zca", ())).to_model(data.train_images[::60])
    noise = torch.nn.functional.avg_pool2d(torch.randn((10, 3, 17, 17), generator=draw), 2, 1)
    images = images + 2.2 * noise  # drifted as far as sets of one image per class
    torch.save(images, tmp_path / "images_best.pt")
    path = tmp_path / "images_best.pt"
    recognised = open_foreign(path, dataset="cifar10")
    assert {candidate.space for candidate in recognised.candidates} >= {"zca", "standard_2023"}
    found = recognised.found(recognised.candidates[0])
    assert "choose by --preprocessing" in found["also possible"]
    stdout, _ = run("info", path, "--dataset", "cifar10")
    assert "also possible: " in stdout
    stdout, _ = run("info", path, "--dataset", "cifar10", "--preprocessing", "standard_cifar100", "--partition", 2)
    assert "standard_cifar100" in stdout and "because it was given" in stdout and "also possible" not in stdout
    monkeypatch.setattr("atom_fast.evaluation.accuracy._TRIAL_STEPS", 2)
    chosen = read_set(path, data, device="cpu", progress=False)
    assert re.search(r"one short network on each.*zca \d+.\d %", chosen.metadata["recognised"]["chosen"])


def test_the_likeliest_space_is_the_one_networks_learn_in(monkeypatch):
    monkeypatch.setattr("atom_fast.evaluation.accuracy._TRIAL_STEPS", 20)
    monkeypatch.setattr("atom_fast.evaluation.accuracy._TRIAL_IMAGES", 200)
    data = load_data("digits", progress=False)
    standard = fit_preprocessing(data.train_images, "standard", progress=False)
    chosen = data.class_index[(data.class_offsets[:-1, None] + torch.arange(10)).flatten()]
    images, labels = standard.to_model(data.train_images[chosen]), data.train_labels[chosen]
    right = SyntheticSet(images, labels, data.class_names, standard)
    wrong = SyntheticSet(-images, labels, data.class_names, standard)  # an affine map would cancel in the network
    best, accuracies = likeliest_space([wrong, right], data, device="cpu", progress=False)
    assert best == 1 and accuracies[1] > accuracies[0]


def test_a_missing_data_set_is_named_where_it_is_needed(files):
    made = next(made for made in files if made.space == "zca")
    with pytest.raises(ValueError, match="ZCA-whitened pixels .*fitted on the real images: .* --data-dir DIR"):
        SyntheticSet.load(made.path)
    stdout, _ = run("info", made.path)
    assert "give its real images" in stdout and "preprocessing: zca" in stdout
    _, stderr = run("show", made.path, code=2)
    assert "--data-dir DIR" in stderr and stderr.count("\n") == 1


def test_the_commands_read_files_of_other_projects(tmp_path):
    data = load_data("digits", progress=False)
    pixels = data.train_images[data.class_index[data.class_offsets[:-1]]].float() / 255
    path = tmp_path / "data.pt"
    torch.save([pixels, torch.arange(10)], path)
    options = ["--dataset", "digits", "--networks", 1, "--epochs", 1, "--device", "cpu", "--quiet", "--no-random"]
    stdout, stderr = run("evaluate", path, *options)
    assert stdout.startswith("digits ipc=1 public ") and "space: pixels, pixels in [0, 1], because all values" in stderr
    facts = json.loads(run("info", path, "--json", "--dataset", "digits", "--data-dir", tmp_path)[0])
    assert facts["class_sizes"] == [1] * 10 and "list of images and labels" in facts["recognised"]["format"]
    _, stderr = run("show", path, "--output", tmp_path / "set.png", "--preprocessing", "standard_2023", code=2)
    assert "to_pixels" not in stderr and "Error: " in stderr
    run("show", path, "--dataset", "digits", "--data-dir", tmp_path, "--output", tmp_path / "set.png")
    assert (tmp_path / "set.png").is_file()
    _, stderr = run("evaluate", path, code=2)
    assert "does not say which data set it is for; give --dataset" in stderr


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "kind", "soft"),
    [
        (torch.tensor([0, 2, 1]), "integers, hard", None),
        (torch.tensor([0.0, 2.0, 1.0]), "integers, hard", None),
        (torch.tensor([[0], [2], [1]], dtype=torch.int32), "integers, hard", None),
        (torch.eye(3)[[0, 2, 1]], "rows of one 1, hard", None),
        (torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6], [0.3, 0.4, 0.3]]), "probabilities", 0.8),
        (torch.eye(3)[[0, 2, 1]] - 1 / 3, "centred", 1.0),
        (8 * torch.eye(3)[[0, 2, 1]] + 1, "logits", 0.9993),
    ],
)
def test_labels_of_every_kind(labels, kind, soft, tmp_path):
    torch.save({"data": [torch.rand(3, 3, 8, 8), labels]}, tmp_path / "set.pt")
    foreign = read_foreign(tmp_path / "set.pt")
    assert foreign.labels.tolist() == [0, 2, 1] and foreign.labels.dtype == torch.int64
    assert foreign.found["labels"].startswith(kind)
    if soft is None:
        assert foreign.soft_labels is None
    else:
        assert foreign.soft_labels[0, 0].item() == pytest.approx(soft, abs=1e-3)
        torch.testing.assert_close(foreign.soft_labels.sum(1), torch.ones(3))


def test_soft_labels_are_saved_and_trained_on(tmp_path):
    data = load_data("digits", progress=False)
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    images, hard = space.to_model(data.train_images[:50]), data.train_labels[:50]
    sharp = torch.nn.functional.one_hot(hard, 10).float()
    even = 0.5 * sharp + 0.05
    options = {"networks": 1, "device": "cpu", "progress": False, "architecture": {"width": 16}}
    options["protocol"] = get_protocol("digits", epochs=40)
    curves = []
    for soft in (None, sharp, even):
        synthetic = SyntheticSet(images, hard, data.class_names, space, soft_labels=soft)
        read = SyntheticSet.load(synthetic.save(tmp_path / "set.safetensors"))
        assert read.soft_labels is None if soft is None else torch.equal(read.soft_labels, soft)
        assert torch.equal(read.targets, hard if soft is None else soft)
        curves.append(evaluate(read, data, **options).accuracies[0])
    assert curves[0] == pytest.approx(curves[1], abs=3.0) and curves[2] != curves[1]
    for wrong in (sharp[:, :9], sharp * 2, sharp.double(), -sharp):
        with pytest.raises(ValueError, match="soft labels must be"):
            SyntheticSet(images, hard, data.class_names, space, soft_labels=wrong)


def test_soft_labels_are_those_of_every_image_on_a_sheet():
    data = load_data("digits", progress=False)
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    soft = torch.rand(2, 10)
    soft = soft / soft.sum(1, keepdim=True)
    synthetic = SyntheticSet(torch.zeros(2, 1, 8, 8), soft.argmax(1), data.class_names, space, {}, 2, soft)
    assert synthetic.targets.shape == (8, 10) and torch.equal(synthetic.targets.argmax(1), synthetic.labels)
    assert torch.equal(synthetic.to("cpu").soft_labels, soft)


# ---------------------------------------------------------------- formats


def test_several_sets_in_a_file_are_told_apart(tmp_path):
    pairs = [[torch.full((2, 3, 8, 8), float(number)), torch.tensor([0, 1])] for number in range(3)]
    for name, chosen in (("res_DM_CIFAR10_ConvNet_1ipc.pt", 0), ("res_DataDAM_CIFAR10_ConvNet_1ipc_.pt", 2)):
        torch.save({"data": pairs}, tmp_path / name)
        foreign = read_foreign(tmp_path / name)
        assert foreign.images[0, 0, 0, 0] == chosen and f"number {chosen} of 3" in foreign.found["format"]
        assert read_foreign(tmp_path / name, experiment=1).images[0, 0, 0, 0] == 1
        with pytest.raises(ValueError, match="holds 3 sets, numbered from 0; got experiment 3"):
            read_foreign(tmp_path / name, experiment=3)


def test_labels_come_from_their_file_or_from_the_order(tmp_path):
    images = torch.rand(4, 3, 8, 8)
    torch.save(images, tmp_path / "images_7.pt")
    with pytest.raises(ValueError, match=r"4 images without labels, .* \(--dataset NAME\), or a file of labels"):
        read_foreign(tmp_path / "images_7.pt")
    with pytest.raises(ValueError, match="not as many of each of 10 classes"):
        read_foreign(tmp_path / "images_7.pt", dataset="cifar10")
    assert read_foreign(tmp_path / "images_7.pt", classes=2).labels.tolist() == [0, 0, 1, 1]
    torch.save(torch.tensor([3, 2, 1, 0]), tmp_path / "labels_7.pt")
    assert read_foreign(tmp_path / "images_7.pt").labels.tolist() == [3, 2, 1, 0]
    torch.save(torch.tensor([1, 1, 0, 0]), tmp_path / "other.pt")
    read = SyntheticSet.load(tmp_path / "images_7.pt", labels=tmp_path / "other.pt")
    assert read.labels.tolist() == [1, 1, 0, 0] and "labels from other.pt" in read.metadata["recognised"]["format"]
    with pytest.raises(FileNotFoundError, match="none.pt does not exist"):
        read_foreign(tmp_path / "images_7.pt", labels=tmp_path / "none.pt")
    torch.save([images, torch.zeros(4)], tmp_path / "data.pt")
    with pytest.raises(ValueError, match="holds its labels: leave out the file of labels"):
        read_foreign(tmp_path / "data.pt", labels=tmp_path / "other.pt")


def test_images_in_other_types_and_orders(tmp_path):
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    expected = images.permute(0, 3, 1, 2) / 255
    for stored in (images, images.permute(0, 3, 1, 2), (images / 255).double(), (images / 255).requires_grad_()):
        torch.save([stored, torch.tensor([0, 1])], tmp_path / "data.pt")
        foreign = read_foreign(tmp_path / "data.pt")
        torch.testing.assert_close(foreign.images, expected)
        assert foreign.images.dtype == torch.float32 and not foreign.images.requires_grad


@pytest.mark.parametrize(
    ("path", "dataset"),
    [
        ("res_DM_CIFAR10_ConvNet_10ipc.pt", "cifar10"), ("logged/CIFAR100/run/images_best.pt", "cifar100"),
        ("syn_data_cifar-10_ipc_1.pt", "cifar10"), ("tinyimagenet.pt", "tiny"), ("cifar100.pt", "cifar100"),
        ("Tiny/x.pt", "tiny"), ("destiny.pt", None), ("cifar1000.pt", None),
    ],
)  # fmt: skip
def test_a_path_names_its_data_set(path, dataset, tmp_path):
    assert named_dataset(tmp_path / "sets" / path) == dataset


# ---------------------------------------------------------------- partition


@pytest.mark.parametrize("partition", [2, 3, 4])
def test_seams_show_a_partition(partition, data):
    count = 12 * partition**2
    images = torch.nn.functional.interpolate(data.train_images[:count].float() / 255, size=(24, 24), mode="bilinear")
    sheets = make_sheets(images, partition)
    assert recognise_partition(sheets)[0] == partition
    assert recognise_partition(images)[0] == 1
    assert recognise_partition(torch.rand(100, 3, 24, 24))[0] == 1
    assert recognise_partition(torch.zeros(2, 3, 5, 7))[0] == 1
    draw = torch.Generator().manual_seed(0)
    assert recognise_partition(sheets + 0.1 * torch.randn(sheets.shape, generator=draw))[0] == partition


def test_a_given_partition_overrules(tmp_path, data):
    torch.save([data.train_images[:20].float() / 255, torch.arange(20) % 10], tmp_path / "data.pt")
    assert SyntheticSet.load(tmp_path / "data.pt").partition == 1
    assert len(SyntheticSet.load(tmp_path / "data.pt", partition=2)) == 80
    with pytest.raises(ValueError, match="partition must be a whole number that divides"):
        SyntheticSet.load(tmp_path / "data.pt", partition=3)


# ---------------------------------------------------------------- refused


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.fault(
    "Hostile files",
    "a set of another project, `.pt`, `.npz` or pickle, that calls a function when it is read",
    "refused by the function's name, with how to convert a file that is trusted; nothing is called",
)
def test_no_file_of_another_project_runs_anything(tmp_path):
    trap = Trap(tmp_path / "trapped")
    torch.save({"data": [[torch.rand(2, 3, 8, 8), trap]]}, tmp_path / "set.pt")
    (tmp_path / "set.pkl").write_bytes(pickle.dumps((torch.rand(2, 3, 8, 8), trap)))
    numpy.savez(tmp_path / "set.npz", image=numpy.zeros((2, 8, 8, 3)), label=numpy.array([trap, 1], dtype=object))
    messages = {
        "set.pt": r"holds Python objects \((posix|nt)\.mkdir\), .* torch.save\(\[images, labels\]",
        "set.pkl": r"(holds Python objects|is a pickle).* torch.save\(\[images, labels\]",
        "set.npz": "is not a readable .npz: Object arrays cannot be loaded",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            SyntheticSet.load(tmp_path / name)
        assert run("info", tmp_path / name, code=2)[1].count("\n") == 1
    assert not (tmp_path / "trapped").exists()


@pytest.mark.fault(
    "Hostile files",
    "an `.npz` or `.pt` that inflates to hundreds of times its size",
    "refused from its directory, before anything is inflated",
)
def test_a_file_that_inflates_is_refused(tmp_path):
    numpy.savez_compressed(tmp_path / "set.npz", image=numpy.zeros((500, 32, 32, 3)), label=numpy.zeros(500))
    with pytest.raises(ValueError, match="set.npz claims 12[0-9]* bytes of content in"):
        SyntheticSet.load(tmp_path / "set.npz")
    torch.save([torch.zeros(500, 3, 32, 32), torch.zeros(500)], tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "set.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for item in stored.infolist():
            packed.writestr(item.filename, stored.read(item))
    with pytest.raises(ValueError, match="set.pt claims 6[0-9]* bytes of content in"):
        SyntheticSet.load(tmp_path / "set.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"net_parameters": [torch.zeros(3)]}, "a dict of net_parameters: a network's parameters; accepted are"),
        ({}, "a dict of nothing; accepted are"),
        ({"data": []}, "a dict of data; accepted are"),
        ({"data": [[torch.zeros(2, 3, 8, 8)]]}, "a dict of data; accepted are"),
        (torch.zeros(5, dtype=torch.int64), r"a tensor int64 \[5\]; it may hold labels: give the file of images"),
        (torch.zeros(2, 3, 4), r"a tensor float32 \[2, 3, 4\]; accepted"),
        ([torch.zeros(1), torch.zeros(1), 0.1], "a list of 3 .*; accepted are"),
        (3, "an object of type int; accepted are"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(3)], r"labels must be \[2\] or \[2, K\], one per image; got a tensor"),
        ([torch.zeros(2, 3, 8, 8), torch.tensor([0, -1])], "hard labels must be whole numbers of at least 0"),
        ([torch.zeros(2, 3, 8, 8), torch.tensor([0.5, 1.0])], "hard labels must be whole numbers of at least 0"),
        ([torch.zeros(2, 3, 8, 8), torch.full((2, 3), torch.nan)], "labels that are not finite"),
        ([torch.full((2, 3, 8, 8), torch.inf), torch.zeros(2)], "images that are not finite"),
        ([torch.zeros(0, 3, 8, 8), torch.zeros(0)], "accepted are"),
        ([torch.zeros(2, 3, 8, 8).to_sparse(), torch.zeros(2)], "a tensor is not dense|accepted are"),
        (
            [torch.zeros(2, 3, 8, 8).to(torch.complex64), torch.zeros(2)],
            "a tensor is torch.complex64; accepted are float16",
        ),
        ([torch.zeros(1).expand(2, 3, 8, 8), torch.zeros(2)], "of 1536 bytes is stored in 4"),
    ],
)
def test_what_is_no_set_is_refused_in_one_line(content, message, tmp_path):
    torch.save(content, tmp_path / "set.pt")
    with pytest.raises(ValueError, match=message) as error:
        SyntheticSet.load(tmp_path / "set.pt")
    assert "\n" not in str(error.value) and "set.pt" in str(error.value)


@pytest.mark.fault(
    "Damaged files",
    "a file of another project that is cut short, empty or text, or of a format that only its program reads",
    "refused in one line that says what it is, and how to convert it where that is possible",
)
def test_damaged_and_unreadable_files_are_named(tmp_path):
    torch.save([torch.rand(2, 3, 8, 8), torch.zeros(2)], tmp_path / "set.pt")
    whole = (tmp_path / "set.pt").read_bytes()
    packed = b"\x82\xa6params\x81\xa7x_proto\xc0\xa9batch_set\xc0"
    cases = {
        "cut.pt": (whole[: len(whole) // 2], "is damaged, or no file of PyTorch: "),
        "empty.pt": (b"", "is damaged, or no file of PyTorch: "),
        "text.pt": (b"not a set", "is damaged, or no file of PyTorch: "),
        "cut.npz": (whole[:100], "is not a readable .npz: |is damaged"),
        "checkpoint_100": (packed, "is a msgpack checkpoint, as FRePo and RCIG save; .*numpy.savez"),
        "set.msgpack": (packed, "is a msgpack checkpoint"),
        "set.npy": (b"\x93NUMPY\x01\x00" + bytes(80), "is an .npy of one array; .*numpy.savez"),
        "set.pkl": (pickle.dumps({"a": 1}), "is a pickle|accepted are"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            SyntheticSet.load(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    numpy.savez(tmp_path / "other.npz", a=numpy.zeros(3))
    with pytest.raises(ValueError, match="holds arrays a; accepted are"):
        SyntheticSet.load(tmp_path / "other.npz")


def test_wrong_classes_and_sizes_are_named(tmp_path, data):
    torch.save([torch.rand(2, 3, 8, 8), torch.zeros(2)], tmp_path / "data.pt")
    with pytest.raises(ValueError, match=r"holds images \[3, 8, 8\]; those of cifar10 are \[3, 16, 16\]"):
        SyntheticSet.load(tmp_path / "data.pt", data)
    torch.save([torch.rand(2, 3, 16, 16), torch.rand(2, 7)], tmp_path / "data.pt")
    with pytest.raises(ValueError, match="has labels of 7 classes; cifar10 has 10"):
        SyntheticSet.load(tmp_path / "data.pt", data)
    with pytest.raises(ValueError, match="preprocessing must be one of standard, .*; got 'whiten'"):
        SyntheticSet.load(tmp_path / "data.pt", preprocessing="whiten")


@pytest.mark.parametrize(
    "entry", [{"kind": "standard"}, {"kind": "standard", "mean": "x", "std": [0.0]}, {"kind": 3}, [], {"kind": "zca"}]
)
def test_a_false_description_is_not_believed_blindly(entry, tmp_path):
    content = {"data": [[torch.rand(2, 3, 8, 8), torch.zeros(2)]], "preprocessing": entry}
    torch.save(content, tmp_path / "set.pt")
    [candidate] = open_foreign(tmp_path / "set.pt").candidates
    assert candidate.space == ("zca" if entry == {"kind": "zca"} else "pixels")


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 5), min_size=0, max_size=5),
    st.lists(st.integers(0, 4), min_size=0, max_size=3),
    st.sampled_from(
        [torch.float32, torch.float16, torch.uint8, torch.int64, torch.bool, torch.bfloat16, torch.float8_e5m2]
    ),
    st.sampled_from([torch.int64, torch.float32, torch.float64, torch.uint8, torch.uint16, torch.bool]),
)
def test_any_shapes_and_types_are_read_or_refused(shape, labels, dtype, kind):
    torch.save([torch.ones(shape).to(dtype), torch.ones(labels).to(kind)], FOLDER / "data.pt")
    try:
        synthetic = SyntheticSet.load(FOLDER / "data.pt", partition=1)
    except ValueError:
        return
    assert list(synthetic.sheets.shape)[0] == shape[0] and synthetic.sheets.isfinite().all()


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Where the test that hypothesis calls many times writes."""
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("files")


def test_the_constants_are_those_of_the_public_programs():
    assert CONSTANTS["standard_2023"][1][0] == 0.2023 and CONSTANTS["standard_2470"][1][0] == 0.2470
    assert all(len(mean) == len(std) == 3 for mean, std in CONSTANTS.values())
