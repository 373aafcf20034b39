"""Training of an evaluation's networks: this project's ensemble beside the public code's loop.

On a CPU the set is 10 scikit-learn digits per class, on a GPU 50 random images per class of CIFAR-10's shape. Each side
runs in its own process, in turns, and is timed whole: making the networks, every epoch, one test each. The figures are
milliseconds per network and epoch, and the ratio of the two sides of one round.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from atom_fast._malloc import keep_freed_memory
from atom_fast.data import load_data
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.evaluation import random_selection
from atom_fast.evaluation.accuracy import evaluate
from atom_fast.synthetic import SyntheticSet
from atom_fast.training import get_protocol

from .harness import environment, save_results
from .methods.published import ConvNet, augment
from .methods.workload import Workload


def run(
    networks: int | None = None,
    epochs: int | None = None,
    *,
    loop_networks: int | None = None,
    loop_epochs: int | None = None,
    rounds: int = 1,
    out: Path | None = None,
) -> dict:
    """Measure both sides in turns, print a line each, and return the records.

    Args:
        networks, epochs: sizes of the training; None: 10 networks and 300 epochs, on a GPU 20 and 1,000.
        loop_networks, loop_epochs: sizes of the loop; None: the same. Fewer take less time.
        rounds: number of repetitions.
        out: JSON file of the records.
    """
    cuda = torch.cuda.is_available()
    networks, epochs = networks or (20 if cuda else 10), epochs or (1000 if cuda else 300)
    sizes = {"ensemble": (networks, epochs), "loop": (loop_networks or networks, loop_epochs or epochs)}
    record = {"environment": environment("cuda" if cuda else "cpu"), "rounds": []}
    for number in range(rounds):
        sides = {}
        for side in ("loop", "ensemble") if number % 2 == 0 else ("ensemble", "loop"):
            sides[side] = _in_a_process(side, *sizes[side])
            print(describe(side, sides[side]), flush=True)
        ratio = sides["loop"]["ms_per_network_epoch"] / sides["ensemble"]["ms_per_network_epoch"]
        record["rounds"].append({**sides, "ratio": ratio})
        record["ratio"] = statistics.median(entry["ratio"] for entry in record["rounds"])
        print(f"the ensemble is {ratio:.2f} times as fast", flush=True)
        if out:
            save_results(out, record)
    return record


def describe(side: str, entry: dict) -> str:
    """Return the result of a side in a line."""
    return (
        f"{side:9} {entry['networks']} networks, {entry['epochs']} epochs: {entry['seconds']:.1f} s, "
        f"{entry['ms_per_network_epoch']:.2f} ms per network and epoch"
    )


def _in_a_process(side: str, networks: int, epochs: int) -> dict:
    """Time one side in a fresh process: memory that the C library keeps from one side must not help the other."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_time, side, networks, epochs).result()


def _time(side: str, networks: int, epochs: int) -> dict:
    if side == "ensemble":
        keep_freed_memory()  # as ``atom-fast evaluate`` does
    train = SIDES[side](make_data(), networks, epochs)
    started = time.perf_counter()
    train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    per_epoch = 1e3 * seconds / networks / epochs
    return {"networks": networks, "epochs": epochs, "seconds": seconds, "ms_per_network_epoch": per_epoch}


def make_data() -> ImageData:
    """Return the data with the training set already chosen: digits, or CIFAR-10's shape on a GPU."""
    if not torch.cuda.is_available():
        digits = load_data("digits", progress=False)
        chosen = random_selection(digits, 10, seed=0)
        images, labels = digits.train_images[chosen], digits.train_labels[chosen]
        return ImageData.from_tensors(
            "digits", list(digits.class_names), images, labels, digits.test_images, digits.test_labels
        )
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return images.cuda(), (torch.arange(count) % 10).cuda()

    return ImageData.from_tensors("random", [str(k) for k in range(10)], *split(500), *split(10_000))


def ensemble(data: ImageData, networks: int, epochs: int, **settings) -> Callable[[], None]:
    """Return this project's evaluation; ``settings`` as in :func:`atom_fast.evaluation.accuracy`."""
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    images = space.to_model(data.train_images)
    synthetic = SyntheticSet(images, data.train_labels, data.class_names, space)
    protocol = get_protocol("paper", epochs=epochs)
    options = {"protocol": protocol, "networks": networks, "architecture": {}, "progress": False, **settings}

    def train() -> None:
        evaluate(synthetic, data, **options)

    return train


def loop(data: ImageData, networks: int, epochs: int) -> Callable[[], None]:
    """Return the public code's training: one network at a time, a DataLoader of single images, losses read."""
    device = data.train_images.device.type
    channels, height, _ = data.image_shape
    workload = Workload("evaluation", "eager", 10, channels=channels, resolution=height, device=device)
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    training_set = TensorDataset(space.to_model(data.train_images), data.train_labels)
    test_set = TensorDataset(space.to_model(data.test_images), data.test_labels)

    def run_epoch(loader, network, optimizer, seed) -> None:
        for images, labels in loader:
            if optimizer is not None:
                images = augment(images, seed, siamese=False)
            logits = network(images)
            loss = nn.functional.cross_entropy(logits, labels)
            np.equal(logits.detach().cpu().numpy().argmax(1), labels.cpu().numpy()).sum()
            loss.item()
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def train() -> None:
        for _ in range(networks):
            network = ConvNet(workload).to(device)
            optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
            for number in range(epochs):
                run_epoch(DataLoader(training_set, batch_size=256, shuffle=True), network, optimizer, number)
            with torch.no_grad():
                run_epoch(DataLoader(test_set, batch_size=256), network, None, 0)

    return train


SIDES = {"loop": loop, "ensemble": ensemble}
