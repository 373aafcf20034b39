"""Estimate of what several GPUs send, from the messages and bytes that `benchmarks.ranks` counts between processes.

Nothing here is measured on GPUs: links, latencies and the time of a step are assumed, and named in what is printed.
"""

from __future__ import annotations

import dataclasses
import math

GPUS = 8
IPC = 50  # images per class of a checkpoint
MESSAGE = 50e-6  # seconds until a message for a checkpoint has left a process, assumed
WIDTH = 128  # channels of the paper's ConvNet


@dataclasses.dataclass(frozen=True)
class Link:
    """What connects the GPUs; of two machines it is the network between them, as if everything crossed it.

    Attributes:
        bandwidth: bytes per second into one GPU. Assumed: half of the nominal rate, since small messages do not fill a
            link.
        latency: seconds of an all-gather of few bytes among ``GPUS`` GPUs. Assumed: by NVLink twice the 11 µs that
            NCCL's tests print for 8 H20 (https://github.com/deepseek-ai/DeepEP/issues/303), since small kernels prepare
            the message and add up what came; two and four times as much by the others.
    """

    bandwidth: float
    latency: float


LINKS = {
    "NVLink 4 (450 GB/s)": Link(225e9, 20e-6),
    "PCIe 5 x16 (64 GB/s)": Link(32e9, 40e-6),
    "two machines (100 Gbit/s)": Link(6.25e9, 80e-6),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A distillation at ``IPC`` images per class.

    Attributes:
        classes: number of classes.
        side: height and width of the images.
    """

    classes: int
    side: int

    @property
    def step(self) -> float:
        """Seconds of a step on one GPU. Assumed: about an H100's on CIFAR-10, in proportion to classes and pixels."""
        return 2e-3 * self.classes / 10 * (self.side / 32) ** 2

    @property
    def layers(self) -> int:
        """Blocks of the ConvNet, which halve the side down to 4."""
        return int(math.log2(self.side)) - 2

    @property
    def part(self) -> int:
        """Classes of the GPU that has most of them; the others send as many rows."""
        return -(-self.classes // GPUS)


WORKLOADS = {"CIFAR-10": Workload(10, 32), "CIFAR-100": Workload(100, 32), "Tiny ImageNet": Workload(200, 64)}


def estimate_checkpoint(bytes_a_pixel: float) -> list[dict]:
    """Estimate the time to gather a checkpoint between GPUs.

    Each GPU sends images and momentum, and the first one receives all but its own, one message after another.

    Args:
        bytes_a_pixel: bytes sent for each value of the images.

    Returns:
        For each workload ``bytes_received``, by the first GPU, and ``seconds`` by link.
    """
    records = []
    for name, work in WORKLOADS.items():
        received = bytes_a_pixel * work.classes * IPC * 3 * work.side**2 * (GPUS - 1) / GPUS
        seconds = {name: 2 * (GPUS - 1) * MESSAGE + received / link.bandwidth for name, link in LINKS.items()}
        records.append({"workload": name, "bytes_received": round(received), "seconds": seconds})
    return records


def estimate_step(messages_a_layer: float, bytes_a_channel: float) -> list[dict]:
    """Estimate what BatchNorm's sums add to a step whose classes are split among GPUs.

    A step is its computation, in proportion to its share of the classes, and its messages, each an all-gather for which
    everything waits. That GPUs also wait for the slowest of them is not in the estimate.

    Args:
        messages_a_layer: messages of a step for each block of the network.
        bytes_a_channel: bytes sent in a step for each class and channel of a block.

    Returns:
        For each workload ``messages``, ``bytes_received`` by a GPU, ``step`` (seconds on one GPU), and by link:
        ``seconds`` of the sums; ``share``, these over ``step``; ``speed``, how many times as fast the split step
        is; ``pays_from``, seconds of a step on one GPU from which the split step is faster.
    """
    records = []
    for name, work in WORKLOADS.items():
        messages = messages_a_layer * work.layers
        received = bytes_a_channel * work.layers * WIDTH * work.part * (GPUS - 1)
        seconds = {name: messages * link.latency + received / link.bandwidth for name, link in LINKS.items()}
        part = work.part / work.classes
        records.append(
            {
                "workload": name,
                "messages": round(messages),
                "bytes_received": round(received),
                "step": work.step,
                "seconds": seconds,
                "share": {name: own / work.step for name, own in seconds.items()},
                "speed": {name: work.step / (part * work.step + own) for name, own in seconds.items()},
                "pays_from": {name: own / (1 - part) for name, own in seconds.items()},
            }
        )
    return records


def describe_checkpoint(records: list[dict]) -> list[str]:
    """Return the estimate of a checkpoint as lines."""
    lines = [
        f"Estimate for {GPUS} GPUs, assuming half of each link's nominal bandwidth into one GPU. To gather a "
        f"checkpoint at {IPC} images per class, assuming {1e6 * MESSAGE:.0f} µs a message:"
    ]
    for record in records:
        times = ", ".join(f"{link} {1e3 * seconds:.1f} ms" for link, seconds in record["seconds"].items())
        lines.append(f"  {record['workload']}, {record['bytes_received'] / 1e6:.1f} MB: {times}")
    return lines


def describe_step(records: list[dict]) -> list[str]:
    """Return the estimate of BatchNorm's sums as lines."""
    lines = [f"BatchNorm's sums in a step split among them, assuming that {assumed_latencies()}, and steps on one GPU:"]
    for record in records:
        lines.append(
            f"  {record['workload']}, {1e3 * record['step']:.0f} ms on one GPU, {record['messages']} messages, "
            f"{record['bytes_received'] / 1e3:,.0f} kB:"
        )
        for link, seconds in record["seconds"].items():
            lines.append(
                f"    {link}: {1e3 * seconds:.2f} ms ({100 * record['share'][link]:.1f} % of one GPU's step); split, "
                f"{record['speed'][link]:.1f} times as fast; slower than one GPU below a step of "
                f"{1e3 * record['pays_from'][link]:.2f} ms"
            )
    return lines


def assumed_latencies() -> str:
    """Return the latencies in words."""
    return "a message takes " + ", ".join(f"{1e6 * link.latency:.0f} µs by {name}" for name, link in LINKS.items())
