"""A set as DD-Ranking 0.2.0 tests it: tensors, its settings as YAML, and a program that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from atom_fast._files import new_folder
from atom_fast.exports.public import standardised
from atom_fast.foreign.spaces import CONSTANTS

if TYPE_CHECKING:
    from atom_fast.synthetic import SyntheticSet

# Their classes are numbered alike there. Tiny ImageNet's are numbered in the order of their codes, which a set lacks.
_DATASETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}

_SETTINGS = """\
# DD-Ranking 0.2.0: label-robust score with hard labels. Settings of its demo, except eval_full_data: it has no accuracy
# of a ConvNet trained on all images on record, and measures it.
dataset: {dataset}
real_data_path: ./data
ipc: {ipc}
im_size: [{height}, {width}]
model_name: ConvNet-3
use_torchvision: false
use_zca: {zca}
data_aug_func: dsa
aug_params: {{flip: 0.5, rotate: 15, saturation: 2, brightness: 1, contrast: 0.5, scale: 1.2, crop: 0.125, cutout: 0.5}}
custom_train_trans: null
custom_val_trans: null
optimizer: sgd
lr_scheduler: step
step_size: 500
weight_decay: 0.0005
momentum: 0.9
num_epochs: 1000
num_eval: 5
syn_batch_size: 128
real_batch_size: 256
num_workers: 4
device: cuda
dist: false
random_data_format: tensor
random_data_path: ./random_data
eval_full_data: true
save_path: ./results/scores.csv
"""

_PROGRAM = '''\
"""Test the set in this folder by DD-Ranking 0.2.0: python evaluate.py"""

import math

import torch
from ddranking.config import Config
from ddranking.metrics import LabelRobustScoreHard, hard_label

hard_label.save_results = lambda *_: None  # its table has columns of different lengths, and fails when all is trained
scores = LabelRobustScoreHard(config=Config.from_file("lrs_hard_label.yaml")).compute_metrics(
    image_tensor=torch.load("images.pt"), hard_labels=torch.load("labels.pt")
)
recovery, improvement = (scores[f"{name}_mean"] / 100 for name in ("hard_label_recovery", "improvement_over_random"))
alpha = 0.5 * improvement - 0.5 * recovery  # in fractions, as the score is defined; the package puts in per cent
score = (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
print(f"HLR {recovery:.3f} IOR {improvement:.3f} LRS {score:.3f}")
'''


def export_ddranking(synthetic: SyntheticSet, path: Path) -> Path:
    """Write ``images.pt``, ``labels.pt``, ``lrs_hard_label.yaml`` and ``evaluate.py``; see :meth:`SyntheticSet.export`.

    Images of kind "standard" are normalised by DD-Ranking's constants, CIFAR-10's in DC's code, for CIFAR-100 too; ones
    of kind "zca" stay as they are, because DD-Ranking whitens the test images alike.
    """
    dataset, kind = synthetic.metadata.get("dataset"), synthetic.preprocessing.kind
    if dataset not in _DATASETS:
        raise ValueError(f"DD-Ranking tests sets of {' and '.join(_DATASETS)}; this one is of {dataset!r}")
    if kind not in ("standard", "zca"):
        raise ValueError(f"DD-Ranking takes sets of preprocessing standard or zca; this one has {kind}")
    if synthetic.soft_labels is not None:
        raise ValueError("DD-Ranking's score of hard labels needs hard labels; this set has soft ones")
    if synthetic.ipc is None:
        raise ValueError("DD-Ranking needs as many images in every class; this set's classes differ in size")
    images = synthetic.images if kind == "zca" else standardised(synthetic, *CONSTANTS["standard_2023"])
    height, width = images.shape[2:]
    with new_folder(path) as folder:
        torch.save(images.float().cpu().contiguous(), folder / "images.pt")
        torch.save(synthetic.labels.cpu(), folder / "labels.pt")
        settings = _SETTINGS.format(
            dataset=_DATASETS[dataset], ipc=synthetic.ipc, height=height, width=width,
            zca=str(kind == "zca").lower(),
        )  # fmt: skip
        (folder / "lrs_hard_label.yaml").write_text(settings, "utf-8")
        (folder / "evaluate.py").write_text(_PROGRAM, "utf-8")
    return path
