"""Learn classes step by step with a memory of distilled images: ``python examples/continual.py``.

The protocol is GDumb's (Prabhu et al. 2020), as DM's authors test it. New classes arrive in steps. Each step leaves a
few images per class in the memory: real ones, random or chosen by herding, or ones distilled from the step's data.
After each step new networks are trained on the memory alone, and tested on all classes so far. Digits take about a
minute on a CPU; the papers' experiment is ``--dataset cifar100 --data-dir DIR --orders 5``. The same command goes on
where an earlier one was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import atom_fast as af
from atom_fast.data import ImageData, fit_preprocessing
from atom_fast.evaluation.sets import read_set
from atom_fast.pictures import save_curves
from atom_fast.training import get_protocol

PRESETS = {"DM": "dm", "ATOM": "paper"}
CHOSEN = {"Random": "random", "Herding": "herding"}
# On digits: few and narrow enough for a minute, and no flips, because a mirrored digit is no digit.
DIGITS = {"width": 32, "real_batch": 64, "iterations": 100, "augmentation": "color_crop_cutout_scale_rotate"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--dataset", default="digits", help="digits, cifar10, cifar100, tiny or folder")
    parser.add_argument("--data-dir", help="folder of the data")
    parser.add_argument("--steps", type=int, default=5, help="steps that share the classes")
    parser.add_argument("--ipc", type=int, help="images per class in the memory; 20, for digits 2")
    parser.add_argument("--orders", type=int, default=1, help="orders of the classes; the papers take 5")
    parser.add_argument("--networks", type=int, default=3, help="networks trained after each step")
    parser.add_argument("--epochs", type=int, help="of each network; 1000, for digits 60")
    parser.add_argument("--iterations", type=int, help="steps of each distillation; the preset's, for digits 100")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=FILE", help="also use sets of all classes")
    parser.add_argument("--output", type=Path, default=Path("runs/continual"), help="folder of sets and results")
    options = parser.parse_args(arguments)

    data = af.load_data(options.dataset, options.data_dir)
    if not 1 <= options.steps <= data.num_classes:
        parser.error(f"--steps must be from 1 to the {data.num_classes} classes; got {options.steps}")
    small = data.name == "digits"
    ipc = options.ipc or (2 if small else 20)
    settings: dict[str, Any] = dict(DIGITS) if small else {}
    if options.iterations:
        settings["iterations"] = options.iterations
    protocol = get_protocol("digits" if small else "paper", epochs=options.epochs or (60 if small else 1000))
    given = {name: read(Path(file), data) for name, _, file in (text.partition("=") for text in options.set)}
    accuracies: dict[tuple[str, int], list[float]] = {}  # of a method after so many classes, one per order
    for order in range(options.orders):
        classes = [int(k) for k in np.random.RandomState(order).permutation(data.num_classes)]  # the papers' orders
        memory: dict[str, list[af.SyntheticSet]] = {name: [] for name in (*CHOSEN, *PRESETS)}
        space = None  # fitted to the first step: the classes to come are unknown then
        for step in range(options.steps):
            first, last = (number * data.num_classes // options.steps for number in (step, step + 1))
            part, seen = restrict(data, classes[first:last]), restrict(data, classes[:last])
            if space is None:
                kind = af.preset("paper", ipc=ipc).for_data(data.image_shape, data.name).preprocessing
                space = fit_preprocessing(part.train_images, kind)
            for name, sets in memory.items():
                if name in CHOSEN:
                    sets.append(af.select(part, CHOSEN[name], ipc, preprocessing=space, seed=order, protocol=protocol))
                else:
                    config = af.preset(PRESETS[name], ipc=ipc, seed=order, **settings)
                    folder = options.output / f"{data.name}-ipc{ipc}-order{order}-{first}-{last}-{name}"
                    sets.append(af.distill(part, config, folder, preprocessing=space, resume=folder.exists()))
            remembered = {name: join(sets) for name, sets in memory.items()}
            remembered |= {name: of_classes(synthetic, classes[:last]) for name, synthetic in given.items()}
            for name, synthetic in remembered.items():
                result = af.evaluate(
                    synthetic, seen, networks=options.networks, protocol=protocol, seed=order,
                    architecture={"width": settings.get("width", 128)}, record=options.output / f"{name}.json",
                )  # fmt: skip
                accuracies.setdefault((name, last), []).append(result.mean)
                print(f"order {order}, {last} classes, {name}: {result.mean:.1f} ± {result.std:.1f} %")
    print(f"written: {draw(accuracies, f'{data.name}, {ipc} images per class', options.output / 'continual.png')}")


def restrict(data: ImageData, classes: Sequence[int]) -> ImageData:
    """Return the data with some classes only, numbered as they are listed."""
    place = torch.full((data.num_classes,), -1)
    place[list(classes)] = torch.arange(len(classes))
    parts = []
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        kept = place[labels] >= 0
        parts += [images[kept], place[labels[kept]]]
    return ImageData.from_tensors(data.name, [data.class_names[k] for k in classes], *parts)


def join(sets: Sequence[af.SyntheticSet]) -> af.SyntheticSet:
    """Join sets of different classes in one model space."""
    before = np.cumsum([0] + [len(one.class_names) for one in sets])
    labels = torch.cat([one.labels + int(first) for one, first in zip(sets, before, strict=False)])
    names = [name for one in sets for name in one.class_names]
    return af.SyntheticSet(torch.cat([one.images for one in sets]), labels, names, sets[0].preprocessing)


def of_classes(synthetic: af.SyntheticSet, classes: Sequence[int]) -> af.SyntheticSet:
    """Return the part of a set that is of some classes, numbered as they are listed."""
    rows = [(synthetic.labels == k).nonzero().flatten() for k in classes]
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(own) for own in rows]))
    names = [synthetic.class_names[k] for k in classes]
    return af.SyntheticSet(synthetic.images[torch.cat(rows)], labels, names, synthetic.preprocessing)


def read(path: Path, data: ImageData) -> af.SyntheticSet:
    """Read a set of all classes: one of this project, a file of another one, or a folder of images."""
    return read_set(path, data) if path.is_dir() else af.SyntheticSet.load(path, data)


def draw(accuracies: dict[tuple[str, int], list[float]], title: str, path: Path) -> Path:
    """Draw accuracy over the number of classes, mean and deviation over orders, as PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    counts = sorted({count for _, count in accuracies})
    for name in dict.fromkeys(name for name, _ in accuracies):
        mean, deviation = (np.array([of(accuracies[name, count]) for count in counts]) for of in (np.mean, np.std))
        (line,) = axes.plot(counts, mean, marker="o", label=name)
        axes.fill_between(counts, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="classes learnt", ylabel="test accuracy on them, %", title=title, xticks=counts)
    return save_curves(figure, path)


if __name__ == "__main__":
    main()
