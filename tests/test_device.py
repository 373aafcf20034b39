"""GPUs other than the one at hand: what runs on them, what is refused, and what a user is told."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from triton.runtime.errors import OutOfResources

import atom_fast as af
from atom_fast import _device, doctor
from atom_fast.cli import main
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.evaluation import evaluate
from atom_fast.ops import dispatch
from atom_fast.ops.launching import KernelError, device_of
from atom_fast.synthetic import SyntheticSet
from tests import workloads
from tests.cubin import check_report
from tests.distillation.test_step import make_data
from tests.launches import Launch, bind, compile_launch

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to be a GPU that is not here")


@contextlib.contextmanager
def launcher(limit):
    """Launch kernels only if ``limit`` accepts them; yields the names of those that ran."""
    ran, before = [], []

    class Checked:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                limit(bind(self.kernel, grid, args, kwargs))
                ran.append(self.kernel.fn.__name__)
                return self.kernel[grid](*args, **kwargs)

            return launch

    for name in workloads.MODULES:
        module = importlib.import_module(f"atom_fast.kernels.{name}")
        for attribute in [attribute for attribute in vars(module) if attribute.endswith("_kernel")]:
            before.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, Checked(getattr(module, attribute)))
    try:
        yield ran
    finally:
        for module, attribute, kernel in before:
            setattr(module, attribute, kernel)


def as_the_chip(capability: int):
    """Refuse a kernel as Triton does on a chip: by what the compiler makes of it there."""

    def limit(launch: Launch) -> None:
        report = compile_launch(launch, capability, brief=True)
        if report.shared > _device.SHARED_MEMORY[capability]:
            raise OutOfResources(report.shared, _device.SHARED_MEMORY[capability], "shared memory")

    return limit


def tiny_run(folder, norm, size=32, width=16):
    """A step for one image of one class; the distilled image."""
    config = preset("paper", ipc=1, iterations=1, real_batch=1, depth=2, width=width, norm=norm)
    return distill(make_data(1, size=size), config, folder, progress=False, device="cpu").images


@WITHOUT_GPU
@pytest.mark.parametrize(("capability", "norm", "size"), [(75, "instance", 17), (86, "batch", 23)])
def test_a_distillation_runs_to_its_end_on_chips_with_less_shared_memory(capability, norm, size, tmp_path, capsys):
    """Images a little larger than those whose planes fit."""
    with af.backend("reference"):
        expected = tiny_run(tmp_path / "reference", norm, size, width=8)
    capsys.readouterr()
    with workloads.pretended(capability), launcher(as_the_chip(capability)) as ran, af.backend("triton"):
        images = tiny_run(tmp_path / "chip", norm, size, width=8)
    assert "tiled_conv_block_forward_kernel" in ran and "conv_block_forward_kernel" not in ran
    # What is left of a kink that rounding crosses: a whole term of a gradient.
    assert (images - expected).norm() <= 1e-4 * expected.norm()
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "first in tiles" in line)
    assert f"sm_{capability}, {_device.SHARED_MEMORY[capability] >> 10} KB" in said


@WITHOUT_GPU
def test_the_pretended_launcher_refuses_what_the_chip_would(tmp_path):
    """With the tables of an H100 on a chip of 99 KB, as it was before tables knew the chip."""
    with (
        launcher(as_the_chip(86)),
        af.backend("triton"),
        pytest.raises(KernelError, match="shared memory, Required: 1"),
    ):
        tiny_run(tmp_path / "run", "instance")


@WITHOUT_GPU
def test_a_kernel_that_does_not_fit_after_all_is_replaced_and_that_is_said_once(tmp_path, monkeypatch):
    """The last resort: launch tables that are wrong for a size nobody has compiled."""

    def limit(launch: Launch) -> None:
        if launch.kernel == "norm_block_backward_kernel":
            raise OutOfResources(1 << 20, 99 << 10, "shared memory")

    # As on a GPU, where "auto" stands for Triton until it is refused.
    monkeypatch.setattr(
        dispatch, "_fastest", lambda tensor: "torch" if _device.triton_refusal(tensor.device) else "triton"
    )
    monkeypatch.setattr(_device, "_refused", {})
    with af.backend("reference"):
        expected = tiny_run(tmp_path / "reference", "instance", size=8, width=8)
    with launcher(limit) as ran, pytest.warns(UserWarning, match="do not run on cpu .*shared memory") as caught:
        images = tiny_run(tmp_path / "refused", "instance", size=8, width=8)
    assert "norm_block_forward_kernel" in ran and "norm_block_backward_kernel" not in ran
    assert sum("do not run" in str(warning.message) for warning in caught) == 1
    assert (images - expected).norm() <= 1e-4 * expected.norm()


@WITHOUT_GPU
@pytest.mark.parametrize(("norm", "capability"), [("instance", 86), ("batch", 120)])
def test_kernels_of_cifar_fit_consumer_gpus(norm, capability):
    for use in ("distill", "evaluate"):
        precision = "tf32" if use == "distill" else "float32"
        (workload,) = (w for w in workloads.workloads(((3, 32),)) if w.name == f"{use} 3x32x32 {precision} {norm}")
        for launch in workloads.launches(workload, capability):
            check_report(compile_launch(launch, capability, brief=True), capability, f"{workload.name} {launch.kernel}")


def test_what_triton_raises_reaches_nobody_as_it_is():
    message = r"sm_90, 227 KB.*: out of resource: shared memory, Required: 9, Hardware limit: 5.*backend\('torch'\)"
    with pytest.raises(KernelError, match=message), device_of(torch.zeros(1)):
        raise OutOfResources(9, 5, "shared memory")
    with pytest.raises(RuntimeError, match="something else"), device_of(torch.zeros(1)):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (OutOfResources(9, 5, "shared memory"), False),
    ],
)
def test_running_out_of_memory_is_known_by_every_name(error, memory):
    assert _device.is_out_of_memory(error) == memory


@pytest.fixture
def turing(monkeypatch):
    """A process that sees one GPU of compute capability 7.5, of which no kernel is asked."""
    monkeypatch.setattr(_device, "_chip", lambda index: _device.Chip(75, _device.SHARED_MEMORY[75]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    return torch.device("cuda", 0)


def test_a_gpu_without_tf32_takes_float32_and_refuses_the_others(turing):
    def resolve(**settings):
        return preset("paper", **settings).resolve((3, 32, 32), "cifar10", turing).precision

    assert resolve() == "float32"
    with pytest.raises(ValueError, match="'tf32' needs an NVIDIA GPU of compute capability 8.0 or above; got cuda:0"):
        resolve(precision="tf32")
    with pytest.raises(ValueError, match="'bfloat16' needs .* 8.0 or above; cuda:0 has 7.5 and emulates it.*'float32'"):
        resolve(precision="bfloat16")


def test_an_evaluation_refuses_bfloat16_where_it_is_emulated(turing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    data = make_data(2)
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    synthetic_set = SyntheticSet(space.to_model(data.train_images), data.train_labels, data.class_names, space)
    with pytest.raises(ValueError, match="'bfloat16' needs .* cuda:0 has 7.5"):
        evaluate(synthetic_set, data, device=turing, precision="bfloat16", progress=False)


def test_tf32_is_the_default_where_it_is(monkeypatch):
    monkeypatch.setattr(_device, "_chip", lambda index: _device.Chip(86, _device.SHARED_MEMORY[86]))
    monkeypatch.setattr(torch.version, "hip", None)
    assert preset("paper").resolve((3, 32, 32), "cifar10", torch.device("cuda", 0)).precision == "tf32"


@pytest.mark.parametrize(
    ("hip", "capability", "raised", "reason"),
    [
        ("6.4", 94, None, "written for NVIDIA GPUs, and run unfused on AMD's"),
        (None, 70, None, "compute capability 7.0 is below 7.5"),
        (None, 86, RuntimeError("Failed to find C compiler. Please specify via CC"), "Failed to find C compiler"),
        (None, 86, RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."),
         "unsupported toolchain"),
        (None, 86, None, None),
    ],
)  # fmt: skip
def test_a_gpu_that_triton_cannot_serve_is_said_once_and_runs_unfused(hip, capability, raised, reason, monkeypatch):
    class Probe:
        def __getitem__(self, grid):
            def launch(out):
                if raised:
                    raise raised

            return launch

    monkeypatch.setattr(_device, "_chip", lambda index: _device.Chip(capability, 99 << 10))
    monkeypatch.setattr(_device, "_triton_refusal", _device.functools.cache(_device._triton_refusal.__wrapped__))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr("atom_fast.kernels.probe.probe_kernel", Probe())
    tensor = SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = {dispatch.resolve_backend(tensor) for _ in range(3)}
    assert names == {"torch" if reason else "triton"}
    assert [reason in str(warning.message) for warning in caught] == ([True] if reason else [])
    if reason:
        with af.backend("triton"), pytest.raises(RuntimeError, match=f"does not run on cuda:0: .*{reason}.*'torch'"):
            dispatch.resolve_backend(tensor)


@WITHOUT_GPU
def test_the_probe_runs_in_the_interpreter(triton_backend):
    from atom_fast.kernels.probe import probe_kernel

    out = torch.full((1,), float("nan"))
    probe_kernel[(1,)](out)
    assert out.item() == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_is_deterministic_where_it_is_asked_for(deterministic, monkeypatch, tmp_path):
    seen = []

    def matching_terms(*args):
        seen.append(torch.backends.cudnn.deterministic)
        return original(*args)

    step = importlib.import_module("atom_fast.distillation.step")
    original = step.matching_terms
    monkeypatch.setattr(step, "matching_terms", matching_terms)
    distill(
        make_data(2), preset("paper", iterations=1, real_batch=2, width=8, deterministic=deterministic),
        tmp_path / "run", progress=False, device="cpu",
    )  # fmt: skip
    assert seen == [deterministic] and torch.backends.cudnn.deterministic is False


# doctor


def test_doctor_examines_this_machine():
    result = CliRunner().invoke(main, ["doctor", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    for words in (torch.__version__.split("+")[0], "C compiler", "threads: ", "GPU", "what would make it faster"):
        assert words in result.output
    assert "WRONG" not in result.output
    assert result.output.count("right  ") == len(doctor._CHECKS)
    findings = json.loads(CliRunner().invoke(main, ["doctor", "--device", "cpu", "--json"]).output)
    assert all(error < 1e-5 for error in findings["checks"].values())


@pytest.mark.parametrize(
    ("capability", "says"),
    [
        ("8.6", ["sm_86, 99 KB", "tf32, bfloat16", "CIFAR 32x32 float32: fused with its convolution, in tiles",
                 "CIFAR 32x32 bfloat16: fused with its convolution, a plane at a time"]),
        ("7.5", ["sm_75, 64 KB", "no TF32", "CIFAR 32x32 float32: fused with its convolution, in tiles",
                 "below compute capability 8.0"]),
        ("9.0", ["sm_90, 227 KB", "CIFAR 32x32 float32: fused with its convolution, a plane at a time",
                 "Tiny ImageNet 64x64 float32: after PyTorch's convolution"]),
    ],
)  # fmt: skip
def test_doctor_says_what_would_run_on_a_gpu_that_is_not_here(capability, says):
    result = CliRunner().invoke(main, ["doctor", "--device", "cpu", "--gpu", capability])
    assert result.exit_code == 0, result.output
    assert all(words in result.output for words in says), result.output


def test_doctor_refuses_a_capability_that_it_does_not_know():
    result = CliRunner().invoke(main, ["doctor", "--gpu", "6.1"])
    assert result.exit_code == 2
    assert "--gpu must be one of 7.5, 8.0, 8.6" in result.output and "got 6.1" in result.output


def test_doctor_finds_a_kernel_that_computes_something_else(monkeypatch):
    wrong = dict(doctor._CHECKS)
    operation, shape = wrong["class means"]
    wrong["class means"] = (lambda x: operation(x) * (1 if x.dtype == torch.float64 else 1.01)), shape
    wrong["augmentation"] = (lambda x: 1 / 0), shape
    monkeypatch.setattr(doctor, "_CHECKS", wrong)
    result = CliRunner().invoke(main, ["doctor", "--device", "cpu"])
    assert result.exit_code == 1
    assert "WRONG  class means: error 1.0e-02" in result.output
    assert "WRONG  augmentation: ZeroDivisionError" in result.output
    assert result.output.count("right  ") == len(wrong) - 2


@WITHOUT_GPU
def test_doctor_checks_the_kernels_in_the_interpreter():
    """The checks that it runs on a GPU, here in Triton's interpreter."""
    with af.backend("triton"):
        errors = doctor.self_check(torch.device("cpu"))
    assert all(doctor.passes(*check) for check in errors.items()), errors


def test_doctor_runs_without_a_c_compiler(tmp_path):
    command = [sys.executable, "-m", "atom_fast", "doctor", "--device", "cpu"]
    environment = {**os.environ, "CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "C compiler: none found" in done.stdout and "Install a C compiler" in done.stdout


def test_doctor_advises_fewer_threads_than_the_quota_allows(monkeypatch):
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    (advice,) = doctor._cpu_advice({"name": "some GPU"})
    assert advice.startswith("Set OMP_NUM_THREADS=1") and "8 threads" in advice


def test_doctor_names_the_assembler_of_triton():
    assert doctor.re.fullmatch(r"\d+\.\d+\.\d+", doctor._ptxas())


def test_doctor_describes_a_gpu(turing, monkeypatch):
    """Without one: the properties that PyTorch tells, and what follows from them."""
    properties = SimpleNamespace(name="Tesla T4", total_memory=16 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(doctor, "triton_refusal", lambda device: "an old driver")
    facts = doctor._gpu(turing)
    assert facts["name"] == "Tesla T4" and facts["memory"] == "16.0 GiB" and facts["Triton"] == "an old driver"
    assert facts["chip"] == "sm_75, 64 KB of shared memory per program" and facts["precisions"] == "float32"
    assert doctor._unfused_runs(turing, "an old driver") == {"every operation": "PyTorch's operators (an old driver)"}
    first, *_ = doctor._gpu_advice(_device.chip_of(turing), "an old driver")
    assert first.startswith("Make the fused kernels run") and "an old driver" in first
