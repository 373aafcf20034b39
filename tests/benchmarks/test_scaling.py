"""The memory of a step grows linearly with its sizes, and not with the classes where they run in chunks of fixed size.

Bytes are counted at every operation, so that they do not depend on the machine; `python -m benchmarks scaling` times.
"""

import dataclasses

import pytest

from benchmarks import scaling
from benchmarks.live_bytes import count_peak
from benchmarks.methods import Workload, build_step

BASE = Workload(
    "atom", "fused", ipc=2, resolution=16, depth=2, width=32, real_batch=8, class_images=80, precision="float32",
    device="cpu",
)  # fmt: skip


def peak(**sizes):
    step = build_step(dataclasses.replace(BASE, **sizes))
    step()
    return count_peak(step)


@pytest.mark.parametrize(
    ("field", "sizes", "growth"),
    [("classes", (20, 40, 80), 2), ("ipc", (40, 60, 80), 1), ("resolution", (16, 32, 64), 4)],
)
def test_memory_grows_linearly(field, sizes, growth):
    """The second step in size adds as many times what the first one did as it adds images, or pixels."""
    small, middle, large = (peak(**{field: size}) for size in sizes)
    assert (large - middle) / (middle - small) == pytest.approx(growth, rel=0.05)


def test_memory_is_flat_in_the_classes_at_a_fixed_chunk():
    def beside_images(classes, **chunk):
        # All images and their gradient are held whole, and counted, since a step writes to them; so is the classifier.
        images, classifier = classes * BASE.ipc * BASE.channels * 32**2 * 4, classes * 16 * (32 // 4) ** 2 * 4
        return peak(classes=classes, resolution=32, width=16, **chunk) - 2 * images - classifier

    at_once, chunked = (beside_images(40, **chunk) for chunk in ({}, {"class_chunk": 5}))
    assert chunked < 1.1 * beside_images(5, class_chunk=5) < 0.3 * at_once


def test_with_batch_norm_one_class_of_a_hundred_at_a_time_takes_less_than_a_quarter_of_the_memory():
    sizes = {"classes": 100, "ipc": 1, "norm": "batch"}
    at_once, chunked = (
        count_peak(build_step(dataclasses.replace(BASE, **sizes, class_chunk=chunk))) for chunk in (None, 1)
    )
    assert chunked < 0.25 * at_once


@pytest.mark.parametrize("edition", scaling.EDITIONS.values(), ids=scaling.EDITIONS)
def test_every_edition_covers_the_ranges(edition):
    for field, first, last in (("classes", 10, 200), ("ipc", 1, 100), ("resolution", 32, 128)):
        for line in scaling.lines(edition, field).values():
            assert (min(line), max(line)) == (first, last)
            assert all(getattr(workload, field) == value for value, workload in line.items())
    chunked = [workload.class_chunk for workload in scaling.workloads(edition) if workload.class_chunk]
    assert chunked == [edition.chunk] * len(edition.values["classes"])
