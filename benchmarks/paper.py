"""Table 3 of the ATOM paper as printed: seconds a step (mean, deviation) and peak memory in MB, A100, CIFAR-10."""

DEVICE = "A100"
IPCS = (1, 10, 50)
SECONDS = {
    "dc": ((0.16, 0.01), (3.31, 0.02), (15.74, 0.10)),
    "dsa": ((0.22, 0.02), (4.47, 0.12), (20.13, 0.58)),
    "dm": ((0.08, 0.02), (0.08, 0.02), (0.08, 0.02)),
    "mtt": ((0.36, 0.23), (0.40, 0.20), "OOM"),
    "dam": ((0.09, 0.01), (0.08, 0.01), (0.16, 0.04)),
    "atom-channel": ((0.08, 0.02), (0.08, 0.02), (0.13, 0.03)),
    "atom": ((0.10, 0.02), (0.10, 0.01), (0.17, 0.02)),
}
MEGABYTES = {
    "dc": (3515, 3621, 4527),
    "dsa": (3513, 3639, 4539),
    "dm": (3323, 3455, 3605),
    "mtt": (2711, 8049, "OOM"),
    "dam": (3452, 3561, 3724),
    "atom-channel": (3152, 3263, 4151),
    "atom": (3601, 4314, 5134),
}
# Steps of one distillation. ATOM: §4.1; the others: the defaults of their public code, which the paper builds on.
ITERATIONS = {"dc": 1000, "dsa": 1000, "dm": 20000, "dam": 8000, "atom-channel": 8000, "atom": 8000}
