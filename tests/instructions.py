"""Count the instructions of kernels from their machine code, without a GPU, for kernels and their successors.

    python -m tests.instructions

Writes ``benchmarks/results/instructions.json``. A value is one element of the feature map that a kernel computes or
reads. A thread executes the instructions of its longest loop once for the values of a round, and the others once for
all of its values; instructions that a branch skips are counted too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")  # launches are recorded through the interpreter

import click
import torch
from tqdm import tqdm

from benchmarks.harness import save_results
from tests.cubin import ROOT, CubinReport
from tests.launches import Launch, compile_launch
from tests.workloads import launches, workloads

RESULTS = ROOT / "benchmarks" / "results" / "instructions.json"
CHIPS = (90,)
CHANNELS, SIDE = 128, 32  # of the CIFAR-10 ConvNet's first block
# Kernels that walk a feature map: what they compute, and the constants whose product is a round of the loop; 4 is a
# quad of positions.
KERNELS = {
    "conv_block_forward_kernel": ("first block, forward", ("BLOCK_P", "BLOCK_C", 4)),
    "features_kernel": ("first block, forward", ("BLOCK_P", "BLOCK_C", 4)),
    "conv_block_sums_kernel": ("first block, backward", ("BLOCK_P", "BLOCK_C", 4)),
    "conv_block_columns_kernel": ("first block, backward", ("BLOCK_P", "BLOCK_C", 4)),
    "gradients_kernel": ("first block, backward", ("BLOCK_P", "BLOCK_C", 4)),
    "norm_block_forward_kernel": ("other blocks, forward", ("BLOCK_P", "BLOCK_C", 4)),
    "apply_kernel": ("other blocks, forward", ("BLOCK_Q", "BLOCK_C", 4)),
    "norm_block_backward_kernel": ("other blocks, backward", ("BLOCK_P", "BLOCK_C", 4)),
    "gradient_kernel": ("other blocks, backward", ("BLOCK_Q", "BLOCK_C", 4)),
    "attention_forward_kernel": ("attention maps, forward", ("BLOCK_P", "BLOCK_C")),
    "attention_sums_kernel": ("attention maps, forward", ("BLOCK_ROWS", "BLOCK_COLUMNS")),
    "attention_backward_kernel": ("attention maps, backward", ("BLOCK_P", "BLOCK_C")),
    "attention_gradient_kernel": ("attention maps, backward", ("BLOCK_ROWS", "BLOCK_COLUMNS")),
}
WORKLOADS = (
    *(f"distill 3x32x32 {precision} instance" for precision in ("tf32", "float16")),
    *(f"loss 32x32 {dtype} {layout}" for dtype in ("float32", "bfloat16") for layout in ("NCHW", "channels_last")),
)
REGISTERS = 65536  # of a multiprocessor
WARPS = {86: 48, 90: 64}  # that a multiprocessor holds
SHARED = {86: 100 << 10, 90: 228 << 10}  # bytes of a multiprocessor
RESERVED = 1024  # bytes of shared memory of a program that the system uses


def rows(chip: int) -> Iterator[dict]:
    """Yield a row for each kernel that walks a feature map, of those that were measured and of their successors."""
    seen = set()
    for work in workloads(((3, SIDE),)):
        name = work.name.removesuffix(" successor")
        if name not in WORKLOADS:
            continue
        for launch in launches(work, chip):
            row = _row(launch, name, chip) if launch.kernel in KERNELS else None
            key = row and (row["kernel"], name, row["size"], row["instructions"])
            if row and key not in seen:
                seen.add(key)
                yield {"kernels": "measured" if name == work.name else "successor", **row}


def _row(launch: Launch, workload: str, chip: int) -> dict | None:
    """Return the row of a launch; None for a second pair of powers."""
    if any(isinstance(value, float) for name, value in launch.arguments.items() if name in launch.constants):
        return None
    report = compile_launch(launch, chip)
    height, width = (launch.arguments.get(name, SIDE) for name in ("H", "W"))
    batch = next(value for value in launch.arguments.values() if isinstance(value, torch.Tensor)).shape[0]
    values = batch * CHANNELS * height * width / math.prod(launch.grid)
    return {
        "work": KERNELS[launch.kernel][0],
        "kernel": launch.kernel,
        "workload": workload,
        "chip": chip,
        "size": f"{height}x{width}",
        "values": values,
        "instructions": report.instructions,
        "loop": report.loop,
        "per_value": round(per_value(report, launch, values), 2),
        "registers": report.registers,
        "shared": report.shared,
        "warps": warps(report, launch, chip),
        "spills": report.spills,
    }


def threads(launch: Launch) -> int:
    """Return the threads of a program."""
    return 32 * launch.options.get("num_warps", 4)


def round_values(launch: Launch) -> int:
    """Return the values of a round of a kernel's loop."""
    return math.prod(launch.arguments.get(factor, factor) for factor in KERNELS[launch.kernel][1])


def per_value(report: CubinReport, launch: Launch, values: float) -> float:
    """Return the instructions of a value, ``values`` of which a program computes."""
    rounds = values / round_values(launch) if report.loop else 0
    return (report.loop * rounds + report.instructions - report.loop) * threads(launch) / values


def warps(report: CubinReport, launch: Launch, chip: int) -> int:
    """Return how many warps of a kernel a multiprocessor holds at once."""
    own = threads(launch) // 32
    of_registers = REGISTERS // (-(-report.registers * 32 // 256) * 256)  # a warp's registers come in units of 256
    programs = min(of_registers // own, WARPS[chip] // own, SHARED[chip] // (report.shared + RESERVED))
    return programs * own


@click.command()
@click.option("--output", type=click.Path(), default=RESULTS, show_default=True, help="JSON file")
def main(output):
    """Compile the kernels that walk feature maps, and count their instructions per value."""
    import triton

    found = [row for chip in CHIPS for row in tqdm(rows(chip), desc=f"sm_{chip}", unit="kernel")]
    save_results(output, {"triton": triton.__version__, "rows": found})


if __name__ == "__main__":
    main()
