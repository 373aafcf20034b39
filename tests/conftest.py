"""Shared by every test: where kernels run, and memory that is poisoned before anything is written to it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported by anything

import pytest
from hypothesis import HealthCheck, settings

import atom_fast as af
from atom_fast.ops import native
from tests.interpreter import hasten

hasten()
native.is_built()  # once and before any test, some of which leave a process little time or room on the disk
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
settings.register_profile(
    "atom_fast", deadline=None, print_blob=True, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("atom_fast")


def pytest_collection_modifyitems(config, items):
    """Tests marked ``gpu`` are deselected, and counted as such, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(scope="session")
def device():
    """The device kernels are tested on: CUDA, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def place(backend, device):
    """The device of a test that is parametrised by ``backend``: "torch" runs the kernels in C, on a CPU."""
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
