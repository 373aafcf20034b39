"""Small workloads on a CPU."""

import dataclasses

from benchmarks.methods import Workload

SMALL = Workload(
    "atom", "eager", ipc=2, classes=3, resolution=16, class_images=12, real_batch=4, width=8, precision="float32",
    device="cpu", inner_divisor=10,
)  # fmt: skip


def small(method, implementation="eager", **changes):
    return dataclasses.replace(SMALL, method=method, implementation=implementation, **changes)
