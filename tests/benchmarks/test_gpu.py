"""The script for a GPU keeps what it has: failures, limits, signals, and its commands."""

import json
import signal

import pytest

from benchmarks import gpu
from benchmarks.__main__ import main
from tests.benchmarks.tiny import command


def test_gpu_script_keeps_going_when_a_part_fails(monkeypatch, tmp_path):
    def broken(run, limit):
        raise OSError("no")

    monkeypatch.setattr(gpu, "environment", lambda device: {"device": device})
    monkeypatch.setattr(gpu, "PARTS", {"one": (broken, 10), "two": (lambda run, limit: f"{limit:.0f} s", 20)})
    gpu.run(tmp_path / "out", 4)
    first, second = json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]
    assert "OSError: no" in first["outcome"] and second["outcome"] == "240 s", "the last one takes what is left"


@pytest.mark.parametrize(
    ("part", "last"),
    [
        ("table1", "45  to do     cifar10 ipc 50 atom seed 4 [5 convnet]"),  # three methods, three sizes, five sets
        ("study", "30  to do     cifar10 ipc 50 atom seed 2 [5 convnet] image_average=False"),  # five rows, two sizes
    ],
)
def test_gpu_script_runs_tables_where_the_images_are(monkeypatch, tmp_path, part, last):
    """Its commands are accepted, ask for the intended cells, and their results are copied if they are new."""
    listed, _ = command(*getattr(gpu, part.upper()), "--list", "--out", tmp_path)
    assert last in listed and f"{int(last[:2]) + 1}  to do" not in listed
    measure = getattr(gpu, part)
    assert "no --cifar" in measure(gpu.GpuRun(tmp_path, 0, None, []), 60)
    monkeypatch.setattr(gpu, "CELLS_FOLDER", tmp_path / "cells")
    kept = tmp_path / "cells" / f"{part}.json"
    kept.parent.mkdir()
    kept.write_text("of an earlier run")
    run = gpu.GpuRun(tmp_path, 0, tmp_path / "images", [])
    for script, outcome in (("raise SystemExit(2)", "failed (exit status 2)"), ("pass", "ok")):
        monkeypatch.setattr(gpu, "BENCHMARKS", ["-c", script])
        assert measure(run, 120).startswith(outcome) and not (tmp_path / f"{part}.json").exists()
    monkeypatch.setattr(gpu, "BENCHMARKS", ["-c", f"open({str(kept)!r}, 'w').write('new')"])
    assert measure(run, 120).startswith("ok") and (tmp_path / f"{part}.json").read_text() == "new"


def test_gpu_script_times_the_preset_best_beside_the_paper_s(monkeypatch, tmp_path):
    """The commands are accepted, each profile is read, and one that fails is named."""
    for options in (*gpu.STEPS_OF.values(), *gpu.SUCCESSORS.values()):
        main.commands["profile"].make_context("profile", [*gpu.STEP[1:], *options])
    monkeypatch.setattr(gpu, "CELLS_FOLDER", tmp_path / "cells")
    monkeypatch.setattr(gpu, "environment", lambda device: {"device": device})
    measured = {"precision": "tf32", "fusion": "fused", "step_seconds": 0.004, "captured_seconds": 0.002, "kernels": []}
    folder = tmp_path / "cells" / "steps" / "best"
    folder.mkdir(parents=True)
    script = (
        f"import sys; 'best' in sys.argv or sys.exit(2); open({str(folder / 'profile.json')!r}, 'w').write("
        f"{json.dumps(measured)!r})"
    )
    monkeypatch.setattr(gpu, "BENCHMARKS", ["-c", script])
    assert gpu.best(gpu.GpuRun(tmp_path, 0, None, []), 120) == "paper failed (exit status 2), best 2.00 ms"
    [cell] = json.loads((tmp_path / "best.json").read_text())["cells"]
    assert cell["step"] == "best" and cell["captured_seconds"] == 0.002


@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_gpu_script_measures_records_where_the_images_are(monkeypatch, tmp_path, ipc):
    part, seconds = gpu.PARTS[f"record-{ipc}"]
    assert seconds <= 240 and "no --cifar" in part(gpu.GpuRun(tmp_path, 0, None, []), 60)
    monkeypatch.setattr(gpu, "CELLS_FOLDER", tmp_path / "cells")
    folder = tmp_path / "cells" / "records" / f"cifar10-ipc{ipc}"
    folder.mkdir(parents=True)
    script = f"import json, sys; open({str(folder / f'cifar10-ipc{ipc}.json')!r}, 'w').write(json.dumps(sys.argv))"
    monkeypatch.setattr(gpu, "BENCHMARKS", ["-c", script])
    assert part(gpu.GpuRun(tmp_path, 0, tmp_path / "images", []), 120).startswith("ok")
    given = json.loads((tmp_path / f"cifar10-ipc{ipc}.json").read_text())
    options = main.commands["record"].make_context("record", given[2:]).params
    assert options["ipc"] == ipc and options["preset_name"] == "best" and options["output"] == folder
    assert options["data_dir"] == tmp_path / "images"


def test_gpu_script_ends_what_takes_too_long(tmp_path):
    run = gpu.GpuRun(tmp_path, 0, None, [])
    assert run.command(["-c", "print('first'); print('last')"], 60) == ("ok", "last")
    assert run.command(["-c", "raise SystemExit(3)"], 60)[0] == "failed (exit status 3)"
    assert run.command(["-u", "-c", "print('begun'); import time; time.sleep(60)"], 2) == (
        "stopped after 2 s",
        "begun",
    )


def test_gpu_script_lets_a_command_write_what_it_has(tmp_path):
    run = gpu.GpuRun(tmp_path, 0, None, [])
    waits = (
        "import signal, sys, time; signal.signal(signal.{}, lambda *_: sys.exit('kept')); print('ready', flush=True)"
    )
    for name in ("SIGTERM", "SIGINT"):
        outcome = run.command(["-c", waits.format(name) + "; time.sleep(60)"], 4, getattr(signal, name))
        assert outcome == ("stopped after 4 s", "kept")


def test_gpu_script_says_at_once_that_nothing_can_whiten(monkeypatch, tmp_path):
    (tmp_path / "train").mkdir()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs kornia"):
        gpu.run(tmp_path / "out", cifar=tmp_path)
    assert not (tmp_path / "out").exists()
