"""The comparison on digits is of one and the same set."""

import json

import pytest

from benchmarks import digits


def test_digits_distils_the_same_set_as_the_plain_loop(tmp_path, capsys):
    digits.main(["--steps", "10", "--out", str(tmp_path / "digits.json")])
    record = json.loads((tmp_path / "digits.json").read_text())
    assert record["distance"] < 1e-3
    assert record["ratio"] == pytest.approx(sum(record["plain"]["turns"]) / sum(record["fused"]["turns"]))
    assert f"{record['ratio']:.2f} times faster" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        digits.main(["--steps", "15"])
