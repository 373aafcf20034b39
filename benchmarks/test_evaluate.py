"""Networks trained on a set: the public code's loop, and this project's ensembles of several sizes, side by side.

    python -m pytest benchmarks/test_evaluate.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

On a GPU the set has CIFAR-10's shape with 50 images a class, on a CPU that of scikit-learn's digits with 10. A round is
``NETWORKS`` networks of ``EPOCHS`` epochs and one test each, with everything that comes before the first step; more
epochs only dilute that. ``extra_info`` tells milliseconds a network and epoch, and what 20 networks of 1,000 epochs
would take at that rate. The loop comes first: this project's training changes how the C library keeps freed memory,
from which a loop in the same process would gain.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.evaluate import evaluate, get_protocol

from .methods.published import ConvNet, augment
from .methods.setting import Setting

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPE, IPC, TEST_IMAGES = ((3, 32, 32), 50, 10_000) if CUDA else ((1, 8, 8), 10, 397)
NETWORKS, EPOCHS = (8, 50) if CUDA else (4, 30)
TOGETHER = (1, 2, 4, 8) if CUDA else (1, 2)
PROTOCOL = get_protocol("paper", epochs=EPOCHS)


@pytest.fixture(scope="module")
def data():
    """Random images: neither the time of a step nor that of a test depends on what they show."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        images = torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8)
        return images.to(DEVICE), (torch.arange(count) % 10).to(DEVICE)

    return ImageData.from_tensors("random", [str(k) for k in range(10)], *split(10 * IPC), *split(TEST_IMAGES))


@pytest.fixture(scope="module")
def space(data):
    return fit_preprocessing(data.train_images, "standard", progress=False)


def test_loop_of_the_public_code(benchmark, data, space):
    """One network after the other, a DataLoader that indexes one image at a time, loss and accuracy read back."""
    setting = Setting("evaluation", "eager", IPC, channels=SHAPE[0], resolution=SHAPE[1], device=DEVICE)
    images, labels = space.to_model(data.train_images), data.train_labels
    test_images, test_labels = space.to_model(data.test_images), data.test_labels

    def epoch(loader, network, optimizer, seed):
        for some_images, some_labels in loader:
            if optimizer is not None:
                some_images = augment(some_images, seed, siamese=False)
            logits = network(some_images)
            loss = nn.functional.cross_entropy(logits, some_labels)
            np.equal(logits.detach().cpu().numpy().argmax(1), some_labels.cpu().numpy()).sum()
            loss.item()
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def train():
        for _ in range(NETWORKS):
            network = ConvNet(setting).to(DEVICE)
            optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
            training_set, test_set = TensorDataset(images, labels), TensorDataset(test_images, test_labels)
            for number in range(EPOCHS):
                epoch(DataLoader(training_set, batch_size=256, shuffle=True), network, optimizer, number)
            with torch.no_grad():
                epoch(DataLoader(test_set, batch_size=256), network, None, 0)

    measure(benchmark, train)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("together", TOGETHER)
def test_ensemble(benchmark, data, space, together, precision):
    images, labels = space.to_model(data.train_images), data.train_labels

    def train():
        options = {"networks": NETWORKS, "together": together, "precision": precision, "progress": False}
        evaluate(images, labels, data, space, protocol=PROTOCOL, **options)

    measure(benchmark, train)


def measure(benchmark, train):
    """Time ``train`` after one call of it."""

    def run():
        train()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"{NETWORKS} networks, {EPOCHS} epochs, {IPC} images a class of {list(SHAPE)} on {DEVICE}"
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    milliseconds = benchmark.stats.stats.median / NETWORKS / EPOCHS * 1e3
    benchmark.extra_info["ms a network and epoch"] = round(milliseconds, 3)
    benchmark.extra_info["s for 20 networks of 1,000 epochs"] = round(milliseconds * 20, 1)
