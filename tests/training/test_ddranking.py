"""Networks trained by the protocol ``ddranking`` are as accurate as those that DD-Ranking itself trains.

DD-Ranking is no dependency: ``pip install --no-deps ddranking==0.2.0 && pip install timm pandas`` makes this test run.
Its training and testing functions are called one by one: its metrics search a learning rate, and their scores are of
percent instead of fractions.
"""

import math
import statistics

import pytest
import torch

from atom_fast.data.dataset import ImageData
from atom_fast.data.sources import load_data
from atom_fast.evaluation import evaluate
from atom_fast.evaluation.sets import select
from atom_fast.training import get_protocol

pytest.importorskip("ddranking", reason="DD-Ranking is optional")
NETWORKS, EPOCHS = 6, 60
SHAPE = {"width": 32, "depth": 2}
# configs/Demo_LRS_Hard_Label.yaml
AUGMENTATION = {
    "flip": 0.5, "rotate": 15.0, "saturation": 2.0, "brightness": 1.0, "contrast": 0.5, "scale": 1.2, "crop": 0.125,
    "cutout": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    """Digits in three channels: DD-Ranking pads the images of one channel by 3."""
    digits = load_data("digits")
    colour = [images.expand(-1, 3, -1, -1).contiguous() for images in (digits.train_images, digits.test_images)]
    return ImageData.from_tensors(
        "digits", digits.class_names, colour[0], digits.train_labels, colour[1], digits.test_labels
    )


def theirs(synthetic, data, seed):
    """Last-epoch and best accuracy of one of DD-Ranking's networks, as its LabelRobustScoreHard trains it."""
    from ddranking.aug import DSA
    from ddranking.utils import TensorDataset, get_lr_scheduler, get_optimizer, train_one_epoch, validate
    from ddranking.utils.networks import ConvNet

    torch.manual_seed(seed)
    network = ConvNet(3, 10, SHAPE["width"], SHAPE["depth"], "relu", "instancenorm", "avgpooling", data.image_shape[1:])
    test_set = torch.utils.data.TensorDataset(synthetic.preprocessing.to_model(data.test_images), data.test_labels)
    train_set = TensorDataset(synthetic.images, synthetic.labels)
    loader = torch.utils.data.DataLoader(train_set, batch_size=128, sampler=torch.utils.data.RandomSampler(train_set))
    test_loader = torch.utils.data.DataLoader(test_set, batch_size=256)
    optimizer = get_optimizer("sgd", network, 0.01, 5e-4, 0.9)
    schedule = get_lr_scheduler("step", optimizer, EPOCHS, EPOCHS // 2)
    accuracies = []
    for epoch in range(EPOCHS):
        train_one_epoch(
            epoch, network, loader, torch.nn.CrossEntropyLoss(), optimizer, aug_func=DSA(dict(AUGMENTATION)),
            lr_scheduler=schedule, device="cpu",
        )  # fmt: skip
        if (epoch + 1) % 10 == 0:
            accuracies.append(validate(network, test_loader, device="cpu"))
    return accuracies[-1], max(accuracies)


def test_accuracies_agree_within_their_noise(data, record_property):
    synthetic = select(data, "random", 10, preprocessing="standard", progress=False)
    protocol = get_protocol("ddranking", epochs=EPOCHS)
    architecture = {**SHAPE, "norm": "instance", "pooling": "avg2", "initialization": "default"}
    ours = evaluate(
        synthetic, data, protocol=protocol, architecture=architecture, networks=NETWORKS, evaluate_every=10,
        device="cpu", progress=False,
    )  # fmt: skip
    pairs = zip(*(theirs(synthetic, data, seed) for seed in range(NETWORKS)), strict=True)
    for name, got, expected in zip(("last", "best"), (ours.accuracies, ours.best_accuracies), pairs, strict=True):
        noise = math.sqrt((statistics.variance(got) + statistics.variance(expected)) / NETWORKS)
        means = statistics.fmean(got), statistics.fmean(expected)
        record_property(name, f"ours {means[0]:.2f}, theirs {means[1]:.2f} ± {noise:.2f}")
        print(name, f"ours {means[0]:.2f}, theirs {means[1]:.2f}, deviation of the difference {noise:.2f}")
        assert means[0] > 50, "the networks have learned"
        assert abs(means[0] - means[1]) < 4 * noise + 0.5
