"""How many kernels a step launches on a GPU, counted without one."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import atom_fast as af
from atom_fast.data import whitening
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.config import preset
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation
from benchmarks.live_bytes import redispatched
from benchmarks.profile import random_data
from tests.launches import recorded
from tests.workloads import MODULES

_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "_unsafe_view", "lift_fresh"}


class Operators(TorchDispatchMode):
    """Names of the operators of PyTorch that write memory; each is a kernel, or a few (a sort, a reduction)."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace != "aten":
            return redispatched(self, function, arguments, keywords)
        name = function._schema.name.removeprefix("aten::")
        aliases = [result.alias_info for result in function._schema.returns]
        is_view = aliases and all(alias is not None and not alias.is_write for alias in aliases)
        if name not in _NO_KERNEL and not is_view:
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


def count(monkeypatch, **settings):
    """Return the operators and Triton's kernels of a step of CIFAR-10's shape, whitened as on a GPU."""
    data = random_data(10, 3, 32, 32, per_class=20)
    settings = {"ipc": 2, "real_batch": 4, "width": 16, **settings}
    config = preset("paper", **settings).resolve(data.image_shape, "cifar10", torch.device("cpu"))
    size = 3 * 32 * 32
    matrices = {"zca_matrix": torch.eye(size), "zca_inverse": torch.eye(size)}
    preprocessing = Preprocessing.from_tensors({"zca_mean": torch.zeros(3, 32, 32), **matrices})
    monkeypatch.setattr(whitening, "_keeps_bytes", lambda device: True)
    run = Distillation(config, data, preprocessing, initial_images(config, data, preprocessing))
    kernels = [importlib.import_module(f"atom_fast.kernels.{name}") for name in MODULES]
    with af.backend("triton"), recorded(*kernels) as launches, Operators() as operators:
        run._step()
    return operators.names, launches


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted without launching, which needs the interpreter")
def test_a_step_is_at_most_45_kernels(monkeypatch):
    operators, launches = count(monkeypatch, norm="instance")
    assert len(operators) + len(launches) <= 45, (operators, [launch.kernel for launch in launches])
    for launch in launches:  # copies that the operators make inside are not counted: here are none
        if launch.kernel == "conv_block_forward_kernel":
            assert launch.arguments["p_filter"].is_contiguous()
