"""Networks trained on a set: the public code's loop, and this project's ensembles of several sizes, side by side.

    python -m pytest benchmarks/test_evaluate.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

The sets are those of ``benchmarks/evaluation.py``. A round is ``NETWORKS`` networks of ``EPOCHS`` epochs and one test
each, with everything that comes before the first step; more epochs only dilute that. ``extra_info`` tells milliseconds
a network and epoch, and what 20 networks of 1,000 epochs would take at that rate.
"""

import pytest
import torch

from .evaluation import ensemble, loop, make_data

CUDA = torch.cuda.is_available()
NETWORKS, EPOCHS = (8, 50) if CUDA else (4, 30)
TOGETHER = (1, 2, 4, 8) if CUDA else (1, 2)


@pytest.fixture(scope="module")
def data():
    return make_data()


def test_loop_of_the_public_code(benchmark, data):
    measure(benchmark, loop(data, NETWORKS, EPOCHS), data)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("together", TOGETHER)
def test_ensemble(benchmark, data, together, precision):
    measure(benchmark, ensemble(data, NETWORKS, EPOCHS, together=together, precision=precision), data)


def measure(benchmark, train, data):
    """Time ``train`` after one call of it."""

    def run():
        train()
        if CUDA:
            torch.cuda.synchronize()

    shape = list(data.image_shape)
    benchmark.group = f"{NETWORKS} networks, {EPOCHS} epochs, {len(data.train_images)} images of {shape}"
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    milliseconds = benchmark.stats.stats.median / NETWORKS / EPOCHS * 1e3
    benchmark.extra_info["ms a network and epoch"] = round(milliseconds, 3)
    benchmark.extra_info["s for 20 networks of 1,000 epochs"] = round(milliseconds * 20, 1)
