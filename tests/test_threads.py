"""How many threads a command starts, and how they wait."""

import json
import os
import subprocess
import sys

import pytest

from atom_fast import _threads

ASK = "import json, os; from atom_fast import _threads; _threads.choose_threads(); import torch; print(json.dumps("
ASK += "[torch.get_num_threads(), _threads.reason(), os.environ.get('GOMP_SPINCOUNT')]))"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n", "other/cpu.max": "1 100000\n"}, 3.0),
        ({"cpu/c/cpu.cfs_quota_us": "250000\n", "cpu/c/cpu.cfs_period_us": "100000\n"}, 2.5),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_is_read(files, cores, tmp_path):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(content)
    own = tmp_path / "own"
    own.write_text("4:memory:/elsewhere\n2:cpu,cpuacct:/c\n0::/a/b\n")
    assert _threads.cpu_quota(tmp_path, own) == cores


@pytest.mark.parametrize(
    ("quota", "threads", "reason"),
    [
        (None, 6, "6 cores"),
        (2.5, 2, "a container of 2.5 cores"),
        (0.5, 1, "a container of 0.5 cores"),
        (64, 6, "6 cores"),
    ],
)
def test_threads_follow_cores_and_quota(quota, threads, reason, monkeypatch):
    monkeypatch.setattr(_threads, "affinity", lambda: 6)
    monkeypatch.setattr(_threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(_threads, "_chosen", "")
    environment = {}
    monkeypatch.setattr(os, "environ", environment)
    _threads.choose_threads()
    assert environment == {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": str(_threads._SPINS)}
    assert _threads.reason() == reason


def ask(**variables):
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return json.loads(
        subprocess.run([sys.executable, "-c", ASK], env=kept | variables, capture_output=True, check=True).stdout
    )


def test_pytorch_starts_these_threads_and_the_environment_wins():
    threads, reason, _ = ask()
    assert threads >= 1 and reason.endswith("cores")
    assert ask(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="active") == [1, "OMP_NUM_THREADS=1", None]
