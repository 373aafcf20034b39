"""Every fused operator against the bandwidth of a copy, on a GPU: ``python -m benchmarks.kernels --out FILE.json``.

The cases are those of ``benchmarks/operators.py``, forward and backward, fused and eager. Their bytes a second as a
share of what a device-to-device copy reaches in the same run is the figure that matters; an operator near 100 % cannot
get faster without moving less. Each call is captured as a CUDA graph, as in a captured step: what the host takes to
start a small operator does not count. Times are medians with quantiles of ``triton.testing.do_bench``, which empties
the cache between calls. ``pytest benchmarks/test_operators.py`` times the same cases, and torch.compile, on a CPU too.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from .harness import environment, save_results
from .operators import OPERATORS, Case, cases, copy_bandwidth, prepare

QUANTILES = (0.5, 0.2, 0.8)


def main(arguments: list[str] | None = None) -> None:
    """Measure every case, print a line each, and keep them all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--operator", choices=OPERATORS, help="only this one")
    options = parser.parse_args(arguments)
    copy = {"bytes_per_second": copy_bandwidth("cuda")}
    record = {"environment": environment("cuda"), "copy": copy, "cases": []}
    print(f"copy: {copy['bytes_per_second'] / 1e12:.2f} TB/s")
    for case in cases("cuda", [options.operator] if options.operator else None, ("eager", "fused")):
        if case.direction == "both":
            continue
        result = measure(case)
        result["share_of_copy"] = result["bytes_per_second"] / copy["bytes_per_second"]
        record["cases"].append(result)
        save_results(options.out, record)
        print(
            f"{case.operator:13} {case.direction:8} {case.implementation:6} {case.shape!s:22} {case.dtype:9} "
            f"{case.layout:13} {result['milliseconds'] * 1e3:9.1f} us {100 * result['share_of_copy']:5.1f} % of copy"
        )


def measure(case: Case) -> dict:
    """Median and quantiles of one case, in milliseconds, and its bytes per second."""
    import triton.testing

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # autograd runs a backward pass on the stream of its forward pass
        work = prepare(case, "cuda")
        for _ in range(2):  # compilation, and workspaces of libraries
            work.call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _outputs = work.call()  # live as long as what writes them
    median, low, high = triton.testing.do_bench(graph.replay, warmup=10, rep=40, quantiles=list(QUANTILES))
    return dataclasses.asdict(case) | {
        "bytes": work.bytes,
        "milliseconds": median,
        "quantile_20": low,
        "quantile_80": high,
        "bytes_per_second": work.bytes / (median / 1e3),
    }


if __name__ == "__main__":
    main()
