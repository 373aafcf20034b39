"""Operations and fewest bytes of one step of Algorithm 1, stage by stage: ``python -m benchmarks.roofline``.

A stage takes at least the longer of its operations at the device's rate and its bytes at the device's bandwidth.
Three ways of running it are counted: *eager*, with the passes over memory that plain PyTorch makes; *fused*, with those
of this package's operators; *floor*, with every input of the stage read once and every output written once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

WAYS = ("eager", "fused", "floor")
PRECISIONS = {"float32": 4, "tf32": 4, "bfloat16": 2}  # bytes of an activation
WIDE = 4  # bytes of maps, statistics and images
ON_CHIP = 1024  # positions of a plane up to which the kernels read memory once: registers, or a second time the cache

# Classes, channels, height and width.
DATASETS = {
    "digits": (10, 1, 8, 8),
    "cifar10": (10, 3, 32, 32),
    "cifar100": (100, 3, 32, 32),
    "tiny": (200, 3, 64, 64),
}

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
        matrix, vector: operations in products and outside them.
        bytes: by way, in the order of ``WAYS``.
        fused_matrix: operations in products with recomputation, where fusing recomputes.
    """

    name: str
    matrix: float
    vector: float
    bytes: tuple[float, float, float]
    fused_matrix: float | None = None

    def seconds(self, way: str, device: Device, precision: str) -> float:
        """The least time the stage takes: the longer of arithmetic and memory."""
        matrix = self.fused_matrix if way == "fused" and self.fused_matrix is not None else self.matrix
        arithmetic = max(matrix / device.matrix[precision], self.vector / device.vector)
        return max(arithmetic, self.bytes[WAYS.index(way)] / device.bandwidth)


def block_bytes(batch: int, channels: int, height: int, width: int, item: int, maps: bool, backward: bool) -> float:
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
    fewest = block_bytes(batch, channels, height, width, item, maps, backward)
    if height * width <= ON_CHIP:
        return fewest
    again = batch * channels * height * width * item
    return fewest + again + (again / 4 if backward else 0)


def stages(configuration: Configuration) -> list[Stage]:
    """Every stage of a step."""
    c = configuration
    real, synthetic = c.classes * c.real_batch, c.classes * c.ipc
    result = [_augmentation(c, real, synthetic)]
    for side, batch in (("real", real), ("synthetic", synthetic)):
        for layer in _layers(c):
            result += _forward(c, side, batch, *layer)
    result.append(_loss(c, real, synthetic))
    for layer in reversed(list(_layers(c))):
        result += _backward(c, synthetic, *layer)
    pixels = synthetic * c.channels * c.height * c.width * WIDE
    result.append(Stage("update", 0, 4 * pixels / WIDE, (6 * pixels, 5 * pixels, 5 * pixels)))
    return result


def _layers(c: Configuration) -> Iterator[tuple[int, int, int, int, bool]]:
    """Number, input channels, height, width and whether maps are taken, of each block."""
    height, width, channels = c.height, c.width, c.channels
    for index in range(c.depth):
        yield index + 1, channels, height, width, index + 1 < c.depth
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
    block = block_bytes(*size, backward=False)
    vector = FORWARD_OPERATIONS * outputs / c.item
    convolution_eager = inputs + (1 + EAGER_BIAS) * outputs
    name = f"{side} {layer}"
    if _is_fused_with_convolution(layer, channels, height, width):
        fused = inputs + block - outputs
        eager = convolution_eager + passes * outputs + pooled
        return [Stage(f"{name} convolution + block", product, vector, (eager, fused, fused))]
    return [
        Stage(f"{name} convolution", product, 0, (convolution_eager, inputs + outputs, inputs + outputs)),
        Stage(f"{name} block", 0, vector, (passes * outputs + pooled, _fused_block_bytes(*size, False), block)),
    ]


def _backward(c, batch, layer, channels, height, width, maps) -> list[Stage]:
    inputs, outputs, pooled, product = _sizes(c, batch, channels, height, width)
    passes = EAGER_BACKWARD + (2 * EAGER_BACKWARD_MAP if maps else 0)
    size = batch, c.network_width, height, width, c.item, maps
    block = block_bytes(*size, backward=True)
    vector = BACKWARD_OPERATIONS * outputs / c.item
    name = f"backward {layer}"
    if _is_fused_with_convolution(layer, channels, height, width):
        columns = 9 * inputs
        floor = 2 * inputs + block - 2 * outputs
        fused = floor + inputs + pooled + 2 * columns  # image and pooled gradient twice; columns written and read
        eager = passes * outputs + pooled + outputs + inputs
        # The convolution is recomputed for the norm's two sums, and again for the gradient.
        return [Stage(f"{name} block + convolution", product, 2 * vector, (eager, fused, floor), 3 * product)]
    return [
        Stage(f"{name} block", 0, vector, (passes * outputs + pooled, _fused_block_bytes(*size, True), block)),
        Stage(f"{name} convolution", product, 0, (inputs + outputs,) * 3),
    ]


def _augmentation(c: Configuration, real: int, synthetic: int) -> Stage:
    """One operation a class on both sides, and its gradient on the synthetic side; eager, colour is three of them."""
    pixels = (real + 2 * synthetic) * c.channels * c.height * c.width * WIDE
    return Stage("augmentation", 0, 20 * pixels / WIDE, (6 * pixels, 2 * pixels, 2 * pixels))


def _loss(c: Configuration, real: int, synthetic: int) -> Stage:
    """Class means of maps and embedding, and the gradient of the synthetic ones."""
    values = sum(height * width + c.network_width for _, _, height, width, maps in _layers(c) if maps)
    *_, (_, _, height, width, _) = _layers(c)
    values += c.network_width * (height // 2) * (width // 2)
    floor = (real + 2 * synthetic) * values * WIDE
    return Stage("loss", 0, 3 * (real + synthetic) * values, (3 * floor, floor, floor))


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


def table(configuration: Configuration, device: Device) -> str:
    """All stages as text: GFLOP, then MB and milliseconds each way."""
    lines = [f"{'stage':<32}{'GFLOP':>9}" + "".join(f"{way + ' MB':>12}{'ms':>8}" for way in WAYS)]
    for stage in stages(configuration):
        cells = "".join(
            f"{stage.bytes[index] / 1e6:>12.1f}{1e3 * stage.seconds(way, device, configuration.precision):>8.3f}"
            for index, way in enumerate(WAYS)
        )
        lines.append(f"{stage.name:<32}{stage.matrix / 1e9:>9.1f}{cells}")
    sums = totals(configuration, device)
    cells = "".join(f"{sums[way]['bytes'] / 1e6:>12.1f}{1e3 * sums[way]['seconds']:>8.3f}" for way in WAYS)
    lines.append(f"{'step':<32}{sums['floor']['operations'] / 1e9:>9.1f}{cells}")
    return "\n".join(lines)


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


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 2 on bad input."""
    options = _parser().parse_args(arguments)
    try:
        device = read_device(options.measured) if options.measured else DEVICES[options.device]
        configuration = Configuration(
            *_geometry(options),
            ipc=options.ipc,
            real_batch=options.real_batch,
            network_width=options.width,
            depth=options.depth,
            precision=options.precision,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        work = [dataclasses.asdict(stage) for stage in stages(configuration)]
        settings = dataclasses.asdict(configuration)
        print(json.dumps({"device": device.name, "configuration": settings, "stages": work,
                          "totals": totals(configuration, device)}, indent=2))  # fmt: skip
    else:
        print(f"{options.dataset}, IPC {options.ipc}, {options.precision}, on {device.name}")
        print(table(configuration, device))
    return 0


def _geometry(options: argparse.Namespace) -> tuple[int, int, int, int]:
    classes, channels, height, width = DATASETS[options.dataset]
    size = options.resolution
    return (options.classes or classes, channels, size or height, size or width)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description="Operations, fewest bytes and least time of one distillation step, stage by stage.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="classes, channels and image size")
    parser.add_argument("--classes", type=int, help="number of classes, if not the data set's")
    parser.add_argument("--resolution", type=int, help="height and width in pixels, if not the data set's")
    parser.add_argument("--ipc", type=int, default=50, help="synthetic images a class")
    parser.add_argument("--real-batch", type=int, default=128, help="real images a class a step")
    parser.add_argument("--width", type=int, default=128, help="channels of every block")
    parser.add_argument("--depth", type=int, default=3, help="blocks")
    parser.add_argument("--precision", choices=PRECISIONS, default="tf32", help="of the convolutions")
    parser.add_argument("--device", choices=DEVICES, default="H100", help="rates from the vendor's datasheet")
    parser.add_argument("--measured", type=Path, help="JSON with a device's measured rates, instead of --device")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
