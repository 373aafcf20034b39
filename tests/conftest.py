"""Fixtures of all tests: the device of kernels, and uninitialised memory filled with NaN."""

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import pytest
from hypothesis import HealthCheck, settings

import atom_fast as af
from atom_fast.ops import native
from tests.interpreter import hasten

hasten()
native.is_built()  # once before any test: some limit a process's time or disk space
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
settings.register_profile(
    "atom_fast", deadline=None, print_blob=True, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("atom_fast")


def pytest_collection_finish(session):
    """Exempt imported modules and collected tests from garbage collection, which took a third of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def pytest_collection_modifyitems(config, items):
    """Deselect tests marked ``gpu``, and report them as deselected, if there is no CUDA device."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(scope="session")
def device():
    """Return the device that kernels are tested on: CUDA, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def place(backend, device):
    """Return the device of a test with parameter ``backend``: "torch" runs the kernels in C, on a CPU."""
    return torch.device("cpu") if backend == "torch" else device


@pytest.fixture
def triton_backend():
    """Run the test with the fused kernels."""
    with af.backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every uninitialised tensor with NaN (or the largest integer), so that an unwritten output cannot pass."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])
