"""Pages and pictures show what was measured, and the check sees a difference."""

import json
import re
import shutil

import pytest

from benchmarks import compare, harness, operators, plots, report, scaling, table3
from benchmarks.methods import TIMED
from benchmarks.pages import readme, results
from benchmarks.pages.benchmarks import table3_markdown


def test_pages_show_what_was_measured(measured):
    folder, page = measured / "results", measured / "docs" / "benchmarks.md"
    sections = sum(map(len, report.pages(folder).values()))
    assert len(report.refresh(folder, measured, check=True)) == sections
    assert "old" in page.read_text()
    report.refresh(folder, measured)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "GPU edition" not in text and "no figure yet" not in text
    assert "| ATOM | `eager` | 100 | 100 |" in text and "`fused` | 20 (5×)" in text
    assert "| MTT | `eager` | OOM | OOM |" in text
    readme_text = (measured / "README.md").read_text()
    assert all(f"\n| {method.title} " in readme_text for method in TIMED.values())
    assert re.search(r"\| ATOM +\| 100 +\| 33.3 +\| 20 +\|", readme_text)
    assert report.refresh(folder, measured, check=True) == []


def test_what_was_not_measured_is_not_shown(edition, tmp_path):
    path = table3.run("cpu", tmp_path, methods=["atom", "mtt"], implementations=["eager", "fused"], ipcs=[1])
    text = table3_markdown([path])
    assert "| ATOM | `eager` | 100 |\n" in text and "| MTT | `eager` | OOM |\n" in text, "a column of one size"
    assert "DSA" not in text.split("| Method |", 1)[1] and "eager-batched" not in text
    table3.run("cpu", tmp_path, methods=["atom"], implementations=["eager"], ipcs=[10])
    assert "| ATOM | `eager` | 100 | 100 |" in table3_markdown([path])
    assert "| `fused` | 20 (5×) | – |" in table3_markdown([path])
    assert "–: no figure yet." in table3_markdown([path])
    path = table3.run("cpu", tmp_path)
    assert "no figure yet" not in table3_markdown([path])


def test_scaling_is_drawn(edition, tmp_path):
    path = scaling.run("cpu", tmp_path)
    assert sum(edition.values()) == len(scaling.workloads(scaling.EDITIONS["cpu"])) == 3 * 5 + 2 * (4 + 3 - 2)
    plots.plot_scaling(tmp_path / "scaling.png", "cpu", [path])
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_shares_of_bandwidth_are_drawn_and_their_picture_is_checked(measured):
    folder, picture = measured / "results", measured / "docs" / "figures" / "bandwidth.png"
    same = {"layout": "nchw", "shape": [1280, 128, 32, 32], "milliseconds": 0.3}
    cases = [
        same | {"operator": name, "direction": way, "dtype": dtype, "implementation": by, "share_of_copy": share}
        for name in operators.OPERATORS
        for way in ("forward", "backward")
        for dtype in ("float32", "bfloat16")
        for by, share in (("eager", 0.1), ("fused", 0.9))
    ]
    record = {"environment": {"device": "NVIDIA H100 80GB HBM3"}, "cases": cases}
    kept = folder / "kernels-gpu.json"
    kept.write_text(json.dumps(record))
    report.refresh(folder, measured)
    assert picture.stat().st_size > 10_000 and "| 90 %" in (measured / "docs" / "performance.md").read_text()
    assert report.refresh(folder, measured, check=True) == []
    newer = {**record, "cases": [{**cases[-1], "share_of_copy": 0.5}]}
    (folder / "kernels-gpu-block.json").write_text(json.dumps(newer))
    assert any("bandwidth.png" in sentence for sentence in report.refresh(folder, measured, check=True))
    kept.write_text("{}")
    with pytest.raises(ValueError, match="kernels-gpu.json is not a file of"):
        report.refresh(folder, measured, check=True)


def test_the_projects_own_pages_show_the_figures_kept_with_it():
    root = harness.ROOT
    assert report.refresh(root / "benchmarks" / "results", root, check=True) == []


def test_every_results_file_is_shown():
    kept = harness.ROOT / "benchmarks" / "results"
    shown = (harness.ROOT / "docs" / "results.md").read_text()
    for path in (kept / "accuracy").glob("*.json"):
        name = path.stem
        together = json.loads(path.read_text("utf-8"))["target"] == "additions"
        assert f"<!-- {name}:start -->" in shown or together or name in (results.TABLE1, *results.UNSHOWN)
        assert re.search(rf"^python -m benchmarks .*# .*\b{name}\b|^(- |  ).*`{name}`", shown, re.M), name


def test_ratios_to_eager_stand_beside_ratios_to_compile():
    """No ratio spans two runs."""
    kept = harness.ROOT / "benchmarks" / "results"
    files = [kept / "table3-gpu.json", kept / "table3-gpu-implementations.json"]
    text = readme.steps(files, kept / "accuracy" / f"{results.TABLE1}.json")
    assert "over eager" in text and "over `torch.compile`" in text and "CUDA graph" in text
    assert "| 35.8 " in text and "2.2×" in text and "over that run's eager step of 46.8 ms" in text, "two runs"
    text = readme.steps(files[1:], kept / "accuracy" / f"{results.TABLE1}.json")
    assert "that run's" not in text and "| 35.8 " in text, "one run"


def test_table_1_has_the_papers_figures_beside_ours(measured):
    kept = harness.ROOT / "benchmarks" / "results" / "accuracy" / f"{results.TABLE1}.json"
    copy = measured / "results" / "accuracy" / kept.name
    copy.parent.mkdir()
    shutil.copy(kept, copy)
    report.refresh(measured / "results", measured)
    text = (measured / "docs" / "results.md").read_text()
    assert "| ATOM " in text and "points below the paper" in text and "ATOM less DAM" in text and "Herding" not in text
    assert "seconds on an NVIDIA" in (measured / "README.md").read_text()
    copy.write_text("{}")
    with pytest.raises(ValueError, match="cifar10-table1"):
        report.refresh(measured / "results", measured)


def test_an_implementation_that_is_no_more_is_left_out(measured):
    path = table3.results_path(measured / "results", "cpu")
    content = json.loads(path.read_text())
    shown = table3_markdown([path])
    for cell in list(content["cells"]):
        if cell["workload"]["implementation"] == "fused":
            content["cells"].append({**cell, "workload": {**cell["workload"], "implementation": "fused-before"}})
    path.write_text(json.dumps(content))
    assert table3_markdown([path]) == shown
    plots.plot_table3(measured / "table3.png", "cpu", [path])
    assert (measured / "table3.png").stat().st_size > 10_000
    assert compare.compare(path, path, 0.15) == []


def test_check_sees_a_figure_changed_by_hand(measured):
    page = measured / "docs" / "benchmarks.md"
    report.refresh(measured / "results", measured)
    page.write_text(page.read_text().replace("20 (5×)", "5 (20×)"))
    assert report.refresh(measured / "results", measured, check=True)


def test_a_page_without_marks_is_refused(measured):
    (measured / "docs" / "benchmarks.md").write_text("nothing")
    with pytest.raises(ValueError, match="table3-gpu:start"):
        report.refresh(measured / "results", measured)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report.refresh(measured / "nowhere", measured)
