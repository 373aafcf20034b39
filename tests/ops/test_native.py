"""The kernels in C: how they are built and kept, and that threads do not change a bit. What they compute is tested with
their operators."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time

import pytest
import torch
import torch.fx.experimental.proxy_tensor

import atom_fast as af
from atom_fast.ops import native
from atom_fast.ops.attention import attention_maps
from atom_fast.ops.batch_norm import batch_norm
from atom_fast.ops.conv_block import conv_block
from atom_fast.ops.instance_norm import instance_norm
from atom_fast.ops.matching import class_mean_distance
from atom_fast.ops.norm_block import norm_block
from benchmarks.live_bytes import count_peak

COPY = f'while [ "$1" != -o ]; do shift; done\ncp {native._library()._name} "$2"'  # the library that this process built


def compiler(folder, commands=COPY):
    """Write a compiler that notes each of its calls in ``folder/calls``; return its path."""
    path = folder / "compiler"
    lines = "#!/bin/sh", 'case "$*" in *--version*) echo 1; exit;; esac', f'echo "$*" >> {folder}/calls', commands, ""
    path.write_text("\n".join(lines))
    path.chmod(0o755)
    return str(path)


def calls(folder):
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Empty folders for the cache and for temporary files, and a compiler that copies the library."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", compiler(tmp_path))
    return tmp_path


def build():
    """The library as in a process that has not asked for it yet."""
    return native._library.__wrapped__()


def cached(place):
    return sorted(path.name for path in (place / "cache" / "atom_fast").iterdir())


@pytest.mark.fault(
    "Kernels in C",
    "two processes need the kernels before they are built",
    "each builds them beside their place and moves them there; one library is kept",
)
def test_processes_that_start_together_build_one_library(place, monkeypatch):
    monkeypatch.setenv("CC", compiler(place, f"sleep 1\n{COPY}"))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=lambda: os._exit(build() is None)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0] and len(calls(place)) == 2
    assert len(cached(place)) == 1


@pytest.mark.fault("Kernels in C", "the cached library is truncated", "it is rebuilt")
def test_a_damaged_library_is_built_anew(place):
    assert build() is not None
    (library,) = (place / "cache" / "atom_fast").iterdir()
    whole = library.read_bytes()
    library.unlink()  # which is mapped into this process
    library.write_bytes(whole[: len(whole) // 2])
    assert build() is not None and native._is_whole(library)
    assert len(calls(place)) == 2
    assert build() is not None and len(calls(place)) == 2  # the whole one is taken as it is


@pytest.mark.fault("Kernels in C", "the folder for caches cannot be made", "they are built for this process alone")
def test_a_cache_that_cannot_be_made_is_done_without(place, monkeypatch):
    (place / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    assert build() is not None
    assert not list((place / "temporary").iterdir())


@pytest.mark.fault(
    "Kernels in C",
    "no room is left for the cache and for temporary files",
    "PyTorch's operators take over within a second, and one warning says so; nothing is compiled in vain",
)
def test_a_full_disk_is_noticed_before_compiling(place, monkeypatch):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.warns(UserWarning, match="could not be built.* File too large"):
            assert build() is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert calls(place) == [] and cached(place) == [] and not list((place / "temporary").iterdir())


def test_a_cache_without_room_leaves_the_temporary_folder(place, monkeypatch):
    check = native._check_room

    def full(folder):
        if (place / "cache") in folder.parents:
            raise OSError("No space left on device")
        check(folder)

    monkeypatch.setattr(native, "_check_room", full)
    assert build() is not None
    assert len(calls(place)) == 1 and cached(place) == []


def test_a_compiler_that_knows_no_openmp_is_asked_without(place, monkeypatch):
    monkeypatch.setenv("CC", compiler(place, f'case "$*" in *-fopenmp*) exit 1;; esac\n{COPY}'))
    assert build() is not None and len(calls(place)) == 2


def test_one_thread_is_said_once(place, monkeypatch):
    (place / "empty.c").touch()
    commands = f'while [ "$1" != -o ]; do shift; done\nexec cc -shared {place}/empty.c -o "$2"'
    monkeypatch.setenv("CC", compiler(place, commands))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with pytest.warns(UserWarning, match=r"the C compiler \(.*\) has no OpenMP, so .* use one thread") as warned:
        assert build() is not None
    assert len(warned) == 1


def test_a_long_compilation_is_said_on_stderr(place, monkeypatch, capfd):
    monkeypatch.setattr(native, "_QUIET", 0.1)
    monkeypatch.setenv("CC", compiler(place, f"sleep 0.3\n{COPY}"))
    assert build() is not None
    assert capfd.readouterr().err == "atom_fast: compiling the kernels for this CPU, once: up to a minute\n"


@pytest.mark.fault("Kernels in C", "a build was killed", "what it left is removed an hour later")
def test_folders_of_killed_builds_are_removed(place):
    folder = place / "cache" / "atom_fast"
    for name, age in (("build-1", 7200), ("build-3", 60)):
        (folder / name).mkdir(parents=True)
        (folder / name / "half.so").touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    with native._cache():
        assert cached(place) == ["build-3"]


@pytest.mark.fault(
    "Kernels in C",
    "the compiler makes a library that ends whoever loads it, as with a sanitizer",
    "it is loaded in another process first; one warning, and PyTorch's operators",
)
def test_a_library_that_ends_its_process_is_not_loaded(place, monkeypatch):
    (place / "end.c").write_text("__attribute__((constructor)) static void end(void) { __builtin_trap(); }")
    commands = f'while [ "$1" != -o ]; do shift; done\nexec cc -shared -fPIC {place}/end.c -o "$2"'
    monkeypatch.setenv("CC", compiler(place, commands))
    with pytest.warns(UserWarning, match="could not be built.* ended with status -"):
        assert build() is None
    assert len(calls(place)) == 1 and cached(place) == []


def test_the_compiler_may_be_named_with_options(monkeypatch):
    plain = native._name()
    monkeypatch.setenv("CC", "cc -O1")
    assert native._compiler() == ["cc", "-O1"]
    assert native._name() != plain


@pytest.mark.fault(
    "Kernels in C",
    "no C compiler is there, or it fails",
    "one warning says so; PyTorch's operators give the same numbers",
)
@pytest.mark.parametrize(
    "command, message", [("none", r"no C compiler was found \(none\)"), ("false", "ended with status 1")]
)
def test_without_a_compiler_pytorch_takes_over_and_says_so_once(command, message, place, monkeypatch):
    monkeypatch.setenv("CC", command)
    monkeypatch.setattr(native, "_library", native.functools.cache(native._library.__wrapped__))
    x = images(2, 4, 8, 8)
    with pytest.warns(UserWarning, match=f"could not be built, so PyTorch's operators are used.*{message}") as warned:
        got = [norm_block(x) for _ in range(2)]
    assert len(warned) == 1
    with af.backend("reference"):
        torch.testing.assert_close(got[1], norm_block(x), rtol=0, atol=0)


def test_other_types_are_refused_before_they_are_read():
    with pytest.raises(TypeError, match="takes torch.int64 and torch.float32 on a CPU; got torch.float64 on cpu"):
        native.run("norm_block_statistics", 1, torch.zeros(1, dtype=torch.float64))


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
    "attention": lambda x: [attention_maps(x, 4.0, 4.0)],
    "attention of planes": lambda x: [attention_maps(x.contiguous(), 4.0, 1.5)],
    "attention of slices": lambda x: [attention_maps(x[:, :2, 1:, ::2], 3.0, 4.0)],
    "batch class means": lambda x: [class_mean_distance(images(4, 420, 1, 1).flatten(1), x.flatten(1), None)],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_threads_change_no_bit(name, monkeypatch):
    monkeypatch.setattr(native, "_BYTES_PER_THREAD", 1)

    def results(threads, x):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with af.backend("torch"):
                outputs = OPERATORS[name](x.requires_grad_())
                return [*outputs, *torch.autograd.grad(sum(output.square().sum() for output in outputs), x)]
        finally:
            torch.set_num_threads(before)

    alone = results(1, images(5, 3, 10, 14))
    for threads in (2, 3, 8):
        assert all(map(torch.equal, results(threads, images(5, 3, 10, 14)), alone))


COUNT_REGIONS = """
#define _GNU_SOURCE
#include <dlfcn.h>
long regions;
void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    if (threads != 1) __atomic_add_fetch(&regions, 1, __ATOMIC_RELAXED);
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = dlsym(RTLD_NEXT, "GOMP_parallel");
    parallel(work, data, threads, flags);
}
"""
LOSS_BESIDE_A_BUSY_PROCESS = """
import ctypes, multiprocessing, torch
import atom_fast as af

def spin():
    while True:
        pass

if __name__ == "__main__":
    regions = ctypes.c_long.in_dll(ctypes.CDLL(None), "regions")
    busy = multiprocessing.get_context("fork").Process(target=spin, daemon=True)
    busy.start()
    torch.set_num_threads(2)
    real, synthetic = torch.ones(32, 64, 16, 16), torch.ones(32, 64, 16, 16, requires_grad=True)
    counts = [regions.value]
    for _ in range(2):
        loss = af.attention_matching_loss(real, synthetic)
        counts.append(regions.value)
        torch.autograd.grad(loss, synthetic)
        counts.append(regions.value)
    busy.kill()
    print(*(after - before for before, after in zip(counts, counts[1:])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the library that counts stands in for GNU OpenMP's")
def test_the_loss_waits_for_its_threads_three_times(tmp_path):
    """Beside a busy process each parallel region may wait for the scheduler: one per side, and one for the gradient."""
    (tmp_path / "count.c").write_text(COUNT_REGIONS)
    (tmp_path / "loss.py").write_text(LOSS_BESIDE_A_BUSY_PROCESS)
    library = tmp_path / "count.so"
    command = [*native._compiler(), "-shared", "-fPIC", str(tmp_path / "count.c"), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, tmp_path / "loss.py"], env=environment, capture_output=True, text=True, check=True
    )
    counts = [int(count) for count in run.stdout.split()]
    assert counts == [2, 1, 2, 1]  # the means are too small for two threads


@pytest.mark.parametrize("name", [name for name in OPERATORS if "batch" not in name])
def test_a_sample_does_not_depend_on_the_others(name):
    def results(x):
        with af.backend("torch"):
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

    narrow = results("torch", x.clone(), *filters, parameter, parameter.to(dtype))
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
        monkeypatch.setattr(native, "is_built", lambda: False)
        conv_block(images(2, 3, 8, 8), images(20, 3, 3, 3))
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("built", [False, True])
def test_nothing_is_upcast_in_vain(built, monkeypatch):
    x = images(4, 16, 16, 16).bfloat16()
    if built:
        x = x.contiguous()  # a layout that the kernel does not take
    else:
        monkeypatch.setattr(native, "is_built", lambda: False)
    peaks = []
    for backend in ("torch", "reference"):
        with af.backend(backend):
            peaks.append(count_peak(lambda: norm_block(x)))
    assert peaks[0] <= peaks[1] + x.nbytes  # a view of which counts; a copy in float32 is twice as large


def test_the_operator_takes_no_other_layout():
    with pytest.raises(ValueError, match="takes float32 in channels_last"):
        torch.ops.atom_fast.norm_block(torch.zeros(1, 3, 4, 4), None, None, 1e-5, 4.0, 4.0, "instance", "c")


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
