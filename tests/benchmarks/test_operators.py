"""Implementations timed as one operator give the same results and gradients; their bytes are counted."""

import dataclasses

import pytest
import torch

from benchmarks import compare
from benchmarks.operators import DIRECTIONS, IMPLEMENTATIONS, LAYOUTS, OPERATORS, Case, cases, copy_bandwidth, prepare

SMALL = {
    "attention": (10, 128, 8, 8),
    "norm_block": (10, 128, 8, 8),
    "conv_block": (10, 3, 8, 8),
    "instance_norm": (10, 128, 8, 8),
    "batch_norm": (10, 128, 8, 8),
    "augment": (20, 3, 8, 8),
    "decode": (5, 3, 8, 8),
    "matching": (20, 64),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_implementations_compute_the_same(operator, layout, device):
    outcomes = {}
    shape = SMALL[operator]
    case = Case(operator, shape, "float32", layout if len(shape) == 4 else "rows", "eager", "forward")
    for implementation in ("eager", "fused", "successor"):
        parts = [
            prepare(dataclasses.replace(case, implementation=implementation, direction=direction), device.type).call()
            for direction in DIRECTIONS
        ]
        outcomes[implementation] = [tensor for part in parts for tensor in part]
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if device.type == "cpu" else {"rtol": 2e-2, "atol": 2e-2}  # TF32
    for implementation in ("fused", "successor"):
        for eager, fused in zip(outcomes["eager"], outcomes[implementation], strict=True):
            torch.testing.assert_close(fused, eager, **tolerance)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_operator_is_timed_by_every_implementation_in_every_direction(device_type):
    everything = cases(device_type)
    assert len(set(map(str, everything))) == len(everything)
    for operator in OPERATORS:
        some = [case for case in everything if case.operator == operator]
        assert {case.implementation for case in some} == set(IMPLEMENTATIONS)
        assert {case.direction for case in some} == set(DIRECTIONS)
        assert {case.layout for case in some} in ({"rows"}, set(LAYOUTS))
    sides = {case.shape[2] for case in everything if case.operator == "norm_block"}
    assert sides == {64, 32, 16, 8}  # every layer at Tiny ImageNet, and those of CIFAR among them


def test_bytes_are_counted_from_the_tensors(device):
    case = Case("attention", (2, 4, 8, 8), "float32", "nchw", "eager", "forward")
    features, maps = 4 * 2 * 4 * 8 * 8, 4 * 2 * (8 * 8 + 4)
    expected = {"forward": features + maps, "backward": 2 * features + maps, "both": 3 * features + 2 * maps}
    for direction, count in expected.items():
        assert prepare(dataclasses.replace(case, direction=direction), device.type).bytes == count
    assert copy_bandwidth("cpu") > 1e8


def test_two_runs_of_pytest_benchmark_are_compared_by_ratio(tmp_path):
    def benchmark(implementation, median):
        info = {"implementation": implementation}
        return {
            "fullname": "test",
            "params": {},
            "group": "norm_block",
            "extra_info": info,
            "stats": {"median": median},
        }

    for name, fused in (("old", 0.5), ("new", 0.9)):
        benchmarks = [benchmark("eager", 1.0), benchmark("fused", fused)]
        (tmp_path / name).write_text(compare.json.dumps({"benchmarks": benchmarks}))
    [message] = compare.compare(tmp_path / "old", tmp_path / "new", 0.15)
    assert "block fused: 0.5 of eager's time before, 0.9 now" in message
