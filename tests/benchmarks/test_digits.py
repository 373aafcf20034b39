"""The comparison on digits is of one and the same set."""

import json

import pytest

from tests.benchmarks.tiny import command


def test_digits_distils_the_same_set_as_the_plain_loop(tmp_path):
    printed, _ = command("digits", "--steps", 10, "--out", tmp_path / "digits.json")
    record = json.loads((tmp_path / "digits.json").read_text())
    assert record["distance"] < 1e-3
    assert record["ratio"] == pytest.approx(sum(record["plain"]["turns"]) / sum(record["fused"]["turns"]))
    assert f"{record['ratio']:.2f} times faster" in printed
    _, error = command("digits", "--steps", 15, code=2)
    assert "steps must be a multiple of 10; got 15" in error
