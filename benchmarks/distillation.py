"""Whole distillations with evaluation, timed: ``python -m benchmarks.distillation --data DIR --out DIR --ipc 10``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch

from atom_fast.data import load_data
from atom_fast.distill import distill, preset
from atom_fast.evaluate import evaluate, random_selection
from atom_fast.report import save_synthetic_grid

from .harness import environment, save_results


def main(arguments: list[str] | None = None) -> int:
    """Distil at each size and keep each result in ``distillation.json`` as it ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of images, train/ and test/")
    parser.add_argument("--name", default="CIFAR-10 (JPEG q75)", help="what the data are called in results")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--ipc", action="append", type=int, help="images a class; may be given again (default 1 10 50)")
    parser.add_argument("--iterations", type=int, default=8000, help="steps of each distillation (default 8000)")
    parser.add_argument("--networks", type=int, default=3, help="networks of each evaluation (default 3)")
    parser.add_argument("--preset", default="paper", help="of the distillation (default paper)")
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_data("folder", options.data).to(device)
    records = []
    for ipc in options.ipc or [1, 10, 50]:
        records.append(run(data, ipc, options))
        about = {"data": options.name, "environment": environment(device)}
        save_results(options.out / "distillation.json", {**about, "runs": records})
        print(describe(records[-1]), flush=True)
    return 0


def run(data, ipc: int, options: argparse.Namespace) -> dict:
    """Distil, evaluate, and evaluate as many random real images; the picture is ``distilled-ipc{ipc}.png``."""
    # ZCA, as in the paper, where kornia can fit it.
    preprocessing = "zca" if importlib.util.find_spec("kornia") else "standard"
    config = preset(options.preset, ipc=ipc, iterations=options.iterations, preprocessing=preprocessing)
    folder = options.out / "runs" / f"ipc{ipc}"
    started = time.perf_counter()
    synthetic = distill(config, data, folder, progress=False)
    seconds = time.perf_counter() - started
    save_synthetic_grid(synthetic, options.out / f"distilled-ipc{ipc}.png")

    synthetic = synthetic.to(data.train_images.device)
    chosen = random_selection(data, ipc, seed=0)
    sets = {
        "distilled": (synthetic.images, synthetic.labels),
        "random": (synthetic.preprocessing.to_model(data.train_images[chosen]), data.train_labels[chosen]),
    }
    accuracies = {
        name: evaluate(*images, data, synthetic.preprocessing, networks=options.networks, progress=False).to_dict()
        for name, images in sets.items()
    }
    return {"ipc": ipc, "config": config.to_dict(), "seconds": seconds, **accuracies}


def describe(record: dict) -> str:
    """A result in a line."""
    distilled, random = record["distilled"], record["random"]
    return (
        f"ipc {record['ipc']}: {record['config']['iterations']} steps and set-up in {record['seconds']:.1f} s, "
        f"accuracy {distilled['accuracy_mean']:.1f} ± {distilled['accuracy_std']:.1f} %, "
        f"random {random['accuracy_mean']:.1f} ± {random['accuracy_std']:.1f} % "
        f"({distilled['networks']} networks, {distilled['seconds']:.1f} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
