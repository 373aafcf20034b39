"""Distil the handwritten digits and evaluate the result: ``python examples/digits.py``.

This is `make demo` for one number of images per class. It takes about half a minute on one CPU core, less with smaller
options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import atom_fast as af


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--ipc", type=int, default=10, help="synthetic images per class")
    parser.add_argument("--iterations", type=int, default=300, help="steps of the distillation")
    parser.add_argument("--networks", type=int, default=3, help="networks trained on the set")
    parser.add_argument("--output", default="runs/digits-example", help="the run's folder, new or empty")
    options = parser.parse_args(arguments)

    data = af.load_data("digits")
    config = af.preset(
        "paper",
        ipc=options.ipc,
        iterations=options.iterations,
        real_batch=64,
        augmentation="color_crop_cutout_scale_rotate",  # no flips: a mirrored digit is not a digit
    )
    synthetic = af.distill(data, config, options.output)
    print(af.evaluate(synthetic, data, networks=options.networks))


if __name__ == "__main__":
    main()
