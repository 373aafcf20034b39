"""Records as Markdown: ours beside the paper's, what is missing, and the page of results."""

import re
import shutil

import pytest

from benchmarks.accuracy import TARGETS, plan
from benchmarks.accuracy.record import _paired, collect
from benchmarks.accuracy.render import Record, accuracy, read, render
from benchmarks.methods import MAKES_SETS
from benchmarks.pages import results as page


def shown(record):
    return render(Record(record))


def test_rows_are_compared_set_by_set():
    base = {"seeds": [0, 1, 2], "accuracies": [[10.0, 20.0], [30.0], [None]]}
    other = {"seeds": [1, 0, 3], "accuracies": [[34.0], [15.0, None], [99.0]]}
    mean, error = _paired(other, base)
    assert (mean, error) == (2.0, pytest.approx(2.0)), "of seeds 0 and 1, by 0 and 4"
    assert _paired({"seeds": [1], "accuracies": [[31.0]]}, base) == [1.0, None]
    assert _paired(other, None) is None and _paired({"seeds": [9], "accuracies": [[1.0]]}, base) is None


def test_what_is_not_measured_is_not_filled_in(tmp_path):
    record = collect(plan("table1", [("cifar10", 1)], ["atom"]), tmp_path)
    rows = {row["title"]: row["entries"]["cifar10:1"] for row in record["sections"][0]["rows"]}
    assert rows["ATOM"]["ours"] is None and rows["ATOM"]["difference"] is None and not rows["ATOM"]["cited"]
    assert rows["DC"]["cited"] and rows["DC"]["paper"] == [28.3, 0.5]
    text = render(Record(record))
    assert "not measured" in text and "(cited)" in text and "the size of the paper" in text
    assert set(MAKES_SETS) >= set(TARGETS["table1"].methods)
    assert rows["ATOM"]["source"] == "" and "(Table 1)" not in text
    text = shown(collect(plan("table4", [("cifar10", 10)], ["atom"]), tmp_path))
    rows = dict(re.findall(r"^\| (MMD[^|]*?) +\| ([^|]*?) +\|", text, flags=re.MULTILINE))
    assert rows["MMD"] == "(cited)" and rows["MMD + feature map"] == "–", "the paper has no figure for the latter"


def test_figures_of_another_table_are_marked_with_it(tmp_path):
    """The paper's Table 4 has one cell; what stands beside others is from its Table 1."""
    cells = [("cifar10", 50), ("cifar10", 1)]
    record = collect(plan("table4", cells, ["atom"]), tmp_path)
    rows = {row["title"]: row["entries"] for row in record["sections"][0]["rows"]}
    atom, random = rows["MMD + spatial + channel"], rows["Random"]
    assert [atom[cell]["source"] for cell in ("cifar10:50", "cifar10:1")] == ["", "Table 1"]
    assert [random[cell]["source"] for cell in ("cifar10:50", "cifar10:1")] == ["Table 1", "Table 1"]
    both = render(Record(record))
    assert "(paper: 68.8 ± 0.5)" in both and "(paper, Table 1: 34.8 ± 1.0)" in both
    assert "14.4 ± 2.0 (cited, Table 1)" in both
    alone = shown(collect(plan("table4", cells[1:], ["atom"]), tmp_path))
    assert "| 34.8 ± 1.0 (Table 1) |" in alone and "| 32.0 ± 1.2 (Table 1) |" in alone
    study = shown(collect(plan("study", cells[1:], factors=["pooling"]), tmp_path))
    assert "| 34.8 ± 1.0 (Table 1) |" in study


def test_a_table_is_shown_as_it_was_measured(tmp_path, table4):
    kept = tmp_path / "digits-table4.json"
    shutil.copy(table4[0] / "table4.json", kept)
    record, shown = read(kept), page.sections(tmp_path)["digits-table4"]
    assert shown in render(record) or "not measured" not in render(record)
    for column in record.columns:
        for row in record.rows(column):
            assert f"| {row.title} " in shown and accuracy(row) in shown
    assert "(paper: " in shown and "Measured on a CPU" in shown
    kept.write_text("{}")
    with pytest.raises(ValueError, match="digits-table4"):
        page.sections(tmp_path)


def test_every_reduction_is_a_figure_beside_the_paper_s(tmp_path):
    """The words that a reader sees for fields of a record."""
    record = collect(plan("table5", [("digits", 10)], seeds=1), tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    text = render(Record(record)).replace("\n", " ")
    assert "1 set per cell (paper: 5); 2 networks per set (paper: 20)" in text
    assert "200 iterations (paper: 8,000; DM 20,000); 64 real images per class per step (paper: 128; DM 256)" in text
    assert "evaluation schedule digits" in text and "Measured" not in text
