"""Results of evaluations: means, one readable line, and records."""

import dataclasses
import json
import math

import pytest

from atom_fast.evaluation import EvaluationResult
from atom_fast.evaluation.results import curves_of, read_records, summary, write_record
from atom_fast.training import get_protocol

PROTOCOL = get_protocol("paper", epochs=6)
ABOUT = {
    "dataset": "digits", "ipc": 1, "partition": 1, "method": "atom", "config_hash": "abc", "set_seconds": 2.0,
    "same_data": True,
}  # fmt: skip


def result_of(*accuracies):
    curves = tuple({3: 50.0, 6: accuracy} for accuracy in accuracies)
    return EvaluationResult(ABOUT, curves, PROTOCOL, "convnet", {}, "float32", seed=0, seconds=1.0, device="cpu")


def test_mean_and_population_deviation():
    result = result_of(90.0, 93.0, 96.0)
    assert result.mean == pytest.approx(93)
    assert result.std == pytest.approx(math.sqrt(6))
    assert str(result) == "digits ipc=1 atom: 93.0 ± 2.4 % (3 convnet networks, last epoch)"
    assert str(result_of(90.0)) == "digits ipc=1 atom: 90.0 ± 0.0 % (1 convnet network, last epoch)"
    unfinished = dataclasses.replace(result, curves=(*result.curves[:2], {}))
    assert unfinished.unfinished == (2,) and unfinished.mean == pytest.approx(91.5) and not unfinished.diverged
    assert str(unfinished).endswith(": 91.5 ± 1.5 % (3 convnet networks, last epoch), unfinished: 2")
    uneven = dataclasses.replace(result, about={**ABOUT, "ipc": None})
    assert str(uneven).startswith("digits atom: ")


def test_a_partitioned_set_is_never_shown_as_a_plain_one():
    result = dataclasses.replace(result_of(90.0), about={**ABOUT, "partition": 3})
    assert str(result).startswith("digits ipc=1 partition=3 (9 images per class) atom: 90.0")
    assert result.to_dict()["partition"] == 3
    assert summary(result)["partition"] == 3 and summary(result_of(90.0))["partition"] == 1


def test_random_stands_beside_a_set():
    beside = summary(result_of(90.0), result_of(50.0, 60.0))
    assert (beside["accuracy_mean"], beside["random_mean"], beside["random_std"]) == (90.0, 55.0, 5.0)
    assert beside["seconds"] == 2.0 and beside["config_hash"] == "abc"
    assert summary(result_of(None))["accuracy_mean"] is None and summary(result_of(1.0))["random_mean"] is None


def test_a_record_is_replaced_by_its_hash_and_others_stay(tmp_path):
    path, records = tmp_path / "record.json", []
    for name, result in (("a", result_of(90.0)), ("b", result_of(80.0)), ("a", result_of(90.0, None))):
        write_record(path, {"hash": name, **result.to_dict()})
        records = read_records(path)
    assert [record["hash"] for record in records] == ["a", "b"]
    assert tuple(curves_of(records[0])) == result_of(90.0, None).curves
    assert read_records(tmp_path / "nowhere.json") == []


@pytest.mark.parametrize(
    "change",
    [
        {"hash": None},
        {"seconds": "1"},
        {"curves": [{"3": 50.0}]},
        {"curves": [{"3": "high", "6": 1.0}]},
        {"curves": [{"last": 1.0, "6": 1.0}]},
        {"protocol": {}},
    ],
)
def test_a_damaged_record_is_refused(change, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps([{"hash": "a", **result_of(90.0).to_dict(), **change}]))
    with pytest.raises(ValueError, match="record.json is not a record of evaluations"):
        read_records(path)
