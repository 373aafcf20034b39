"""The kernels in C: how they are built and kept, and that threads do not change a bit. What they compute is tested with
their operators."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import atom_fast as af
from atom_fast import _native
from atom_fast.ops.batch_norm import batch_norm
from atom_fast.ops.block import attention_block
from atom_fast.ops.first_block import first_block
from atom_fast.ops.instance_norm import instance_norm

CODE = """
import torch, atom_fast as af
from atom_fast import _native
from atom_fast.ops.block import attention_block
x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
for _ in range(2):
    got = attention_block(x)
with af.backend("reference"):
    expected = attention_block(x)
torch.testing.assert_close(got, expected)
print(_native.is_built())
"""


def start(cache, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "XDG_CACHE_HOME": str(cache)} | environment,
    )


def finish(process):
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return printed.strip(), errors


@pytest.mark.fault(
    "Kernels in C",
    "two processes need the kernels before they are built",
    "each builds them beside their place and moves them there; one library is kept",
)
def test_processes_that_start_together_build_one_library(tmp_path):
    for process in [start(tmp_path) for _ in range(2)]:
        assert finish(process) == ("True", "")
    assert len(list((tmp_path / "atom_fast").iterdir())) == 1


@pytest.mark.fault("Kernels in C", "the library that is kept is damaged", "it is built anew")
def test_a_damaged_library_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = _native._path()
    library.write_bytes(b"\x7fELF")
    assert finish(start(tmp_path)) == ("True", "")
    assert library.stat().st_size > 10_000


@pytest.mark.fault("Kernels in C", "the folder for caches cannot be made", "they are built for this process alone")
def test_a_cache_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    assert finish(start(tmp_path / "file")) == ("True", "")


@pytest.mark.fault(
    "Kernels in C",
    "no C compiler is there, or it fails",
    "one warning says so; PyTorch's operators give the same numbers",
)
@pytest.mark.parametrize(
    "compiler, message", [("none", "no C compiler was found (none)"), ("false", "ended with status 1")]
)
def test_without_a_compiler_pytorch_takes_over_and_says_so_once(compiler, message, tmp_path):
    printed, errors = finish(start(tmp_path, CC=compiler))
    assert printed == "False"
    assert errors.count("could not be built, so PyTorch's operators take their place") == 1
    assert message in errors


def test_other_types_are_refused_before_they_are_read():
    with pytest.raises(TypeError, match="take float32 and int64 on a CPU; got torch.float64 on cpu"):
        _native.run("block_statistics", torch.zeros(1, dtype=torch.float64))


def images(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)


OPERATORS = {
    "block": lambda x: attention_block(x.repeat(1, 7, 1, 1)),
    "batch block": lambda x: attention_block(x.repeat(1, 7, 1, 1), norm="batch"),
    "first block": lambda x: first_block(x, images(20, 3, 3, 3)),
    "batch first block": lambda x: first_block(x, images(20, 3, 3, 3), norm="batch"),
    "batch norm": lambda x: [batch_norm(x, torch.ones(3), torch.ones(3), rectify=True, pool=True)],
    "instance norm": lambda x: [instance_norm(x, torch.ones(3), torch.ones(3), rectify=True, pool=True)],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_threads_change_no_bit(name):
    def results(threads, x):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with af.backend("native"):
                outputs = OPERATORS[name](x.requires_grad_())
                return [*outputs, *torch.autograd.grad(sum(output.square().sum() for output in outputs), x)]
        finally:
            torch.set_num_threads(before)

    alone = results(1, images(5, 3, 10, 14))
    for threads in (2, 3, 8):
        assert all(map(torch.equal, results(threads, images(5, 3, 10, 14)), alone))


@pytest.mark.parametrize("name", [name for name in OPERATORS if "batch" not in name])
def test_a_sample_does_not_depend_on_the_others(name):
    def results(x):
        with af.backend("native"):
            outputs = OPERATORS[name](x.requires_grad_())
            return [*outputs, *torch.autograd.grad(sum(output.square().sum() for output in outputs), x)]

    together = results(images(4, 3, 8, 8))
    alone = results(images(4, 3, 8, 8)[2:3].detach())
    assert all(torch.equal(a[2:3], b) for a, b in zip(together, alone, strict=True))
