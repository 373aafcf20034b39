"""Scores that others report: their formulas, and that all real images are trained on once."""

import dataclasses
import json
import math
import threading

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from atom_fast.cli import main
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.evaluation import EvaluationResult, evaluate
from atom_fast.evaluation import scores as module
from atom_fast.evaluation.scores import (
    augmentation_robust_score,
    evaluate_whole,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
    measure_scores,
    score_line,
    scores,
    whole_protocol,
)
from atom_fast.evaluation.sets import random_sets, select
from atom_fast.synthetic import SyntheticSet
from atom_fast.training import PROTOCOLS, get_protocol
from tests.evaluation.interruptions import count_trained, interrupted_after
from tests.evaluation.small import small_data

PROTOCOL = get_protocol("paper", epochs=2, batch_size=16)
PLAIN = dataclasses.replace(PROTOCOL, name="plain", augmentation="none")
ABOUT = {
    "dataset": "digits", "ipc": 1, "partition": 1, "method": "atom", "config_hash": "abc", "set_seconds": 2.0,
    "same_data": True,
}  # fmt: skip
SMALL = {"width": 4, "depth": 2}
HOW = {"architecture": SMALL, "networks": 2, "device": "cpu", "progress": False}
FRACTIONS = st.floats(-1, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "whole"


@pytest.fixture(scope="module")
def data():
    return small_data()


@pytest.fixture(scope="module")
def space(data):
    return fit_preprocessing(data.train_images, "standard", progress=False)


def result_of(*accuracies, protocol=PROTOCOL, **changes):
    curves = tuple({protocol.epochs: accuracy} for accuracy in accuracies)
    settings = {"architecture": {}, "precision": "float32", "seed": 0, "seconds": 1.0, "device": "cpu", **changes}
    return EvaluationResult(ABOUT, curves, protocol, "convnet", **settings)


# Formulas


@pytest.mark.parametrize("random, atom, expected", [(14.4, 34.8, 0.210), (26.0, 57.9, 0.280), (43.4, 68.8, 0.289)])
def test_the_paper_s_rows_have_the_scores_of_the_definition(random, atom, expected):
    found = scores(result_of(atom), result_of(random), 84.8)
    assert found["lrs"] == pytest.approx(expected, abs=5e-4)
    assert found["hlr"] == pytest.approx((84.8 - atom) / 100) and found["ior"] == pytest.approx((atom - random) / 100)
    alpha = 0.5 * (atom - random) / 100 - 0.5 * (84.8 - atom) / 100
    by_hand = (math.exp(alpha) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert found["lrs"] == pytest.approx(by_hand, rel=1e-12)
    assert found["ars"] is None and found["whole_epochs"] is None


def test_the_line():
    found = scores(result_of(57.9), result_of(26.0), 84.8)
    assert score_line(found) == "scores HLR 0.269 IOR 0.319 LRS 0.280 (whole data 84.8 %)"
    other = result_of(50.0, protocol=PLAIN), result_of(20.0, protocol=PLAIN)
    found = scores(result_of(57.9), result_of(26.0), result_of(84.0, 85.0), other=other)
    assert score_line(found) == "scores HLR 0.266 IOR 0.319 LRS 0.280 ARS 0.423 (whole data 84.5 %, 2 epochs)"


@given(FRACTIONS, FRACTIONS, FRACTIONS, st.floats(0, 1))
def test_scores_lie_between_0_and_1_and_grow_with_what_is_better(first, second, third, weight):
    low, high = sorted((second, third))
    for score in (label_robust_score, augmentation_robust_score):
        values = [score(first, value, weight) for value in (low, high)]
        assert -1e-12 <= values[0] <= values[1] <= 1 + 1e-12
    assert label_robust_score(high, first, weight) <= label_robust_score(low, first, weight)
    assert augmentation_robust_score(low, first, weight) <= augmentation_robust_score(high, first, weight)


def test_ends_and_weights():
    assert label_robust_score(0, 0) == pytest.approx(0.26894142)
    assert label_robust_score(-1, 1) == pytest.approx(1) and label_robust_score(1, -1) == pytest.approx(0)
    assert label_robust_score(0.3, 0.7, weight=1) == augmentation_robust_score(0.7, 0.2, weight=1)
    assert hard_label_recovery(84.8, 57.9) == pytest.approx(0.269)
    assert improvement_over_random(57.9, 26) == pytest.approx(0.319)


@pytest.mark.parametrize("plain_first", [False, True])
def test_ars_weighs_improvements_with_and_without_augmentation(plain_first):
    pairs = [(result_of(60.0), result_of(40.0)), (result_of(50.0, protocol=PLAIN), result_of(45.0, protocol=PLAIN))]
    (result, random), other = pairs[::-1] if plain_first else pairs
    found = scores(result, random, 80.0, other=other)
    beta = 0.5 * (0.60 - 0.40) + 0.5 * (0.50 - 0.45)
    assert found["ars"] == pytest.approx((math.exp(beta) - 1 / math.e) / (math.e - 1 / math.e), rel=1e-12)
    assert found["ior"] == pytest.approx(0.05 if plain_first else 0.2)
    assert (found["augmented_accuracy"], found["plain_random_accuracy"]) == (60.0, 45.0)
    assert found["augmentation"] == PROTOCOL.augmentation


def test_hard_labels_count_for_recovery_only():
    found = scores(result_of(60.0), result_of(40.0), 80.0, hard=result_of(50.0))
    assert (found["hlr"], found["ior"]) == (pytest.approx(0.3), pytest.approx(0.2))


def test_networks_that_diverged_leave_their_scores_out():
    found = scores(result_of(None, None), result_of(40.0), 80.0)
    assert found["hlr"] is found["ior"] is found["lrs"] is found["accuracy"] is None
    assert score_line(found) == "scores HLR - IOR - LRS - (whole data 80.0 %)"
    found = scores(result_of(50.0), result_of(40.0), result_of(None))
    assert found["hlr"] is found["lrs"] is None and found["ior"] == pytest.approx(0.1)
    assert score_line(found) == "scores HLR - IOR 0.100 LRS - (whole data diverged, 2 epochs)"
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hard_label_recovery(184.8, 50), "whole_accuracy must be in percent, from 0 to 100; got 184.8"),
        (lambda: hard_label_recovery(84.8, "50"), "hard_accuracy must be in percent, from 0 to 100; got '50'"),
        (lambda: improvement_over_random(-1, 50), "accuracy must be in percent, from 0 to 100; got -1"),
        (lambda: improvement_over_random(1, math.inf), "random_accuracy must be in percent, from 0 to 100; got inf"),
        (lambda: label_robust_score(26.9, 0), "recovery must be a fraction from -1 to 1, not percent; got 26.9"),
        (lambda: label_robust_score(0, None), "improvement must be a fraction from -1 to 1, not percent; got None"),
        (lambda: label_robust_score(0, 0, 2), "weight must be a number from 0 to 1; got 2"),
        (lambda: augmentation_robust_score(0, 31.9), "plain must be a fraction .*; got 31.9"),
        (lambda: augmentation_robust_score(0, 0, math.nan), "weight must be a number from 0 to 1; got nan"),
        (lambda: scores(result_of(1.0), result_of(1.0), 101), "whole_accuracy must be in percent"),
        (lambda: scores(result_of(1.0), result_of(1.0, protocol=PLAIN), 80), "the same name; got 'paper .*has 'plain'"),
        (lambda: scores(result_of(1.0), result_of(1.0, architecture=SMALL), 80), "same architecture; got {}, and ran"),
        (
            lambda: scores(result_of(1.0), result_of(1.0), 80.0, other=(result_of(1.0), result_of(1.0))),
            "other must be without augmentation",
        ),
        (
            lambda: scores(
                result_of(1.0), result_of(1.0), dataclasses.replace(result_of(1.0), about={**ABOUT, "dataset": "tiny"})
            ),
            "evaluations must be of the same data; got digits, and whole has tiny",
        ),
        (lambda: module.check_whole(0.848, None), "whole_accuracy must be in percent, such as 84.8, .*; got 0.848"),
        (lambda: module.check_whole(math.nan, None), "whole_accuracy must be in percent"),
        (lambda: module.check_whole(84.8, 3), "whole_epochs is for training on all real images; .* is given: 84.8"),
        (lambda: module.check_whole(None, 0), "whole_epochs must be a whole number, at least 1, or None; got 0"),
    ],
)
def test_what_is_not_accepted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# All real images


def whole(data, space, **changes):
    return evaluate_whole(data, space, **{"protocol": PROTOCOL, **HOW, **changes})


def test_all_images_are_trained_on_as_a_set_of_them_once(data, space, monkeypatch, capsys, cache):
    expected = evaluate(select(data, "full", preprocessing=space, progress=False), data, protocol=PROTOCOL, **HOW)
    trained = count_trained(monkeypatch)
    first = whole(data, space)
    assert "training on all 40 images of small, kept in " in capsys.readouterr().err
    assert first.curves == expected.curves and len(trained) == 2
    again = whole(data, space)
    assert dataclasses.replace(again, seconds=first.seconds) == first
    assert capsys.readouterr().err == "" and len(trained) == 2
    larger = whole(data, space, networks=3)
    assert larger.curves[:2] == first.curves and len(trained) == 3, "only the third network is new"
    assert whole(data, space, networks=1).curves == first.curves[:1] and len(trained) == 3
    assert [path.suffix for path in sorted(cache.iterdir())] == [".json", ".lock"]


@pytest.mark.parametrize("damage", ["cut", "digit", "other", b"[]", b"\xff"])
def test_a_damaged_file_of_the_cache_is_said_and_made_again(damage, data, space, capsys, cache):
    first = whole(data, space, networks=1)
    (path,) = cache.glob("*.json")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "digit":
        path.write_bytes(content.replace(b'"2": ', b'"2": 1'))
    elif damage == "other":
        whole(data, space, networks=1, seed=1)
        (other,) = set(cache.glob("*.json")) - {path}
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(damage)
    capsys.readouterr()
    assert whole(data, space, networks=1).curves == first.curves
    assert f"{path} cannot be used (" in capsys.readouterr().err
    whole(data, space, networks=1)
    assert capsys.readouterr().err == ""


def test_another_task_is_another_file(data, space, cache):
    other_space = fit_preprocessing(data.train_images, "zca", progress=False)
    other_data = small_data(train=41)
    tasks = [
        (data, space, {}),
        (data, space, {"seed": 1}),
        (data, space, {"protocol": PLAIN}),
        (data, space, {"architecture": {"width": 8, "depth": 2}}),
        (data, other_space, {}),
        (other_data, space, {}),
    ]
    for count, (images, where, changes) in enumerate(tasks, 1):
        whole(images, where, networks=1, **changes)
        assert len(list(cache.glob("*.json"))) == count


def test_what_an_interrupted_training_finished_is_kept(data, space, monkeypatch, cache):
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            whole(data, space, together=1)
    trained = count_trained(monkeypatch)
    found = whole(data, space, together=1)
    assert len(trained) == 1 and not found.unfinished
    (path,) = cache.glob("*.json")
    path.unlink()
    path.with_suffix(".unfinished").write_text("{")
    assert whole(data, space, together=1).curves == found.curves and len(trained) == 3


def test_two_that_need_it_at_once_share_one(data, space, monkeypatch):
    trained, both, found = count_trained(monkeypatch), threading.Barrier(2), []

    def need():
        both.wait()
        found.append(whole(data, space, together=1).curves)

    threads = [threading.Thread(target=need) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 2 and len(found) == 2 and found[0] == found[1]


@pytest.mark.parametrize("name, epochs, given, expected", [
    ("paper", 1000, None, 200), ("paper", 30, None, 30), ("paper", 30, 40, 40), ("datadam-code", 1800, 1800, 1800),
])  # fmt: skip
def test_epochs_on_all_images(name, epochs, given, expected):
    protocol = get_protocol(name, epochs=epochs)
    found = whole_protocol(protocol, given)
    assert found.epochs == expected and (found is protocol) == (expected == epochs)
    assert dataclasses.replace(found, name=protocol.name, epochs=epochs) == protocol


# Everything together


def test_scores_of_a_soft_set_are_computed_from_these_trainings(data, space, tmp_path, monkeypatch):
    chosen = select(data, "random", 2, preprocessing=space, progress=False)
    soft = torch.full((6, 3), 0.3).scatter(1, chosen.labels[:, None], 0.4)
    synthetic = SyntheticSet(
        chosen.images, chosen.labels, data.class_names, space, {**chosen.metadata, "method": "soft"}, soft_labels=soft
    )
    record = tmp_path / "result.json"
    common = {**HOW, "record": record}
    result = evaluate(synthetic, data, protocol=PLAIN, **common)
    baseline = random_sets(data, synthetic)
    random = evaluate(baseline, data, protocol=PLAIN, **common)
    found = measure_scores(result, random, synthetic, data, whole_epochs=3, device="cpu", progress=False, record=record)

    augmented = dataclasses.replace(PLAIN, augmentation=PROTOCOLS["paper"].augmentation)
    means = {
        "hard_accuracy": evaluate(chosen, data, protocol=PLAIN, **HOW).mean,
        "whole_accuracy": whole(data, space, protocol=dataclasses.replace(PLAIN, epochs=3)).mean,
        "augmented_accuracy": evaluate(synthetic, data, protocol=augmented, **HOW).mean,
        "augmented_random_accuracy": evaluate(baseline, data, protocol=augmented, **HOW).mean,
        "plain_accuracy": result.mean,
        "plain_random_accuracy": random.mean,
    }
    assert {name: found[name] for name in means} == means
    alpha = (result.mean - random.mean - means["whole_accuracy"] + means["hard_accuracy"]) / 200
    beta = (means["augmented_accuracy"] - means["augmented_random_accuracy"] + result.mean - random.mean) / 200
    for name, value in (("lrs", alpha), ("ars", beta)):
        assert found[name] == pytest.approx((math.exp(value) - 1 / math.e) / (math.e - 1 / math.e))
    assert (found["whole_epochs"], found["whole_networks"], found["networks"]) == (3, 2, 2)

    records = json.loads(record.read_text())
    assert [entry["method"] for entry in records] == ["soft", "random", "soft, hard labels", "soft", "random"]
    assert [entry.get("scores") for entry in records] == [found, None, None, None, None]
    trained = count_trained(monkeypatch)
    again = measure_scores(result, random, synthetic, data, whole_epochs=3, device="cpu", progress=False, record=record)
    assert again == found and not trained


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from atom_fast.data.sources import load_data

    folder, digits, made = tmp_path_factory.mktemp("sets"), load_data("digits"), []
    for ipc in (1, 2):
        chosen = select(digits, "random", ipc, progress=False, seed=ipc)
        chosen.metadata["config"] = {"width": 8, "depth": 2}
        made.append(chosen.save(folder / f"{ipc}.safetensors"))
    return made


def run(*arguments, code=0):
    result = CliRunner().invoke(main, ["evaluate", *map(str, arguments), "--device", "cpu", "--quiet"])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_the_command_prints_and_records_scores_and_trains_all_images_once(files, tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "digits", get_protocol("digits", epochs=2))
    first, second = files
    command = (first, "--networks", 1, "--scores", "--whole-epochs", 1, "--json", tmp_path / "result.json")
    trained = count_trained(monkeypatch)
    stdout, stderr = run(*command)
    accuracy, line = stdout.splitlines()
    assert accuracy.startswith("digits ipc=1 random ") and len(trained) == 5
    assert "training on all 1400 images of digits" in stderr
    record = json.loads((tmp_path / "result.json").read_text())[0]
    assert line == score_line(record["scores"]) and line.endswith(" %, 1 epoch)")
    assert record["scores"]["accuracy"] == record["accuracy_mean"]
    assert run(*command) == (stdout, "") and len(trained) == 5
    stdout, stderr = run(second, *command[1:6])
    assert " LRS " in stdout and stderr == "" and len(trained) == 9, "all images are not trained on again"
    stdout, _ = run(*command[:4], "--whole-accuracy", 84.8)
    assert stdout.splitlines()[1].endswith(" (whole data 84.8 %)")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--scores", "--no-random"], "--scores compare with random images: leave out --no-random"),
        (["--whole-accuracy", "84.8"], "--whole-accuracy and --whole-epochs are for --scores"),
        (["--whole-epochs", "3"], "--whole-accuracy and --whole-epochs are for --scores"),
        (
            ["--scores", "--whole-accuracy", "0.848"],
            "whole_accuracy must be in percent, such as 84.8, at most 100; got",
        ),
        (["--scores", "--whole-accuracy", "nan"], "whole_accuracy must be in percent"),
        (["--scores", "--whole-epochs", "0"], "whole_epochs must be a whole number, at least 1, or None; got 0"),
        (["--scores", "--whole-epochs", "3", "--whole-accuracy", "80"], "whole_epochs is for training on all real"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, files):
    _, stderr = run(files[0], *arguments, code=2)
    assert message in stderr and len(stderr.splitlines()) == 1
