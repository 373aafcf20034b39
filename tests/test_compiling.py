"""The backend "compile": the same numbers as lean PyTorch, for any number of samples, and a clear error without it."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import atom_fast as af
from atom_fast._backend import resolve_backend
from atom_fast.data.augmentation import augment, draw_augmentation
from atom_fast.ops import block_torch
from atom_fast.ops.block import attention_block, reference_block
from atom_fast.ops.first_block import first_block
from tests.test_step import make_data, make_run

COMPILERS = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]


@pytest.fixture
def compiler():
    """A test that compiles needs one; that users without one are told so is a test of its own."""
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler here")


def random_block(shape, dtype=torch.float32, layout=torch.channels_last, affine=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    weight, bias = torch.rand(2, shape[1], generator=generator, dtype=torch.float64) + 0.5 if affine else (None, None)
    x = x.to(dtype).contiguous(memory_format=layout)
    return x, *(None if part is None else part.to(dtype) for part in (weight, bias))


def run_block(backend, x, *arguments, function=attention_block, **settings):
    x = x.detach().requires_grad_()
    with af.backend(backend):
        pooled, maps = function(x, *arguments, **settings)
        weights = (torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view(part.shape) for part in (pooled, maps))
        total = sum((part * weight).sum() for part, weight in zip((pooled, maps), weights, strict=True))
        (gradient,) = torch.autograd.grad(total, x)
    return pooled.detach(), maps.detach(), gradient


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "powers"),
    [
        ((5, 8, 6, 6), torch.float32, torch.channels_last, (4.0, 4.0)),
        ((3, 8, 5, 7), torch.float64, torch.channels_last, (2.0, 3.5)),
        ((2, 4, 6, 6), torch.float32, torch.contiguous_format, (None, 8.0)),
        ((2, 8, 4, 4), torch.bfloat16, torch.channels_last, (None, None)),
    ],
    ids=str,
)
def test_a_compiled_block_is_the_block(shape, dtype, layout, powers, compiler, monkeypatch):
    # A piece of two samples, and a last one of fewer where they are odd.
    monkeypatch.setattr(block_torch, "piece_bytes", lambda device: 0)
    monkeypatch.setattr("atom_fast.ops.block.piece_bytes", lambda device: 2 * x[0].numel() * x.element_size())
    x, weight, bias = random_block(shape, dtype, layout, affine=powers != (None, 8.0))
    settings = {"spatial_power": powers[0], "channel_power": powers[1]}
    expected = run_block("torch", x, weight, bias, **settings)
    actual = run_block("compile", x, weight, bias, **settings)
    for one, other in zip(actual, expected, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=None, atol=None)


def test_a_compiled_first_block_is_the_first_block(compiler):
    images, filters = torch.randn(5, 3, 8, 8), torch.randn(8, 3, 3, 3)
    expected, actual = (run_block(name, images, filters, function=first_block) for name in ("torch", "compile"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "compile"])
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_powers_that_would_leave_the_range_are_scaled(size, backend, request):
    """(1e12)^8 is beyond float32, (1e-12)^8 below it: the maps are of the features over their level then."""
    if backend == "compile":
        request.getfixturevalue("compiler")
    x, weight, bias = random_block((3, 8, 6, 6))
    weight, bias = weight * size, bias * size
    pooled, maps, gradient = run_block(backend, x, weight, bias, spatial_power=8.0, channel_power=4.0)
    wide = x.double().requires_grad_()
    expected = reference_block(wide, weight.double(), bias.double(), 1e-5, 8.0, 4.0)
    torch.testing.assert_close(maps, expected.maps.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pooled, expected.pooled.float(), rtol=1e-4, atol=1e-5 * size)
    exact = run_block("reference", wide, weight.double(), bias.double(), spatial_power=8.0, channel_power=4.0)[2]
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-3, atol=1e-5 * max(1, size))


@pytest.mark.parametrize("groups", [None, torch.arange(3).repeat_interleave(4), torch.tensor([2, 0, 1, 0, 2])], ids=str)
def test_compiled_augmentation_is_the_augmentation(groups, compiler):
    count = 3 if groups is None else len(groups)
    images = torch.randn(count, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    parameters = draw_augmentation(3, torch.Generator().manual_seed(1))
    results = []
    for backend in ("torch", "compile"):
        with af.backend(backend):
            augmented = augment(images, parameters, groups)
            results.append((augmented.detach(), *torch.autograd.grad(augmented.square().sum(), images)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_compiled_steps_are_the_steps(compiler):
    """The same images to rounding, for whichever number of classes at once."""
    found = []
    for settings in ({}, {"compile": True}, {"compile": True, "class_chunk": 2}):
        run, _ = make_run(make_data(), **settings)
        start = run.images.detach().clone()
        for iteration in range(1, 4):
            run.step(iteration)
        assert (run.images - start).abs().max() > 1e-3, "the images must have moved for this to mean anything"
        found.append(run.images)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-5)


def test_without_a_compiler_the_error_says_what_is_needed(tmp_path):
    code = (
        "import torch, atom_fast\nfrom atom_fast.ops.block import attention_block\n"
        "with atom_fast.backend('compile'): attention_block(torch.randn(2, 4, 4, 4))"
    )
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: backend 'compile' needs a C++ compiler, and none was found" in done.stderr
    assert "use backend 'torch'" in done.stderr.splitlines()[-1]


def test_only_a_cpu_is_compiled_for():
    with (
        af.backend("compile"),
        pytest.raises(RuntimeError, match="for CPU tensors, got one on meta; use backend 'auto'"),
    ):
        resolve_backend(torch.empty(1, device="meta"))
