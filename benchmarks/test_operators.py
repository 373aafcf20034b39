"""Every fused operator, its eager equations and torch.compile of them, side by side, with pytest-benchmark.

    python -m pytest benchmarks/test_operators.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

On the GPU, or on the CPU where there is none, with fewer images. ``extra_info`` tells the fewest bytes a case must
move, the bytes a second that come of them, and their share of what a copy reaches in the same run. ``-k block`` and the
like choose an operator, ``--benchmark-json FILE`` keeps the figures, ``python -m benchmarks compare OLD NEW`` compares.
"""

import pytest
import torch

from .operators import cases, copy_bandwidth, prepare

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every case compiles its own function; its limit is for one function that is recompiled needlessly."""
    torch.compiler.reset()


@pytest.mark.parametrize("case", cases(DEVICE), ids=str)
def test_operator(benchmark, case):
    work = prepare(case, DEVICE)

    def run():
        work.call()
        if CUDA:
            torch.cuda.synchronize()

    shape = "x".join(map(str, case.shape))
    benchmark.group = f"{case.operator} {case.direction} {shape} {case.dtype} {case.layout}"
    benchmark.pedantic(run, rounds=20 if CUDA else 5, warmup_rounds=3)
    rate = work.bytes / benchmark.stats.stats.median
    benchmark.extra_info["implementation"] = case.implementation
    benchmark.extra_info["bytes"] = work.bytes
    benchmark.extra_info["bytes_per_second"] = rate
    benchmark.extra_info["share_of_copy"] = rate / copy_bandwidth(DEVICE)
