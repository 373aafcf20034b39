"""Rates of devices: from datasheets, from a file, or measured."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from atom_fast._device import NARROW, convolution_precision

PRECISIONS = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}  # bytes of an activation


@dataclasses.dataclass(frozen=True)
class Device:
    """Highest rates of a device.

    Attributes:
        name: name for tables.
        bandwidth: bytes per second, read and written.
        vector: float32 operations per second outside the matrix units.
        matrix: operations per second of a matrix product, by precision.
    """

    name: str
    bandwidth: float
    vector: float
    matrix: dict[str, float]


def _rates(float32: float, tf32: float, half: float) -> dict[str, float]:
    """Return rates by precision; both types of 16 bits have one."""
    return {"float32": float32, "tf32": tf32, "float16": half, "bfloat16": half}


# Vendor's datasheets, dense products: H100 SXM 80 GB, A100 SXM 80 GB.
DEVICES = {
    "H100": Device("H100", 3.35e12, 67e12, _rates(67e12, 494.7e12, 989.4e12)),
    "A100": Device("A100", 2.039e12, 19.5e12, _rates(19.5e12, 156e12, 312e12)),
}


def read_device(path: Path) -> Device:
    """Read a device from JSON with ``name``, ``bandwidth`` (bytes/s), ``vector`` and ``matrix`` (operations/s).

    Raises:
        ValueError: a value is missing or not a positive number.
    """
    try:
        values = json.loads(path.read_text())
        matrix = {"float16": values["matrix"]["bfloat16"], **values["matrix"]}  # tensor cores have one rate for both
        device = Device(
            str(values["name"]),
            float(values["bandwidth"]),
            float(values["vector"]),
            {precision: float(matrix[precision]) for precision in PRECISIONS},
        )
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold name, bandwidth, vector and matrix.{{{', '.join(PRECISIONS)}}} as JSON; got {error!r}"
        ) from error
    rates = [device.bandwidth, device.vector, *device.matrix.values()]
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError(f"{path}: rates must be positive numbers; got {rates}")
    return device


def measure_device(device: torch.device) -> Device:
    """Measure a device's rates by a short copy and short products, in about a second.

    Arithmetic outside the matrix units is taken to be as fast as the product in float32, which does not use them.
    """
    source = torch.ones(1 << 26, device=device)  # 268 MB: beyond every cache
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * source.element_size() / _least_seconds(lambda: target.copy_(source), device)
    matrix = {precision: _product_rate(device, precision) for precision in ("float32", *NARROW)}
    matrix["tf32"] = _product_rate(device, "tf32") if device.type == "cuda" else matrix["float32"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {_threads()}"
    return Device(name, bandwidth, matrix["float32"], matrix)


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def _product_rate(device: torch.device, precision: str) -> float:
    """Return operations per second of a convolution like the network's: 128 to 128 channels, 3x3."""
    images, size = (512, 32) if device.type == "cuda" else (16, 16)
    x = torch.ones(images, 128, size, size, device=device).to(memory_format=torch.channels_last)
    weight = torch.ones(128, 128, 3, 3, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad(), convolution_precision(precision, device):
        if precision in NARROW:
            x, weight = x.to(NARROW[precision]), weight.to(NARROW[precision])
        seconds = _least_seconds(lambda: torch.nn.functional.conv2d(x, weight, padding=1), device)
    return 2.0 * 9 * 128 * x.numel() / seconds


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of several timings, at least three and a fifth of a second in all, after one warm-up."""
    timings = []
    while len(timings) < 4 or sum(timings[1:]) < 0.2:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        timings.append(time.perf_counter() - started)
    return min(timings[1:])
