"""The table of compilers: how it is made, and that what is kept says nothing is wrong."""

import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from benchmarks import compilers as rendered
from tests import compilers, instructions
from tests.cubin import ROOT, compile_kernel
from tests.launches import Launch


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is launched is recorded through the interpreter")
def test_a_chip_is_examined_and_other_rows_stay(tmp_path):
    output = tmp_path / "compilers.json"
    other = {"triton": "0.1", "chip": 86, "workloads": "presets", "kernels": 1, "largest_shared": 2048, "limit": 101376,
             "too_large": {}, "spills": {}, "lost_constants": {}, "failed": {}}  # fmt: skip
    output.write_text(json.dumps([other]))
    arguments = ["--chip", "86", "--only", "augment 1x8x8 NCHW", "--output", str(output)]
    result = CliRunner().invoke(compilers.main, arguments)
    assert result.exit_code == 0, result.output
    kept, row = json.loads(output.read_text())
    assert kept == other
    assert (row["chip"], row["workloads"], row["kernels"]) == (86, "presets, augment 1x8x8 NCHW", 2)  # and backward
    assert not any(row[name] for name in ("too_large", "spills", "lost_constants", "failed"))
    assert f"| sm_86 (GeForce RTX 30, A10, A40) | 0.1, {row['triton']} | 3 |" in result.output


def test_what_does_not_compile_is_a_row_of_its_own(monkeypatch):
    def refuse(launch, chip, triton, brief):
        raise RuntimeError("augmentation_kernel does not compile for sm_86:\nptxas fatal: no such chip")

    monkeypatch.setattr(compilers, "compile_launch", refuse)
    chosen = [work for work in compilers.workloads(((1, 8),)) if work.name == "augment 1x8x8 NCHW"]
    row = compilers.examine(chosen, 86, None)
    assert row["kernels"] == 0
    assert row["failed"] == {
        f"augmentation_kernel (augment 1x8x8 NCHW) #{number}": "ptxas fatal: no such chip" for number in (1, 2)
    }


def test_nothing_is_wrong_in_what_was_kept():
    rows = json.loads((ROOT / "benchmarks" / "results" / "compilers.json").read_text("utf-8"))
    assert {row["chip"] for row in rows} == set(rendered.GPUS)
    for row in rows:
        wrong = [row[name] for name in ("too_large", "lost_constants", "failed") if row[name]]
        assert not wrong, (row["triton"], row["chip"])


def test_a_kernel_is_compiled_without_the_package():
    """A Triton of another version has no PyTorch beside it."""
    report = compile_kernel("probe", "probe_kernel", signature={"p_out": "*fp32"}, constants={}, capability=86)
    assert report.spills == 0 and report.widest_store == 32


def test_instructions_are_counted_from_the_machine_code():
    """The loop of a kernel runs once a round, what is around it once."""
    report = SimpleNamespace(instructions=1100, loop=700, registers=168, shared=32 << 10)
    arguments = {"BLOCK_P": 16, "BLOCK_C": 128}
    launch = Launch("folded_conv_block", "features_kernel", (2, 4), arguments, set(), {"num_warps": 4})
    values = 4 * 4 * 16 * 128  # of four rounds, each of four tiles
    assert instructions.per_value(report, launch, values) == pytest.approx((4 * 700 + 400) * 128 / values)
    assert instructions.warps(report, launch, 90) == 12  # by registers
    assert instructions.warps(report, launch, 86) == 12  # by registers and by shared memory
    loopless = SimpleNamespace(instructions=512, loop=0)
    assert instructions.per_value(loopless, launch, 8192) == 8.0


def test_no_kernel_that_walks_a_feature_map_was_kept_with_a_spill():
    rows = json.loads((ROOT / "benchmarks" / "results" / "instructions.json").read_text("utf-8"))["rows"]
    assert {row["kernels"] for row in rows} == {"measured", "successor"}
    assert not any(row["spills"] for row in rows)
