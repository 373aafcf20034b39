"""The roofline counts what a step must do, and refuses what it cannot count."""

import json

import pytest

from benchmarks.devices import DEVICES
from benchmarks.roofline import DATASETS, WAYS, Configuration, stages, totals
from tests.benchmarks.tiny import command

CIFAR = Configuration(*DATASETS["cifar10"])


def test_products_are_the_convolutions_of_the_step():
    positions = 32 * 32, 16 * 16, 8 * 8
    inputs = 3, 128, 128
    one_image = sum(2 * 9 * 128 * channels * places for channels, places in zip(inputs, positions, strict=True))
    assert sum(stage.matrix for stage in stages(CIFAR)) == one_image * 10 * (128 + 2 * 50)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_the_floor_is_below_the_fused_and_the_fused_below_the_eager_way(dataset, precision):
    configuration = Configuration(*DATASETS[dataset], precision=precision)
    for stage in stages(configuration):
        eager, fused, floor = stage.bytes
        assert 0 < floor <= fused <= eager
    for device in DEVICES.values():
        seconds = [totals(configuration, device)[way]["seconds"] for way in reversed(WAYS)]
        assert seconds == sorted(seconds)


def test_work_grows_with_the_step():
    base = totals(CIFAR, DEVICES["H100"])["floor"]
    for larger in ({"ipc": 100}, {"real_batch": 256}, {"network_width": 256}, {"classes": 20}):
        settings = {**dict(zip(("classes", "channels", "height", "width"), DATASETS["cifar10"], strict=True)), **larger}
        grown = totals(Configuration(**settings), DEVICES["H100"])["floor"]
        assert all(grown[key] > base[key] for key in base)


def test_the_table_and_the_json_agree():
    table = command("roofline", "--ipc", 1)[0].splitlines()
    result = json.loads(command("roofline", "--ipc", 1, "--json")[0])
    assert len(table) == len(result["stages"]) + 3
    assert f"{1e3 * result['totals']['floor']['seconds']:.3f}" in table[-1]


def test_a_measured_device_replaces_the_datasheet(tmp_path):
    rates = {
        "name": "mine",
        "bandwidth": 1e12,
        "vector": 1e13,
        "matrix": {"float32": 1e13, "tf32": 1e14, "bfloat16": 2e14},
    }
    (tmp_path / "device.json").write_text(json.dumps(rates))
    assert "on mine" in command("roofline", "--measured", tmp_path / "device.json")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "must hold name"), ("[", "must hold name"), ('{"name": "x", "bandwidth": 0, "vector": 1, "matrix": '
      '{"float32": 1, "tf32": 1, "bfloat16": 1}}', "positive")],
)  # fmt: skip
def test_a_bad_file_is_refused(content, message, tmp_path):
    (tmp_path / "device.json").write_text(content)
    assert message in command("roofline", "--measured", tmp_path / "device.json", code=2)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--depth", "6"], "depth 6"), (["--ipc", "0"], "ipc must be"), (["--measured", "nowhere.json"], "nowhere.json")],
)
def test_bad_settings_are_refused(arguments, message):
    assert message in command("roofline", *arguments, code=2)[1]
