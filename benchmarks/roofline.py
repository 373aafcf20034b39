"""Operations and fewest bytes of one step of Algorithm 1, stage by stage: ``python -m benchmarks.roofline``.

`benchmarks.bounds` counts them and says how; ``atom-fast profile`` shows them beside measured times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from benchmarks.bounds import DEVICES, PRECISIONS, WAYS, Configuration, Device, read_device, stages, totals

# Classes, channels, height and width.
DATASETS = {
    "digits": (10, 1, 8, 8),
    "cifar10": (10, 3, 32, 32),
    "cifar100": (100, 3, 32, 32),
    "tiny": (200, 3, 64, 64),
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
    parser.add_argument("--ipc", type=int, default=50, help="synthetic images per class")
    parser.add_argument("--real-batch", type=int, default=128, help="real images per class per step")
    parser.add_argument("--width", type=int, default=128, help="channels of every block")
    parser.add_argument("--depth", type=int, default=3, help="blocks")
    parser.add_argument("--precision", choices=PRECISIONS, default="tf32", help="of the convolutions")
    parser.add_argument("--device", choices=DEVICES, default="H100", help="rates from the vendor's datasheet")
    parser.add_argument("--measured", type=Path, help="JSON with a device's measured rates, instead of --device")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
