"""Every figure that the benchmarks take from the ATOM paper (arXiv 2405.01373), as printed.

Accuracies are in per cent, mean and standard deviation. A missing figure is a missing key.
"""

from __future__ import annotations

Accuracy = tuple[float, float | None]

SETS, NETWORKS = 5, 20  # section 4.1: synthetic sets per cell, networks trained on each

# Table 1: CIFAR-10, CIFAR-100 and Tiny ImageNet by images per class. Its footnote: DD and LD used AlexNet on CIFAR-10.
TABLE1_NAME = "Table 1"
TABLE1_CELLS = tuple((dataset, ipc) for dataset in ("cifar10", "cifar100", "tiny") for ipc in (1, 10, 50))
_TABLE1 = {
    "Random": "14.4 2.0, 26.0 1.2, 43.4 1.0, 4.2 0.3, 14.6 0.5, 30.0 0.4, 1.4 0.1, 5.0 0.2, 15.0 0.4",
    "Herding": "21.5 1.2, 31.6 0.7, 40.4 0.6, 8.3 0.3, 17.3 0.3, 33.7 0.5, 2.8 0.2, 6.3 0.2, 16.7 0.3",
    "K-Center": "21.5 1.3, 14.7 0.9, 27.0 1.4, 8.4 0.3, 17.3 0.3, 30.5 0.3, -, -, -",
    "Forgetting": "13.5 1.2, 23.3 1.0, 23.3 1.1, 4.5 0.2, 15.1 0.3, -, 1.6 0.1, 5.1 0.2, 15.0 0.3",
    "DD": "-, 36.8 1.2, -, -, -, -, -, -, -",
    "LD": "25.7 0.7, 38.3 0.4, 42.5 0.4, 11.5 0.4, -, -, -, -, -",
    "DC": "28.3 0.5, 44.9 0.5, 53.9 0.5, 12.8 0.3, 25.2 0.3, 30.6 0.6, 5.3 0.1, 12.9 0.1, 12.7 0.4",
    "DCC": "32.9 0.8, 49.4 0.5, 61.6 0.4, 13.3 0.3, 30.6 0.4, -, -, -, -",
    "DSA": "28.8 0.7, 52.1 0.5, 60.6 0.5, 13.9 0.3, 32.3 0.3, 42.8 0.4, 5.7 0.1, 16.3 0.2, 15.1 0.2",
    "DM": "26.0 0.8, 48.9 0.6, 63.0 0.4, 11.4 0.3, 29.7 0.3, 43.6 0.4, 3.9 0.2, 12.9 0.4, 25.3 0.2",
    "GLaD": "28.0 0.8, 46.7 0.5, 59.9 0.7, -, -, -, -, -, -",
    "CAFE": "30.3 1.1, 46.3 0.6, 55.5 0.6, 12.9 0.3, 27.8 0.3, 37.9 0.3, -, -, -",
    "CAFE+DSA": "31.6 0.8, 50.9 0.5, 62.3 0.4, 14.0 0.3, 31.5 0.2, 42.9 0.2, -, -, -",
    "VIG": "26.5 1.2, 54.6 0.1, 35.6 0.6, 17.8 0.1, 29.3 0.1, -, -, -, -",
    "KIP": "29.8 1.0, 46.1 0.7, 53.2 0.7, 12.0 0.2, 29.0 0.3, -, -, -, -",
    "DAM": "32.0 1.2, 54.2 0.8, 67.0 0.4, 14.5 0.5, 34.8 0.5, 49.4 0.3, 8.3 0.4, 18.7 0.3, 28.7 0.3",
    "ATOM": "34.8 1.0, 57.9 0.7, 68.8 0.5, 18.1 0.4, 35.7 0.4, 50.2 0.3, 9.1 0.2, 19.5 0.4, 29.1 0.3",
}
LEARNT_LABELS = ("LD",)
FULL_DATA = {"cifar10": (84.8, 0.1), "cifar100": (56.2, 0.3), "tiny": (37.6, 0.4)}

# Table 2: CIFAR-10 with 50 images per class, distilled with a ConvNet.
TABLE2_CELL = ("cifar10", 50)
TABLE2_NETWORKS = ("convnet", "alexnet", "vgg11", "resnet18", "vit")
_TABLE2 = {
    "DC": "53.9 0.5, 28.8 0.7, 38.8 1.1, 20.9 1.0, 30.1 0.5, 34.5 0.8",
    "CAFE": "62.3 0.4, 43.2 0.4, 48.8 0.5, 43.3 0.7, 22.7 0.7, 44.1 0.5",
    "DSA": "60.6 0.5, 53.7 0.6, 51.4 1.0, 47.8 0.9, 43.3 0.4, 51.4 0.7",
    "DM": "63.0 0.4, 60.1 0.5, 57.4 0.8, 52.9 0.4, 45.2 0.4, 55.7 0.5",
    "KIP": "56.9 0.4, 53.2 1.6, 53.2 0.5, 47.6 0.8, 18.3 0.6, 45.8 0.8",
    "DAM": "67.0 0.4, 63.9 0.9, 64.8 0.5, 60.2 0.7, 48.2 0.8, 60.8 0.7",
    "ATOM": "68.8 0.4, 64.1 0.7, 66.4 0.6, 64.5 0.6, 49.5 0.7, 62.7 0.6",
}

# Table 3: one step on CIFAR-10 on an A100, by images per class: seconds (mean, deviation) and peak memory in MB.
TABLE3_DEVICE = "A100"
TABLE3_IPCS = (1, 10, 50)
TABLE3_SECONDS = {
    "dc": ((0.16, 0.01), (3.31, 0.02), (15.74, 0.10)),
    "dsa": ((0.22, 0.02), (4.47, 0.12), (20.13, 0.58)),
    "dm": ((0.08, 0.02), (0.08, 0.02), (0.08, 0.02)),
    "mtt": ((0.36, 0.23), (0.40, 0.20), "OOM"),
    "dam": ((0.09, 0.01), (0.08, 0.01), (0.16, 0.04)),
    "atom-channel": ((0.08, 0.02), (0.08, 0.02), (0.13, 0.03)),
    "atom": ((0.10, 0.02), (0.10, 0.01), (0.17, 0.02)),
}
TABLE3_MEGABYTES = {
    "dc": (3515, 3621, 4527),
    "dsa": (3513, 3639, 4539),
    "dm": (3323, 3455, 3605),
    "mtt": (2711, 8049, "OOM"),
    "dam": (3452, 3561, 3724),
    "atom-channel": (3152, 3263, 4151),
    "atom": (3601, 4314, 5134),
}
# Steps of one distillation. ATOM: section 4.1; others: the defaults of their public code, which the paper builds on.
ITERATIONS = {"dc": 1000, "dsa": 1000, "dm": 20000, "dam": 8000, "atom-channel": 8000, "atom": 8000}

# Table 4: CIFAR-10 with 50 images per class, by what is matched beside the mean embeddings.
TABLE4_CELL = ("cifar10", 50)
TABLE4 = {
    "mmd": (63.0, 0.4),
    "feature-maps": (60.8, 0.6),
    "dam": (67.0, 0.7),
    "atom-channel": (68.6, 0.3),
    "atom": (68.8, 0.5),
}

# Table 5: CIFAR-10 with 10 images per class, by p_c and then p_s.
TABLE5_CELL = ("cifar10", 10)
POWERS = (1, 2, 4, 8)
_TABLE5 = {1: "57.4 57.5 57.0 56.2", 2: "58.2 57.5 57.2 56.3", 4: "58.4 58.5 57.9 57.6", 8: "58.8 58.7 58.2 57.8"}

# Table 6: CIFAR-10 with 50 images per class: accuracy of the chosen candidate, Spearman's rank correlation with
# training on the whole data, minutes to train all candidates, and images to store.
TABLE6_CELL = ("cifar10", 50)
TABLE6: dict[str, tuple[float, float, float, int | None]] = {
    "random": (88.9, 0.70, 206.4, 500),
    "dsa": (87.2, 0.66, 206.4, 500),
    "dm": (87.2, 0.71, 206.6, 500),
    "cafe": (83.6, 0.59, 206.4, 500),
    "dam": (89.0, 0.72, 206.4, 500),
    "atom": (88.9, 0.75, 206.4, None),
    "early": (88.9, 0.69, 206.2, 50_000),
    "reference": (89.2, 1.00, 5168.9, 50_000),
}

FIGURE3_CELL = ("cifar10", 50)


def _row(text: str) -> list[Accuracy | None]:
    return [None if entry.strip() == "-" else tuple(map(float, entry.split())) for entry in text.split(",")]


TABLE1: dict[str, dict[tuple[str, int], Accuracy]] = {
    method: {cell: value for cell, value in zip(TABLE1_CELLS, _row(text), strict=True) if value is not None}
    for method, text in _TABLE1.items()
}
TABLE2: dict[str, dict[str, Accuracy]] = {
    method: dict(zip((*TABLE2_NETWORKS, "average"), _row(text), strict=True)) for method, text in _TABLE2.items()
}
TABLE5: dict[tuple[int, int], Accuracy] = {
    (channel, spatial): (float(value), None)
    for channel, text in _TABLE5.items()
    for spatial, value in zip(POWERS, text.split(), strict=True)
}
