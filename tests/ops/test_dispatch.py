"""One table of implementations, and a backend that belongs to its thread, its task and its block."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import atom_fast as af
from atom_fast.ops import (
    attention,
    augmentation,
    batch_norm,
    conv_block,
    dispatch,
    instance_norm,
    matching,
    norm_block,
    partition,
)
from atom_fast.ops.dispatch import TABLE, resolve_backend

MODULES = attention, augmentation, batch_norm, conv_block, instance_norm, matching, norm_block, partition
X = torch.zeros(1)


def test_every_operation_is_a_row_of_the_stem_of_its_module():
    assert sorted(TABLE) == sorted(module.__name__.rpartition(".")[2] for module in MODULES)
    for row in TABLE.values():
        assert {"triton", "eager"} <= set(row) <= {"triton", "c", "eager", "reference"}


def test_names_are_checked():
    with pytest.raises(ValueError, match="auto, triton, torch, reference; got 'native'"), af.backend("native"):
        pass


def test_contexts_nest_and_end_with_an_error():
    with af.backend("reference"):
        with pytest.raises(KeyError), af.backend("torch"):
            assert resolve_backend(X) == "torch"
            raise KeyError
        assert resolve_backend(X) == "reference"
    assert resolve_backend(X) == "torch"


def test_a_thread_has_its_own():
    seen = []
    entered, left = threading.Event(), threading.Event()

    def work():
        seen.append(resolve_backend(X))
        with af.backend("reference"):
            entered.set()
            left.wait()
            seen.append(resolve_backend(X))

    thread = threading.Thread(target=work)
    with af.backend("reference"):
        thread.start()
        entered.wait()
    assert resolve_backend(X) == "torch"  # though the other thread entered the same later
    left.set()
    thread.join()
    assert seen == ["torch", "reference"] and resolve_backend(X) == "torch"


def test_a_task_has_its_own():
    async def work(name, first, second):
        with af.backend(name):
            first.set()
            await second.wait()
            return resolve_backend(X)

    async def main():
        one, two = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(work("reference", one, two), work("torch", two, one))

    assert asyncio.run(main()) == ["reference", "torch"]
    assert resolve_backend(X) == "torch"


def test_a_suspended_generator_leaves_nothing_behind():
    def suspended():
        with af.backend("reference"):
            yield resolve_backend(X)

    with af.backend("torch"):
        generator = suspended()
        assert next(generator) == "reference"
    generator.close()  # after the context that it was started in
    assert resolve_backend(X) == "torch" and dispatch._asked_for() == "auto"


def test_a_compiled_function_follows_the_backend(device):
    compiled = torch.compile(lambda f: af.spatial_attention(f, 3.0), fullgraph=True, backend="eager")
    f = torch.randn(2, 3, 4, 4, device=device)
    for name in ("reference", "torch", "reference"):
        with af.backend(name):
            assert torch.equal(compiled(f), af.spatial_attention(f, 3.0))
            f.requires_grad_()
            kind = type(compiled(f).grad_fn).__name__
            assert ("Generated" in kind) == (name == "torch"), kind
            f.requires_grad_(False)


def test_triton_on_cpu_tensors_without_the_interpreter_says_what_to_do():
    code = """
import torch, atom_fast as af
with af.backend("triton"):
    af.spatial_attention(torch.ones(1, 2, 3, 3))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "needs CUDA tensors, got one on cpu; use backend 'torch'" in done.stderr
