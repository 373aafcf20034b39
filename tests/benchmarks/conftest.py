import pytest

from benchmarks import harness, report, table3, timings
from benchmarks.methods import TIMED
from tests.benchmarks.tiny import run, small


@pytest.fixture(scope="package")
def table4(tmp_path_factory):
    """The folder and the record of a small Table 4; tests that change it copy it."""
    output = tmp_path_factory.mktemp("table4")
    return output, run(small("table4"), output)[0]


@pytest.fixture
def edition(monkeypatch):
    """Replace measurements by fixed figures; return how often each cell was measured."""
    counts = {}

    def run_cell(workload, timing):
        key = workload.method, workload.implementation
        counts[key] = counts.get(key, 0) + 1
        if workload.method == "mtt":
            return {"status": "OOM", "message": "", "cell_seconds": 0}
        seconds = [0.1 / (1 + TIMED[workload.method].implementations.index(workload.implementation))] * 3
        memory = {"counted": "", "peak_allocated": 10**7 * len(workload.implementation)}
        return {"status": "ok", "time": harness.summary(seconds), "memory": memory, "seconds": seconds}

    monkeypatch.setattr(timings, "run_cell", run_cell)
    return counts


@pytest.fixture
def measured(edition, tmp_path):
    """A folder with results of Table 3's CPU edition beside pages with every mark."""
    table3.run("cpu", tmp_path / "results")
    write_pages(tmp_path)
    return tmp_path


def write_pages(root):
    (root / "docs").mkdir(exist_ok=True)
    for page, sections in report.pages(root / "results").items():
        marks = "\n".join(f"<!-- {name}:start -->\nold\n<!-- {name}:end -->" for name in sections)
        (root / page).write_text(f"before\n{marks}\nafter\n")
