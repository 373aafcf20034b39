"""What one cell of Table 3 runs: a method, a provider, and the sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """One method at one size; hashable, and plain data, so that it can be sent to a process and written to JSON.

    Attributes:
        method: key of :data:`benchmarks.methods.METHODS`.
        provider: one of the method's providers.
        ipc: synthetic images a class.
        classes: number of classes.
        resolution: height and width of the images in pixels.
        channels: channels of the images.
        class_images: real images a class in the data set.
        real_batch: real images a class in a step.
        width, depth: of the ConvNet.
        precision: ``"float32"``, ``"tf32"`` (products of convolutions and matrices) or ``"bfloat16"`` (the same).
        device: ``"cuda"`` or ``"cpu"``.
        inner_divisor: by which the epochs of DC's and DSA's inner training are divided; 1 for the methods as they are.
        seed: of every random number.
        class_chunk: classes at once, for this project's step; None for all.
    """

    method: str
    provider: str
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
