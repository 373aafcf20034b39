"""Operations and fewest bytes of one step of Algorithm 1, and the rates of devices.

A stage takes at least the longer of its operations at the device's rate and its bytes at the device's bandwidth.
Three ways of running it are counted: *eager*, with the passes over memory that plain PyTorch makes; *fused*, with those
of this package's operators; *floor*, with every input of the stage read once and every output written once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from atom_fast._device import convolution_precision

WAYS = ("eager", "fused", "floor")
PRECISIONS = {"float32": 4, "tf32": 4, "bfloat16": 2}  # bytes of an activation
WIDE = 4  # bytes of maps, statistics and images
ON_CHIP = 1024  # positions of a plane up to which the kernels read memory once: registers, or a second time the cache

# Reads and writes of a whole feature map by the kernels that PyTorch launches. Forward: moments 1, normalisation 2,
# ReLU 2, pooling 1; for each map |f| 2, power 2, sum 1. Backward: pooling 1, ReLU 3, sums of the norm 2, gradient 3;
# for each map the power's derivative 2, its product with the incoming gradient 2, the sign 2 and its product 3, the
# addition to the other gradients 3. The bias of a convolution is a pass of 2 over its output.
EAGER_FORWARD, EAGER_FORWARD_MAP = 6, 5
EAGER_BACKWARD, EAGER_BACKWARD_MAP = 9, 12
EAGER_BIAS = 2

# Arithmetic of a block on each value, without the convolution: statistics, normalisation, ReLU, pooling, and two powers
# with their sums; counted in the compiled kernels.
FORWARD_OPERATIONS, BACKWARD_OPERATIONS = 16, 19


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device can do at most.

    Attributes:
        name: for the table.
        bandwidth: bytes a second, read and written.
        vector: float32 operations a second outside the matrix units.
        matrix: operations a second of a product, by precision.
    """

    name: str
    bandwidth: float
    vector: float
    matrix: dict[str, float]


# Vendor's datasheets, dense products: H100 SXM 80 GB, A100 SXM 80 GB.
DEVICES = {
    "H100": Device("H100", 3.35e12, 67e12, {"float32": 67e12, "tf32": 494.7e12, "bfloat16": 989.4e12}),
    "A100": Device("A100", 2.039e12, 19.5e12, {"float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12}),
}


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What is distilled, and how.

    Attributes:
        classes, channels, height, width: of the data set.
        ipc: synthetic images a class; real_batch: real images a class a step.
        network_width, depth: of the ConvNet.
        precision: of the convolutions: "float32", "tf32" or "bfloat16".
        maps: attention is matched, by either map or both; both are counted.
        whitened: each batch of real images is whitened as it is fetched.
    """

    classes: int
    channels: int
    height: int
    width: int
    ipc: int = 50
    real_batch: int = 128
    network_width: int = 128
    depth: int = 3
    precision: str = "tf32"
    maps: bool = True
    whitened: bool = False

    def __post_init__(self):
        smallest = 2**self.depth
        if min(self.height, self.width) < smallest:
            raise ValueError(
                f"depth {self.depth} halves the image {self.depth} times and needs {smallest} pixels; "
                f"got {self.height}x{self.width}"
            )
        for field in ("classes", "channels", "ipc", "real_batch", "network_width", "depth"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1; got {getattr(self, field)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}")

    @property
    def item(self) -> int:
        """Bytes of an activation."""
        return PRECISIONS[self.precision]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Work of one stage.

    Attributes:
        part: the stage of `atom_fast.distillation.stages.STAGES` that it is part of.
        matrix, vector: operations in products and outside them.
        bytes: by way, in the order of ``WAYS``.
        fused_matrix: operations in products with recomputation, where fusing recomputes.
    """

    name: str
    part: str
    matrix: float
    vector: float
    bytes: tuple[float, float, float]
    fused_matrix: float | None = None

    def seconds(self, way: str, device: Device, precision: str) -> float:
        """The least time the stage takes: the longer of arithmetic and memory."""
        matrix = self.fused_matrix if way == "fused" and self.fused_matrix is not None else self.matrix
        arithmetic = max(matrix / device.matrix[precision], self.vector / device.vector)
        return max(arithmetic, self.bytes[WAYS.index(way)] / device.bandwidth)


def norm_block_bytes(
    batch: int, channels: int, height: int, width: int, item: int, maps: bool, backward: bool
) -> float:
    """Fewest bytes of a block given the convolution's output: each input once, each output once.

    Forward: read the output; write the pooled features, the maps and two statistics a plane. Backward: read the output,
    the gradients of the pooled features and of the maps, the maps and the statistics; write the gradient.
    """
    values = batch * channels * height * width * item
    pooled = batch * channels * (height // 2) * (width // 2) * item
    small = 2 * batch * channels * WIDE
    taken = batch * (height * width + channels) * WIDE if maps else 0
    return values + pooled + small + taken if not backward else 2 * values + pooled + small + 2 * taken


def _fused_block_bytes(
    batch: int, channels: int, height: int, width: int, item: int, maps: bool, backward: bool
) -> float:
    """What the kernels move: planes that do not fit the chip are read a second time."""
    fewest = norm_block_bytes(batch, channels, height, width, item, maps, backward)
    if height * width <= ON_CHIP:
        return fewest
    again = batch * channels * height * width * item
    return fewest + again + (again / 4 if backward else 0)


def stages(configuration: Configuration) -> list[Stage]:
    """Every stage of a step."""
    c = configuration
    real, synthetic = c.classes * c.real_batch, c.classes * c.ipc
    result = [_network(c), _sampling(c, real), _augmentation("augmentation", "augment", c, real + synthetic)]
    for side, batch in (("real", real), ("synthetic", synthetic)):
        for layer in _layers(c):
            result += _forward(c, side, batch, *layer)
    result.append(_loss(c, real, synthetic))
    for layer in reversed(list(_layers(c))):
        result += _backward(c, synthetic, *layer)
    result.append(_augmentation("backward augmentation", "backward", c, synthetic))
    pixels = synthetic * c.channels * c.height * c.width * WIDE
    result.append(Stage("update", "update", 0, 4 * pixels / WIDE, (6 * pixels, 5 * pixels, 5 * pixels)))
    return result


def _layers(c: Configuration) -> Iterator[tuple[int, int, int, int, bool]]:
    """Number, input channels, height, width and whether maps are taken, of each block."""
    height, width, channels = c.height, c.width, c.channels
    for index in range(c.depth):
        yield index + 1, channels, height, width, c.maps and index + 1 < c.depth
        height, width, channels = height // 2, width // 2, c.network_width


def _sizes(c: Configuration, batch: int, channels: int, height: int, width: int) -> tuple[float, float, float, float]:
    """Bytes of a block's input, of the convolution's output, of the pooled output, and operations of the product."""
    inputs = batch * channels * height * width * (WIDE if channels == c.channels else c.item)
    outputs = batch * c.network_width * height * width
    pooled = batch * c.network_width * (height // 2) * (width // 2) * c.item
    return inputs, outputs * c.item, pooled, 2.0 * outputs * 9 * channels


def _is_fused_with_convolution(layer: int, channels: int, height: int, width: int) -> bool:
    return layer == 1 and channels <= 4 and height * width <= ON_CHIP


def _forward(c, side, batch, layer, channels, height, width, maps) -> list[Stage]:
    inputs, outputs, pooled, product = _sizes(c, batch, channels, height, width)
    passes = EAGER_FORWARD + (2 * EAGER_FORWARD_MAP if maps else 0)
    size = batch, c.network_width, height, width, c.item, maps
    block = norm_block_bytes(*size, backward=False)
    vector = FORWARD_OPERATIONS * outputs / c.item
    convolution_eager = inputs + (1 + EAGER_BIAS) * outputs
    name = f"{side} {layer}"
    if _is_fused_with_convolution(layer, channels, height, width):
        fused = inputs + block - outputs
        eager = convolution_eager + passes * outputs + pooled
        return [Stage(f"{name} convolution + block", side, product, vector, (eager, fused, fused))]
    return [
        Stage(f"{name} convolution", side, product, 0, (convolution_eager, inputs + outputs, inputs + outputs)),
        Stage(f"{name} block", side, 0, vector, (passes * outputs + pooled, _fused_block_bytes(*size, False), block)),
    ]


def _backward(c, batch, layer, channels, height, width, maps) -> list[Stage]:
    inputs, outputs, pooled, product = _sizes(c, batch, channels, height, width)
    passes = EAGER_BACKWARD + (2 * EAGER_BACKWARD_MAP if maps else 0)
    size = batch, c.network_width, height, width, c.item, maps
    block = norm_block_bytes(*size, backward=True)
    vector = BACKWARD_OPERATIONS * outputs / c.item
    name = f"backward {layer}"
    if _is_fused_with_convolution(layer, channels, height, width):
        columns = 9 * inputs
        floor = 2 * inputs + block - 2 * outputs
        fused = floor + inputs + pooled + 2 * columns  # image and pooled gradient twice; columns written and read
        eager = passes * outputs + pooled + outputs + inputs
        # The convolution is recomputed for the norm's two sums, and again for the gradient.
        return [
            Stage(f"{name} block + convolution", "backward", product, 2 * vector, (eager, fused, floor), 3 * product)
        ]
    passed = passes * outputs + pooled, _fused_block_bytes(*size, True), block
    return [
        Stage(f"{name} block", "backward", 0, vector, passed),
        Stage(f"{name} convolution", "backward", product, 0, (inputs + outputs,) * 3),
    ]


def _network(c: Configuration) -> Stage:
    """New weights, written; PyTorch and this package draw them all at once, scale them, and copy them into place."""
    weights = sum(c.network_width * (9 * channels + 3) for _, channels, *_ in _layers(c))
    weights += (c.network_width * (c.height >> c.depth) * (c.width >> c.depth) + 1) * c.classes
    return Stage("network", "network", 0, weights, (5 * WIDE * weights, 5 * WIDE * weights, WIDE * weights))


def _sampling(c: Configuration, real: int) -> Stage:
    """Real images fetched as bytes and put into model space; the drawing of their indices is not counted.

    Gathering reads and writes a byte a pixel. Conversion, scale and shift are three passes, the last two in place, and
    whitening a product, which reads and writes once more.
    """
    size = c.channels * c.height * c.width
    pixels = real * size
    passed = pixels * (2 + (1 + WIDE) + 4 * WIDE + (2 * WIDE if c.whitened else 0))
    product = 2.0 * pixels * size if c.whitened else 0
    return Stage("sampling", "sample", product, 2 * pixels, (passed, passed, pixels * (1 + WIDE)))


def _augmentation(name: str, part: str, c: Configuration, images: int) -> Stage:
    """One operation a class, or its gradient; eager, colour is three of them."""
    pixels = images * c.channels * c.height * c.width * WIDE
    return Stage(name, part, 0, 20 * pixels / WIDE, (6 * pixels, 2 * pixels, 2 * pixels))


def _loss(c: Configuration, real: int, synthetic: int) -> Stage:
    """Class means of maps and embedding, and the gradient of the synthetic ones."""
    values = sum(height * width + c.network_width for _, _, height, width, maps in _layers(c) if maps)
    *_, (_, _, height, width, _) = _layers(c)
    values += c.network_width * (height // 2) * (width // 2)
    floor = (real + 2 * synthetic) * values * WIDE
    return Stage("loss", "loss", 0, 3 * (real + synthetic) * values, (3 * floor, floor, floor))


def totals(configuration: Configuration, device: Device) -> dict[str, dict[str, float]]:
    """Operations, bytes and seconds of a step, by way."""
    work = stages(configuration)
    return {
        way: {
            "operations": sum(s.fused_matrix if way == "fused" and s.fused_matrix else s.matrix for s in work),
            "bytes": sum(s.bytes[WAYS.index(way)] for s in work),
            "seconds": sum(s.seconds(way, device, configuration.precision) for s in work),
        }
        for way in WAYS
    }


def read_device(path: Path) -> Device:
    """A measured device: JSON with ``name``, ``bandwidth`` (bytes/s), ``vector`` and ``matrix`` (operations/s).

    Raises:
        ValueError: a value is missing or is no positive number.
    """
    try:
        values = json.loads(path.read_text())
        device = Device(
            str(values["name"]),
            float(values["bandwidth"]),
            float(values["vector"]),
            {precision: float(values["matrix"][precision]) for precision in PRECISIONS},
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
    """Rates of a device as a short copy and short products reach them, in about a second.

    Outside the matrix units, arithmetic is taken to be as fast as the product in float32, which does not use them.
    """
    source = torch.ones(1 << 26, device=device)  # 268 MB: beyond every cache
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * source.element_size() / _least_seconds(lambda: target.copy_(source), device)
    matrix = {precision: _product_rate(device, precision) for precision in ("float32", "bfloat16")}
    matrix["tf32"] = _product_rate(device, "tf32") if device.type == "cuda" else matrix["float32"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {_threads()}"
    return Device(name, bandwidth, matrix["float32"], matrix)


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def _product_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a convolution of the network's kind: 128 to 128 channels, 3x3."""
    images, size = (512, 32) if device.type == "cuda" else (16, 16)
    x = torch.ones(images, 128, size, size, device=device).to(memory_format=torch.channels_last)
    weight = torch.ones(128, 128, 3, 3, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad(), convolution_precision(precision, device):
        if precision == "bfloat16":
            x, weight = x.bfloat16(), weight.bfloat16()
        seconds = _least_seconds(lambda: torch.nn.functional.conv2d(x, weight, padding=1), device)
    return 2.0 * 9 * 128 * x.numel() / seconds


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of the timings of a fifth of a second, at least three, after one call that does not count."""
    timings = []
    while len(timings) < 4 or sum(timings[1:]) < 0.2:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        timings.append(time.perf_counter() - started)
    return min(timings[1:])
