"""The kernels in C: how they are built and kept, and that threads do not change a bit. What they compute is tested with
their operators."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.fx.experimental.proxy_tensor

import atom_fast as af
from atom_fast import _native
from atom_fast.distillation.live_bytes import count_peak
from atom_fast.ops.batch_norm import batch_norm
from atom_fast.ops.conv_block import conv_block
from atom_fast.ops.instance_norm import instance_norm
from atom_fast.ops.norm_block import norm_block

CODE = """
import torch, atom_fast as af
from atom_fast import _native
from atom_fast.ops.norm_block import norm_block
x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
for _ in range(2):
    got = norm_block(x)
with af.backend("reference"):
    expected = norm_block(x)
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


@pytest.mark.fault("Kernels in C", "the cached library is truncated", "it is rebuilt")
def test_a_damaged_library_is_built_anew(tmp_path):
    with _native._cache() as folder:
        whole = (folder / _native._name()).read_bytes()
    library = tmp_path / "atom_fast" / _native._name()
    library.parent.mkdir()
    library.write_bytes(whole[: len(whole) // 2])
    assert finish(start(tmp_path)) == ("True", "")
    assert _native._is_whole(library)


@pytest.mark.fault("Kernels in C", "the folder for caches cannot be made", "they are built for this process alone")
def test_a_cache_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    assert finish(start(tmp_path / "file", TMPDIR=str(tmp_path / "temporary"))) == ("True", "")
    assert not list((tmp_path / "temporary").glob("atom_fast-*"))


def test_the_compiler_may_be_named_with_options(monkeypatch):
    plain = _native._name()
    monkeypatch.setenv("CC", "cc -O1")
    assert _native._compiler() == ["cc", "-O1"]
    assert _native._name() != plain


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
    assert errors.count("could not be built, so PyTorch's operators are used instead") == 1
    assert message in errors


def test_other_types_are_refused_before_they_are_read():
    with pytest.raises(TypeError, match="take float32 and int64 on a CPU; got torch.float64 on cpu"):
        _native.run("norm_block_statistics", 1, torch.zeros(1, dtype=torch.float64))


def images(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)


OPERATORS = {
    "norm_block": lambda x: norm_block(x.repeat(1, 7, 1, 1)),
    "batch block": lambda x: norm_block(x.repeat(1, 7, 1, 1), norm="batch"),
    "first block": lambda x: conv_block(x, images(20, 3, 3, 3)),
    "batch first block": lambda x: conv_block(x, images(20, 3, 3, 3), norm="batch"),
    "batch norm": lambda x: [batch_norm(x, torch.ones(3), torch.ones(3), relu=True, pool=True)],
    "instance norm": lambda x: [instance_norm(x, torch.ones(3), torch.ones(3), relu=True, pool=True)],
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("name", ["norm_block", "first block"])
def test_narrow_types_are_computed_in_float32(name, norm, dtype):
    parameter = torch.linspace(0.5, 2, 20)
    x = images(4, 20, 9, 8).to(dtype) if name == "norm_block" else images(4, 3, 9, 8)
    filters = () if name == "norm_block" else (images(20, 3, 3, 3).to(dtype),)

    def results(backend, *inputs):
        apply = norm_block if name == "norm_block" else conv_block
        inputs[0].requires_grad_()
        with af.backend(backend):
            pooled, maps = apply(*inputs, norm=norm)
        return pooled, maps, *torch.autograd.grad(pooled.double().square().sum() + maps[:, 3].sum(), inputs[0])

    narrow = results("native", x.clone(), *filters, parameter, parameter.to(dtype))
    exact = results("reference", *(value.double() for value in (x, *filters, parameter, parameter.to(dtype))))
    assert [value.dtype for value in narrow] == [dtype, torch.float32, x.dtype]
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(narrow[0].double(), exact[0], rtol=rounding, atol=1e-5)
    torch.testing.assert_close(narrow[1].double(), exact[1], rtol=1e-5, atol=1e-6)
    assert (narrow[2] - exact[2]).abs().max() <= 2 * rounding * exact[2].abs().max()


def test_narrow_types_stay_narrow_where_the_kernels_do_not_take_them(monkeypatch):
    dtypes, conv2d = [], torch.nn.functional.conv2d

    def convolution(x, *arguments, **options):
        dtypes.append(x.dtype)
        return conv2d(x, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", convolution)
    with torch.autocast("cpu", torch.bfloat16):
        conv_block(images(2, 5, 8, 8), images(20, 5, 3, 3))  # too many channels for the kernel
        monkeypatch.setattr(_native, "is_built", lambda: False)
        conv_block(images(2, 3, 8, 8), images(20, 3, 3, 3))
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("built", [False, True])
def test_nothing_is_widened_in_vain(built, monkeypatch):
    x = images(4, 16, 16, 16).bfloat16()
    if built:
        x = x.contiguous()  # a layout that the kernel does not take
    else:
        monkeypatch.setattr(_native, "is_built", lambda: False)
    peaks = []
    for backend in ("auto", "torch"):
        with af.backend(backend):
            peaks.append(count_peak(lambda: norm_block(x)))
    assert peaks[0] == peaks[1]


def test_the_operator_takes_no_other_layout():
    with pytest.raises(ValueError, match="takes float32 in channels_last"):
        torch.ops.atom_fast.block(torch.zeros(1, 3, 4, 4), None, None, 1e-5, 4.0, 4.0, "native")


def test_a_whole_number_is_an_eps_too():
    x, ones = images(2, 3, 8, 8), torch.ones(3)
    assert torch.equal(instance_norm(x, ones, ones, 1, pool=True), instance_norm(x, ones, ones, 1.0, pool=True))


@pytest.mark.filterwarnings("ignore")
def test_what_traces_or_maps_sees_operators():
    x, ones = images(2, 3, 8, 8), torch.ones(3)
    expected = instance_norm(x, ones, ones)
    traced = torch.jit.trace(lambda x: instance_norm(x, ones, ones), x)
    symbolic = torch.fx.experimental.proxy_tensor.make_fx(lambda x: instance_norm(x, ones, ones))(x)
    assert torch.equal(traced(x), expected) and torch.equal(symbolic(x), expected)

    stack = torch.stack([x, x + 1])
    mapped = torch.func.vmap(lambda x: norm_block(x).maps)(stack)
    torch.testing.assert_close(mapped[1], norm_block(x + 1).maps)


def test_a_negated_view_is_read_as_it_is():
    x, ones = images(2, 3, 8, 8), torch.ones(3)
    torch.testing.assert_close(instance_norm(torch._neg_view(x), ones, ones), instance_norm(-x, ones, ones))
