"""Operations, fewest bytes and least time of one step of Algorithm 1, stage by stage; nothing is measured.

A stage takes at least the longer of its operations at the device's rate and its bytes at the device's bandwidth.
Three ways of running it are counted: *eager*, with the passes over memory that plain PyTorch makes; *fused*, with the
passes of this package's operators; *floor*, with every input of the stage read once and every output written once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .devices import PRECISIONS, Device

# Classes, channels, height and width.
DATASETS = {
    "digits": (10, 1, 8, 8),
    "cifar10": (10, 3, 32, 32),
    "cifar100": (100, 3, 32, 32),
    "tiny": (200, 3, 64, 64),
}
WAYS = ("eager", "fused", "floor")
WIDE = 4  # bytes of maps, statistics and images
ON_CHIP = 1024  # positions of a plane up to which the kernels read memory once

# Reads and writes of a whole feature map by the kernels that PyTorch launches. Forward: moments 1, normalisation 2,
# ReLU 2, pooling 1; for each map |f| 2, power 2, sum 1. Backward: pooling 1, ReLU 3, sums of the norm 2, gradient 3;
# for each map the power's derivative 2, its product with the incoming gradient 2, the sign 2 and its product 3, the
# addition to the other gradients 3. The bias of a convolution is a pass of 2 over its output.
EAGER_FORWARD, EAGER_FORWARD_MAP = 6, 5
EAGER_BACKWARD, EAGER_BACKWARD_MAP = 9, 12
EAGER_BIAS = 2

# Arithmetic of a block per value, without the convolution: statistics, normalisation, ReLU, pooling, and two powers
# with their sums; counted in the compiled kernels.
FORWARD_OPERATIONS, BACKWARD_OPERATIONS = 16, 19


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Sizes of a step.

    Attributes:
        classes, channels, height, width: sizes of the data set.
        ipc, real_batch: synthetic images per class, and real images per class per step.
        network_width, depth: channels and blocks of the ConvNet.
        precision: precision of the convolutions, as in `atom_fast.distillation.DistillConfig`.
        maps: True if attention is matched, by either map or both; both are counted.
        whitened: True if each batch of real images is whitened as it is fetched.
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
        name: name for tables.
        part: the stage of `atom_fast.distillation.stages.STAGES` that it is part of.
        matrix, vector: operations in matrix products, and others.
        bytes: bytes by way, in the order of ``WAYS``.
        fused_matrix: operations in products if fusing recomputes some; None otherwise.
    """

    name: str
    part: str
    matrix: float
    vector: float
    bytes: tuple[float, float, float]
    fused_matrix: float | None = None

    def seconds(self, way: str, device: Device, precision: str) -> float:
        """Return the least seconds of the stage: the longer of arithmetic and memory."""
        matrix = self.fused_matrix if way == "fused" and self.fused_matrix is not None else self.matrix
        arithmetic = max(matrix / device.matrix[precision], self.vector / device.vector)
        return max(arithmetic, self.bytes[WAYS.index(way)] / device.bandwidth)


def norm_block_bytes(
    batch: int, channels: int, height: int, width: int, item: int, maps: bool, backward: bool
) -> float:
    """Return the fewest bytes of a block given the convolution's output: each input once, each output once.

    Forward: read the output; write the pooled features, the maps and two statistics per plane. Backward: read the
    output, the gradients of the pooled features and of the maps, the maps and the statistics; write the gradient.
    """
    values = batch * channels * height * width * item
    pooled = batch * channels * (height // 2) * (width // 2) * item
    small = 2 * batch * channels * WIDE
    taken = batch * (height * width + channels) * WIDE if maps else 0
    return values + pooled + small + taken if not backward else 2 * values + pooled + small + 2 * taken


def _fused_block_bytes(
    batch: int, channels: int, height: int, width: int, item: int, maps: bool, backward: bool
) -> float:
    """Return the bytes that the kernels move: planes that do not fit the chip are read twice."""
    fewest = norm_block_bytes(batch, channels, height, width, item, maps, backward)
    if height * width <= ON_CHIP:
        return fewest
    again = batch * channels * height * width * item
    return fewest + again + (again / 4 if backward else 0)


def stages(configuration: Configuration) -> list[Stage]:
    """Return every stage of a step."""
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
    """Yield number, input channels, height, width and use of maps of each block."""
    height, width, channels = c.height, c.width, c.channels
    for index in range(c.depth):
        yield index + 1, channels, height, width, c.maps and index + 1 < c.depth
        height, width, channels = height // 2, width // 2, c.network_width


def _sizes(c: Configuration, batch: int, channels: int, height: int, width: int) -> tuple[float, float, float, float]:
    """Return bytes of a block's input, convolution and pooled output, and the operations of the product."""
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
    """Count new weights: PyTorch and this package draw them all at once, scale them, and copy them into place."""
    weights = sum(c.network_width * (9 * channels + 3) for _, channels, *_ in _layers(c))
    weights += (c.network_width * (c.height >> c.depth) * (c.width >> c.depth) + 1) * c.classes
    return Stage("network", "network", 0, weights, (5 * WIDE * weights, 5 * WIDE * weights, WIDE * weights))


def _sampling(c: Configuration, real: int) -> Stage:
    """Count real images fetched as bytes and mapped to model space; drawing their indices is not counted.

    Gathering reads and writes a byte per pixel. Conversion, scale and shift are three passes, the last two in place;
    whitening is a product, which reads and writes once more.
    """
    size = c.channels * c.height * c.width
    pixels = real * size
    passed = pixels * (2 + (1 + WIDE) + 4 * WIDE + (2 * WIDE if c.whitened else 0))
    product = 2.0 * pixels * size if c.whitened else 0
    return Stage("sampling", "sample", product, 2 * pixels, (passed, passed, pixels * (1 + WIDE)))


def _augmentation(name: str, part: str, c: Configuration, images: int) -> Stage:
    """Count one operation per class, or its gradient; eager colour is three of them."""
    pixels = images * c.channels * c.height * c.width * WIDE
    return Stage(name, part, 0, 20 * pixels / WIDE, (6 * pixels, 2 * pixels, 2 * pixels))


def _loss(c: Configuration, real: int, synthetic: int) -> Stage:
    """Count the class means of maps and embedding, and the gradient of the synthetic ones."""
    values = sum(height * width + c.network_width for _, _, height, width, maps in _layers(c) if maps)
    *_, (_, _, height, width, _) = _layers(c)
    values += c.network_width * (height // 2) * (width // 2)
    floor = (real + 2 * synthetic) * values * WIDE
    return Stage("loss", "loss", 0, 3 * (real + synthetic) * values, (3 * floor, floor, floor))


def totals(configuration: Configuration, device: Device) -> dict[str, dict[str, float]]:
    """Return operations, bytes and seconds of a step by way."""
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
    """Return all stages as text: GFLOP, then MB and milliseconds for each way."""
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


def to_dict(configuration: Configuration, device: Device) -> dict:
    """Return configuration, stages and totals as JSON can hold them."""
    return {
        "device": device.name,
        "configuration": dataclasses.asdict(configuration),
        "stages": [dataclasses.asdict(stage) for stage in stages(configuration)],
        "totals": totals(configuration, device),
    }
