"""Records: what is measured and kept, how an interrupted one goes on, and the page."""

import json
import shlex
import shutil

import pytest

from atom_fast.evaluation.accuracy import evaluate
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import get_protocol
from benchmarks import records
from benchmarks.__main__ import main, parse_settings
from benchmarks.pages import records as page
from tests.benchmarks.tiny import command

TINY = ("iterations=3", "width=4", "depth=2", "real_batch=4", "pool_networks=1", "pool_epochs=1")
OPTIONS = ["--name", "tiny", "--dataset", "digits", "--ipc", 1, "--networks", 2, "--epochs", 2, "--what", "a | test"]
OPTIONS += ["--device", "cpu", "--quiet", *(word for setting in TINY for word in ("--set", setting))]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Folder and content of a record."""
    output = tmp_path_factory.mktemp("record")
    said, _ = command("record", *OPTIONS, "--output", output)
    record = json.loads((output / "tiny.json").read_text("utf-8"))
    assert record["sha256"] in said
    return output, record


def test_a_record_names_what_was_measured_and_its_seconds(measured):
    output, record = measured
    assert record["data"] == "digits" and record["partition"] == 2 and record["calls"] == 1
    assert set(record["seconds"]) == set(records.STAGES) and all(v >= 0 for v in record["seconds"].values())
    assert list((output / "cache").rglob("network-000.safetensors")), "the pool was trained here, and timed"
    synthetic = SyntheticSet.load(output / "run")
    assert records.set_digest(synthetic) == record["sha256"]
    result = evaluate(synthetic, networks=2, protocol=get_protocol("digits", epochs=2), device="cpu", progress=False)
    assert list(result.accuracies) == pytest.approx(record["accuracy"]["accuracies"])
    assert record["accuracy"]["epoch"] == 2 and record["config"]["iterations"] == 3
    assert record["environment"]["device"] and record["versions"]["torch"]


def test_its_command_measures_the_same(measured):
    _, record = measured
    arguments = shlex.split(record["command"])
    assert arguments[:4] == ["python", "-m", "benchmarks", "record"]
    options = main.commands["record"].make_context("record", arguments[4:]).params
    assert parse_settings(options["given"]) == record["settings"] and options["what"] == "a | test"
    same = {"name": "name", "ipc": "ipc", "preset_name": "preset", "networks": "networks", "epochs": "epochs"}
    assert {name: options[name] for name in same} == {name: record[field] for name, field in same.items()}


def test_a_finished_record_is_kept_and_another_one_refused(measured, monkeypatch):
    output, record = measured
    monkeypatch.setattr(records, "load_named", None)
    command("record", *OPTIONS, "--output", output)
    assert json.loads((output / "tiny.json").read_text("utf-8")) == record
    _, error = command("record", *OPTIONS, "--networks", 3, "--output", output, code=2)
    assert "holds another record" in error
    _, error = command("record", *OPTIONS, "--name", "No/name", "--output", output, code=2)
    assert "lower-case" in error


def test_an_interrupted_record_goes_on_and_counts_its_calls(measured, tmp_path, monkeypatch):
    _, record = measured

    def stopped(*arguments, **options):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(records, "evaluate", stopped)
        _, error = command("record", *OPTIONS, "--output", tmp_path, code=2)
        assert "stopped" in error and not (tmp_path / "tiny.json").exists()
    before = json.loads((tmp_path / records.PROGRESS_FILE).read_text())["seconds"]
    monkeypatch.setattr(records, "distill", stopped)  # it is finished
    command("record", *OPTIONS, "--output", tmp_path)
    again = json.loads((tmp_path / "tiny.json").read_text("utf-8"))
    assert again["calls"] == 2 and again["sha256"] == record["sha256"]
    assert again["accuracy"]["accuracies"] == pytest.approx(record["accuracy"]["accuracies"])
    assert again["seconds"]["distill"] == round(before["distill"], 1)
    assert again["seconds"]["load"] > 0 and again["seconds"]["evaluate"] >= round(before["evaluate"], 1)


def test_the_page_sorts_by_target_and_time(measured, tmp_path):
    """A record of digits stands for some of CIFAR-10: only the figures count here."""
    _, record = measured
    kept = tmp_path / "records"
    kept.mkdir()
    assert "| 77.4 (NCFM, partitioned) |" in page.section(kept) and "seconds" not in page.section(kept)
    for name, mean, seconds, partition in (
        ("slow", 60.0, 90, 2), ("fast", 58.0, 30, 1), ("below", 40.0, 1, 2), ("high", 72.0, 300, 2),
    ):  # fmt: skip
        changed = {"name": name, "dataset": "cifar10", "ipc": 10, "partition": partition, "data": "CIFAR-10 (JPEG q75)"}
        changed |= {"accuracy": {**record["accuracy"], "mean": mean, "std": 0.5}}
        changed |= {"seconds": {**dict.fromkeys(records.STAGES, 0), "distill": seconds}}
        (kept / f"{name}.json").write_text(json.dumps({**record, **changed}))
    text = page.section(kept)
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["high", "fast", "slow", "below"]
    assert "71.8 (NCFM)" in lines[0] and "partitioned 2" in lines[0] and "57.9 (the paper)" in lines[1]
    assert "| whole " in lines[1] and "| – " in lines[3] and all("a / test" in line for line in lines)
    assert text.count(record["sha256"]) == 4 and "JPEG q75" in text and text.count(record["command"]) == 4
    shutil.copy(kept / "slow.json", kept / "other.json")
    with pytest.raises(ValueError, match="other.json is not a record"):
        page.section(kept)
