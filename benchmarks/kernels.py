"""Every fused operator against the bandwidth of a copy, on a GPU.

The cases come from ``operators.py``, forward and backward, eager, fused, and fused with the kernels that are to follow.
The figure that matters is their bytes per second as a share of a device-to-device copy's in the same run: an operator
near 100 % cannot get faster without moving fewer bytes. Each call is captured as a CUDA graph, as in a captured step,
so that the host's launch does not count.
Times are medians with quantiles of ``triton.testing.do_bench``, which empties the cache between calls.
``pytest benchmarks/test_operators.py`` times the same cases, and torch.compile, on a CPU too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from .harness import environment, save_results
from .operators import Case, cases, copy_bandwidth, prepare

QUANTILES = (0.5, 0.2, 0.8)


def run(out: Path, operators: Sequence[str] | None = None) -> None:
    """Measure every case, print a line each, and keep them in a JSON file.

    Args:
        out: JSON file.
        operators: keys of ``OPERATORS``; None: all.

    Raises:
        RuntimeError: there is no CUDA GPU.
    """
    record = {"environment": environment("cuda")}
    copy = copy_bandwidth("cuda")
    record |= {"copy": {"bytes_per_second": copy}, "cases": []}
    print(f"copy: {copy / 1e12:.2f} TB/s")
    for case in cases("cuda", operators, ("eager", "fused", "successor")):
        if case.direction == "both":
            continue
        result = measure(case)
        result["share_of_copy"] = result["bytes_per_second"] / copy
        record["cases"].append(result)
        save_results(out, record)
        print(
            f"{case.operator:13} {case.direction:8} {case.implementation:9} {case.shape!s:22} {case.dtype:9} "
            f"{case.layout:13} {result['milliseconds'] * 1e3:9.1f} us {100 * result['share_of_copy']:5.1f} % of copy"
        )


def measure(case: Case) -> dict:
    """Return a case with the median and quantiles of its milliseconds, and its bytes per second."""
    import triton.testing

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # autograd runs a backward pass on the stream of its forward pass
        work = prepare(case, "cuda")
        for _ in range(2):  # compiles, and allocates the workspaces of libraries
            work.call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _outputs = work.call()  # must live as long as the graph that writes them
    median, low, high = triton.testing.do_bench(graph.replay, warmup=10, rep=40, quantiles=list(QUANTILES))
    return dataclasses.asdict(case) | {
        "bytes": work.bytes,
        "milliseconds": median,
        "quantile_20": low,
        "quantile_80": high,
        "bytes_per_second": work.bytes / (median / 1e3),
    }
