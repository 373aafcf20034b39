"""The unit of timing: one method in one implementation at one size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A step to time. Hashable plain data, so that it can be sent to a process and written to JSON.

    Attributes:
        method: key of :data:`benchmarks.methods.TIMED`.
        implementation: one of the method's implementations.
        ipc: synthetic images per class.
        classes: number of classes.
        resolution: height and width of the images in pixels.
        channels: channels of the images.
        class_images: real images per class in the data set.
        real_batch: real images per class per step.
        width, depth: channels and blocks of the ConvNet.
        precision: precision of convolutions and matrix products, as in `atom_fast.distillation.DistillConfig`.
        device: ``"cuda"`` or ``"cpu"``.
        inner_divisor: divisor of the epochs of DC's and DSA's inner training; 1 as published.
        seed: seed of every random number.
        class_chunk: classes per chunk of this project's step; None for all at once.
        norm: ``"batch"`` for BatchNorm; None for InstanceNorm.
        real_precision: precision of the real images' convolutions in this project's step; None for ``precision``.
    """

    method: str
    implementation: str
    ipc: int
    classes: int = 10
    resolution: int = 32
    channels: int = 3
    class_images: int = 5000
    real_batch: int = 128
    width: int = 128
    depth: int = 3
    precision: str = "tf32"
    device: str = "cuda"
    inner_divisor: int = 1
    seed: int = 0
    class_chunk: int | None = None
    norm: str | None = None
    real_precision: str | None = None
