"""Files that others made: whatever is in them, they are read or refused, and nothing in them is run."""

import ast
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_fast.cli import main
from atom_fast.data.cifar import read_arrays
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.checkpoint import DamagedCheckpointError, load_checkpoint
from atom_fast.distillation.config import SETTINGS, preset, read_config, read_settings, write_config
from atom_fast.evaluation.accuracy import architecture_of
from atom_fast.synthetic import SyntheticSet, load_public
from tests import fuzz_readers
from tests.processes import ROOT
from tests.test_synthetic import make_set, rewrite

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "os.popen", "marshal.loads", "shelve.open", "joblib.load",
    "shutil.unpack_archive", "tarfile.open",
}  # fmt: skip


def calls():
    """Every call in the package: its file and line, the name called, its keywords."""
    for path in sorted(ROOT.joinpath("atom_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), keywords


@pytest.mark.fault(
    "Hostile files",
    "any file that this package opens holds a program",
    "nothing in the package unpickles, evaluates or starts what a file holds (its source is searched for such calls)",
)
def test_nothing_in_the_package_runs_what_a_file_holds():
    found = list(calls())
    assert not [place for place, name, keywords in found if name in FORBIDDEN or "shell" in keywords]
    needed = {
        "torch.load": ("weights_only", "True"), "numpy.load": ("allow_pickle", "False"),
        "np.load": ("allow_pickle", "False"), "Image.open": ("formats", None),
    }  # fmt: skip
    for place, name, keywords in found:
        if name in needed:
            keyword, value = needed[name]
            assert keyword in keywords and value in (None, keywords[keyword]), place


@pytest.mark.fault(
    "Hostile files",
    "a CIFAR batch, a pickle, that calls a function, even with the right MD5 sum",
    "refused by name: only arrays, lists and text are built; other bytes than the published ones are not even read",
)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_cifar_pickle_runs_nothing(protocol, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    for content in (Trap(), {"data": Trap()}, [eval], {"data": torch.zeros}):
        path = tmp_path / "data_batch_1"
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(ValueError, match=r"data_batch_1 is not one of CIFAR's files: .* which no array needs"):
            read_arrays(path, hashlib.md5(path.read_bytes()).hexdigest())
        with pytest.raises(FileNotFoundError, match="other bytes than published"):
            read_arrays(path, "0" * 32)
    assert not (tmp_path / "trapped").exists()


# ---------------------------------------------------------------- sets


@pytest.mark.fault(
    "Hostile files",
    "class names or metadata of a set hold escape sequences for the terminal, line ends, or halves of characters",
    "`info`, `evaluate` and every error print them spelled out",
)
def test_nothing_in_a_set_steers_the_terminal(tmp_path):
    evil = "\x1b]0;pwned\x07\x1b[2J\u202e\r\nfake: line\ud800"
    synthetic = make_set(classes=(evil, "dog", "emu"), dataset=evil)
    synthetic.metadata |= {evil: [evil, {evil: evil}], "nested": {evil: evil}}
    path = synthetic.save(tmp_path / "set.safetensors")
    commands = (["info", path], ["info", path, "--json"], ["evaluate", path], ["evaluate", path, "--dataset", "digits"])
    for command in commands:
        result = CliRunner().invoke(main, list(map(str, command)))
        assert "\x1b" in str(synthetic.class_names[0]) and "pwned" in result.output or command[0] == "evaluate"
        assert all(char.isprintable() or char == "\n" for char in result.output), result.output
        assert not any(line.startswith("fake") for line in result.output.splitlines())


@pytest.mark.fault(
    "Hostile files",
    "metadata of a set of another type than expected, with the right checksum",
    "refused with their name",
)
@pytest.mark.parametrize(
    "metadata",
    [
        *({"config": []}, {"config": "x"}, {"config": None}),
        *({"dataset": ["digits"]}, {"method": 3}, {"seconds": "long"}, ["a"], "x"),
    ],
)
def test_metadata_of_another_type_are_refused(metadata, tmp_path):
    path = make_set().save(tmp_path / "set.safetensors")
    rewrite(path, metadata=metadata)
    with pytest.raises(ValueError, match="set.safetensors does not hold a usable synthetic set"):
        SyntheticSet.load(path)


@pytest.mark.parametrize("names", ["abc", {"a": 1, "b": 2, "c": 3}, [1, 2, 3], None])
def test_class_names_of_another_type_are_refused(names, tmp_path):
    path = make_set().save(tmp_path / "set.safetensors")
    rewrite(path, class_names=names)
    with pytest.raises(ValueError, match="class_names"):
        SyntheticSet.load(path)


@pytest.mark.fault(
    "Hostile files",
    "a set records an architecture that no distillation accepts, or has class names and titles of a million characters",
    "refused by the setting's name; drawn short",
)
def test_a_recorded_architecture_is_checked_and_long_names_are_drawn_short(tmp_path):
    synthetic = make_set(classes=("c" * 1_000_000, "d" * 1_000_000, "e"), dataset="t" * 1_000_000)
    synthetic.metadata["config"] = {"width": "__import__('os')", "depth": -1}
    path = synthetic.save(tmp_path / "set.safetensors")
    assert CliRunner().invoke(main, ["show", str(path)]).exit_code == 0
    from PIL import Image

    with Image.open(tmp_path / "set.png") as picture:
        assert max(picture.size) < 10_000

    with pytest.raises(ValueError, match="width must be a whole number of at least 1"):
        architecture_of(SyntheticSet.load(path), "digits")


@pytest.mark.fault(
    "Hostile files",
    "a `.pt` of a few hundred bytes whose tensor claims terabytes by strides of 0",
    "refused before anything of that size is made",
)
def test_a_tensor_of_more_than_its_file_is_refused(tmp_path):
    images = torch.zeros(1).expand(1_000_000, 3, 1000, 1000)
    torch.save({"data": [[images, torch.zeros(1_000_000, dtype=torch.int64)]]}, tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 10_000_000
    with pytest.raises(ValueError, match=r"bomb.pt is not .* of 12000000000000 bytes is stored in 4"):
        load_public(tmp_path / "bomb.pt")


# ---------------------------------------------------------------- checkpoints


@pytest.mark.fault(
    "Hostile files", "a checkpoint with the right checksum and wrong fields", "refused; the one before it is used"
)
@pytest.mark.parametrize(
    "fields",
    [{}, {"iteration": -1}, {"iteration": "7"}, {"iteration": True}, {"config": []}, {"seconds": None}, {"other": 1}],
)
def test_a_checkpoint_of_other_fields_is_refused(fields, tmp_path):
    valid = {"iteration": 3, "config": {}, "data_fingerprint": "f", "seconds": 0.5, "versions": {}}
    path = tmp_path / "text"
    path.write_text(json.dumps({**valid, **fields} if fields else {}))
    with pytest.raises(DamagedCheckpointError, match="is not a checkpoint"):
        fuzz_readers.read_described_checkpoint(path)
    path.write_text(json.dumps(valid))
    fuzz_readers.read_described_checkpoint(path)
    assert load_checkpoint(path).iteration == 3


# ---------------------------------------------------------------- configurations


@pytest.mark.fault(
    "Hostile files",
    "a configuration in YAML that names Python objects, repeats itself by aliases into gigabytes, or nests without end",
    "refused in one line; nothing is built",
)
@pytest.mark.parametrize(
    "text",
    [
        "ipc: !!python/object/apply:os.mkdir [trapped]",
        "ipc: !!python/name:os.system ''",
        "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ) + "ipc: *i",
        "a: &a {ipc: 1}\n" + "".join(
            f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "ipc: " + "[" * 20_000,
        "ipc: [1, 2]", "ipc: {a: b}", "? [ipc, 2]\n: 1", "3: 4", "[1, 2]", "ipc: !!bool x", "ipc: !!timestamp x",
        "ipc: 2020-99-99", "ipc: !!int ''", "preset: 3", "preset: [paper]", "preset: none", "seed: 1e999", "\x00",
        "ipc: .nan",
    ],
)  # fmt: skip
def test_a_hostile_configuration_is_refused_at_once(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError):
        read_config(file)
    result = CliRunner().invoke(main, ["distill", "--config", str(file)])
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(
        [choice for setting in SETTINGS.values() for choice in setting.get("enum", ())]
    ), st.lists(st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=15)
@given(st.dictionaries(st.sampled_from(sorted(SETTINGS)), VALUES, max_size=4))
def test_any_settings_are_refused_or_come_back_from_their_file(chosen):
    path = ROOT_FOLDER / "settings.yaml"
    try:
        config = preset(**chosen)
    except ValueError as error:
        assert any(name in str(error) for name in [*chosen, "augmentation", "nothing to match"])
        path.write_text(yaml.safe_dump(chosen))
        with pytest.raises(ValueError):
            read_config(path)
        return
    write_config(config, path)
    assert read_config(path) == config and config.config_hash() == read_config(path).config_hash()
    assert read_settings(path) == config.to_dict()


# ---------------------------------------------------------------- labels and shapes


@settings(max_examples=25)
@given(
    st.lists(st.integers(-2, 6), min_size=0, max_size=8),
    st.lists(st.integers(0, 4), min_size=2, max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.uint8]),
    st.sampled_from([torch.int64, torch.int32, torch.float32]),
    st.integers(0, 5),
)
def test_any_labels_and_shapes_are_refused_or_come_back_from_their_file(labels, shape, dtype, kind, classes):
    labels = torch.tensor(labels).to(kind)
    names, images = [str(number) for number in range(classes)], torch.zeros(shape, dtype=dtype)
    good = len(shape) == 4 and 0 not in shape and dtype == torch.float32 and kind == torch.int64
    good = good and len(labels) == shape[0] and labels.min() >= 0 and labels.max() < classes
    preprocessing = Preprocessing(torch.zeros(shape[1]), torch.ones(shape[1]))
    try:
        synthetic = SyntheticSet(images, labels, names, preprocessing)
    except ValueError:
        assert not good
        return
    assert good
    read = SyntheticSet.load(synthetic.save(ROOT_FOLDER / "set.safetensors"))
    assert torch.equal(read.images, images) and torch.equal(read.labels, labels) and read.class_names == tuple(names)


@settings(max_examples=25)
@given(
    st.lists(st.integers(-1, 3), min_size=1, max_size=6),
    st.lists(st.integers(0, 3), min_size=3, max_size=5),
    st.sampled_from([torch.uint8, torch.float32]),
)
def test_any_data_are_refused_or_sorted_into_classes(labels, shape, dtype):
    images, labels = torch.zeros(shape, dtype=dtype), torch.tensor(labels)
    good = len(shape) == 4 and 0 not in shape and dtype == torch.uint8 and len(labels) == shape[0]
    good = good and set(labels.tolist()) == {0, 1}
    try:
        data = ImageData.from_tensors("any", ("a", "b"), images, labels, images, labels)
    except ValueError:
        assert not good
        return
    assert good
    assert torch.equal(data.train_labels[data.class_index], labels.sort().values)
    assert data.class_sizes == tuple(torch.bincount(labels, minlength=2).tolist())


# ---------------------------------------------------------------- fuzzers


@pytest.mark.fault(
    "Hostile files",
    "an unending stream of random sets, checkpoints, `.pt` files, configurations and zip files, guided by coverage "
    "(atheris) where it is installed",
    "each is read, or refused with ValueError; nothing is left behind",
)
def test_fuzzed_files_are_read_or_refused(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz_readers", "--seconds", "8", "--keep", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    assert ("fuzzing with atheris" if fuzz_readers.atheris else "fuzzing by mutation") in output
    runs = int(output.rpartition("Done ")[2].split()[0])
    assert runs > 100, output[-1000:]
    assert list(tmp_path.iterdir()) == []


def test_the_unguided_fuzzer_finds_and_keeps_what_fails(tmp_path, monkeypatch):
    def reader(path):
        if path.read_bytes()[:1] == b"q":
            raise KeyError("found")

    monkeypatch.setitem(fuzz_readers.TARGETS, "settings", reader)
    with pytest.raises(KeyError, match="found"):
        fuzz_readers.fuzz_by_mutation(["settings"], 60, tmp_path / "kept", tmp_path / "input")
    [kept] = (tmp_path / "kept").iterdir()
    assert kept.read_bytes()[1:2] == b"q"
    monkeypatch.setattr(fuzz_readers, "mutated", None)  # what was kept comes first
    with pytest.raises(KeyError, match="found"):
        fuzz_readers.fuzz_by_mutation(["settings"], 60, tmp_path / "kept", tmp_path / "input")


@pytest.mark.parametrize("target", sorted(fuzz_readers.TARGETS))
def test_what_fuzzing_begins_with_is_read(target, tmp_path):
    for content in fuzz_readers.seeds(target):
        (tmp_path / "input").write_bytes(content)
        fuzz_readers.TARGETS[target](tmp_path / "input")


def test_mutations_keep_a_bound_and_change_something():
    draw, content = random.Random(0), b"some content to change" * 3
    changed = [fuzz_readers.mutated(content, [content], draw) for _ in range(500)]
    assert max(map(len, changed)) <= 100_000 and sum(other != content for other in changed) > 450


@pytest.fixture(scope="module", autouse=True)
def root_folder(tmp_path_factory):
    """Where tests that hypothesis calls many times write: a function's own folder is not for them."""
    global ROOT_FOLDER
    ROOT_FOLDER = tmp_path_factory.mktemp("files")
