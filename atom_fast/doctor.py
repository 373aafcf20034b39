"""Examine a machine: its properties, what runs fused and why, and a check of results against the equations."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atom_fast._device import HAS_TRITON, Chip, chip_of, convolution_precision, has_tf32, triton_refusal
from atom_fast._threads import affinity, cpu_quota, reason
from atom_fast.data.augmentation import AugmentationParameters, augment, decode_and_augment
from atom_fast.distillation.logs import versions
from atom_fast.functional import attention_matching_loss, mean_matching_loss
from atom_fast.ops import native
from atom_fast.ops.batch_norm import batch_norm
from atom_fast.ops.conv_block import conv_block, launch_kind
from atom_fast.ops.dispatch import backend
from atom_fast.ops.instance_norm import instance_norm
from atom_fast.ops.norm_block import norm_block

# Data sets and the size of their images [C, H, W].
SIZES = {"digits": (1, 8, 8), "CIFAR": (3, 32, 32), "Tiny ImageNet": (3, 64, 64)}
FIRST_BLOCK = {
    "planes": "fused with its convolution, a plane at a time",
    "tiles": "fused with its convolution, in tiles: a plane needs more shared memory",
    "apart": "after PyTorch's convolution: the image exceeds the fused kernel's limit",
}
# Largest accepted error, relative to the L2 norm of the compared values. Rounding to TF32 switches some features on or
# off, and each changes the gradient by a whole term; a wrong kernel has an error of 0.5 and more.
TOLERANCE, TF32_TOLERANCE = 1e-3, 1e-1

_NVIDIA_SMI = ("nvidia-smi", "--format=csv,noheader")


def examine(device: torch.device, chip: Chip | None = None) -> dict[str, Any]:
    """Examine a device: its properties, what runs on it, whether the results are right, and what would be faster.

    Args:
        device: a GPU or the CPU.
        chip: a GPU that need not be present; the result then covers only what would run on it.

    Returns:
        ``versions`` and ``cpu`` by name; ``gpu``, a dict or None; ``runs``, how each operation runs; ``checks``, each
        operation's error relative to the equations in float64 (a number, or text for a failure); ``advice``, sentences.
    """
    if chip is not None:
        return {"gpu": _absent_gpu(chip), "runs": _fused_runs(torch.device("cpu"), chip), "advice": _gpu_advice(chip)}
    cpu = _cpu()
    gpu = _gpu(device) if device.type == "cuda" else None
    refusal = triton_refusal(device) if gpu else None
    if gpu and HAS_TRITON and not refusal:
        runs = _fused_runs(device, chip_of(device))
    else:
        runs = _unfused_runs(device, refusal)
    return {
        "versions": versions() | {"cuda of torch": torch.version.cuda or "none", "platform": platform.platform()},
        "cpu": cpu,
        "gpu": gpu,
        "runs": runs,
        "checks": self_check(device),
        "advice": _cpu_advice(gpu) + (_gpu_advice(chip_of(device), refusal) if gpu else []),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties, chip = torch.cuda.get_device_properties(device), chip_of(device)
    return {
        "name": properties.name,
        "chip": str(chip),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "driver": (_output([*_NVIDIA_SMI, "--query-gpu=driver_version"]) or "unknown").splitlines()[0],
        "precisions": _precisions(chip) if has_tf32(device) else "float32",
        "Triton": triton_refusal(device) or ("compiles and launches kernels" if HAS_TRITON else "is not installed"),
        "ptxas": _ptxas() or "none found",
    }


def _ptxas() -> str | None:
    """Return the version of Triton's assembler, which determines the kernels' machine code; None if not found."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    printed = _output([str(tool), "--version"]) or ""
    found = re.search(r"release [\d.]+, V([\d.]+)", printed)
    return found[1] if found else None


def _absent_gpu(chip: Chip) -> dict[str, Any]:
    return {"name": "not in this machine", "chip": str(chip), "precisions": _precisions(chip)}


def _precisions(chip: Chip) -> str:
    return "tf32, bfloat16, float32" if chip.has_tf32 else "float32 (no TF32; bfloat16 would be emulated)"


def _cpu() -> dict[str, Any]:
    compiler = native.compiler_version()
    return {
        "name": _processor_name(),
        "cores": f"{affinity()} to use",
        "quota": f"{quota:g} cores" if (quota := cpu_quota()) else "none",
        "threads": f"{torch.get_num_threads()} ({reason()})",
        "C compiler": compiler or "none found",
        "kernels in C": native.description() if compiler else "not built: no C compiler",
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _fused_runs(device: torch.device, chip: Chip) -> dict[str, str]:
    """Describe how Triton's kernels run each operation on a chip."""
    runs = {}
    precisions = [torch.float32, torch.bfloat16] if chip.has_bfloat16 else [torch.float32]
    for name, shape in SIZES.items():
        for dtype in precisions:
            kind = launch_kind(shape, 128, dtype, device, chip)
            runs[f"first block, {name} {shape[1]}x{shape[2]} {str(dtype)[6:]}"] = FIRST_BLOCK[kind]
    others = "later blocks", "attention maps", "class means", "augmentation", "norms of an evaluation"
    return runs | dict.fromkeys(others, "fused (Triton)")


def _unfused_runs(device: torch.device, refusal: str | None) -> dict[str, str]:
    if device.type != "cpu":
        reason = refusal or "Triton is not installed"
        return {"every operation": f"PyTorch's operators ({reason})"}
    in_float32 = "first block", "later blocks", "augmentation", "norms of an evaluation"
    others = "attention maps", "class means"
    if not native.is_built():
        return dict.fromkeys(in_float32 + others, "PyTorch's operators: the kernels in C are not built")
    return dict.fromkeys(in_float32, "fused (C), computed in float32") | dict.fromkeys(others, "fused (C)")


def _cpu_advice(gpu: dict | None) -> list[str]:
    advice = []
    if not native.is_built() and gpu is None:
        advice.append(
            "Install a C compiler (gcc or clang, or set the environment variable CC to one): a step on a CPU is then "
            "several times faster."
        )
    quota = cpu_quota()
    if quota and torch.get_num_threads() > max(1, quota):
        advice.append(
            f"Set OMP_NUM_THREADS={max(1, int(quota))}: this container may use {quota:g} cores, and PyTorch starts "
            f"{torch.get_num_threads()} threads."
        )
    if gpu is None and shutil.which("nvidia-smi"):
        advice.append(
            f"nvidia-smi is installed, but PyTorch {torch.__version__} sees no GPU: install a build of PyTorch for "
            "CUDA, or update the driver."
        )
    return advice


def _gpu_advice(chip: Chip, refusal: str | None = None) -> list[str]:
    advice = []
    if refusal:
        advice.append(f"Make the fused kernels run: they save several times the time and memory, but {refusal}.")
    elif not HAS_TRITON:
        advice.append("Install Triton (pip install triton): without it nothing runs fused on a GPU.")
    if not chip.has_tf32:
        advice.append("Expect slow convolutions: GPUs below compute capability 8.0 have no TF32.")
    return advice


def self_check(device: torch.device) -> dict[str, float | str]:
    """Run every operation once, small, and compare value and gradient with the equations in float64.

    Returns:
        The largest error of each operation, relative to the L2 norm of the compared values; text if it raised.
    """
    checks = [(name, name, "float32") for name in _CHECKS]
    if has_tf32(device):
        checks.append(("first block, TF32", "first block", "tf32"))
    errors: dict[str, float | str] = {}
    for title, name, precision in checks:
        try:
            with convolution_precision(precision, device):
                errors[title] = _error(*_CHECKS[name], device)
        except Exception as error:  # a bug report needs every one of them
            errors[title] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return errors


def passes(name: str, error: float | str) -> bool:
    """Return True if an error of `self_check` is within the tolerance of its precision."""
    return isinstance(error, float) and error <= (TF32_TOLERANCE if name.endswith("TF32") else TOLERANCE)


def _error(operation: Callable[[Tensor], Tensor], shape: tuple[int, ...], device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
    found = _value_and_gradient(operation, inputs)
    with backend("reference"):
        wanted = _value_and_gradient(operation, inputs.double())
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def _value_and_gradient(operation: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    leaf = inputs.detach().requires_grad_()
    value = operation(leaf)
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    (gradient,) = torch.autograd.grad((value * weights).sum(), leaf)
    return value.detach(), gradient


def _constant(like: Tensor, *shape: int) -> Tensor:
    """Return the same random numbers at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(like)


def _classes(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % 2


def _block(x: Tensor, norm: str) -> Tensor:
    pooled, maps = norm_block(x, norm=norm)
    return torch.cat((pooled.flatten(), maps.flatten()))


def _conv_block(x: Tensor) -> Tensor:
    pooled, maps = conv_block(x, _constant(x, 16, 3, 3, 3))
    return torch.cat((pooled.flatten(), maps.flatten()))


def _attention(x: Tensor) -> Tensor:
    labels = _classes(x)
    return attention_matching_loss(_constant(x, *x.shape), x, real_labels=labels, synthetic_labels=labels).view(1)


def _means(x: Tensor) -> Tensor:
    x, labels = x.flatten(1), _classes(x)
    return mean_matching_loss(_constant(x, *x.shape), x, real_labels=labels, synthetic_labels=labels).view(1)


def _norm(x: Tensor, norm: str) -> Tensor:
    ones = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    run = batch_norm if norm == "batch" else instance_norm
    return run(x, ones, 0.1 * ones, relu=True, pool=True)


def _parameters(x: Tensor) -> AugmentationParameters:
    operations = torch.arange(len(x), device=x.device) % 6
    return AugmentationParameters(operations, _constant(x, len(x), 3).float().sigmoid())


def _decoding(x: Tensor) -> Tensor:
    chosen = torch.arange(len(x), device=x.device) * 4 % 7  # one twice, others never
    return decode_and_augment(x, _parameters(x), partition=2, chosen=chosen)


_FEATURES, _IMAGES = (4, 16, 8, 8), (6, 3, 8, 8)
_CHECKS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "attention maps": (_attention, _FEATURES),
    "class means": (_means, _FEATURES),
    "first block": (_conv_block, _IMAGES),
    "block, InstanceNorm": (lambda x: _block(x, "instance"), _FEATURES),
    "block, BatchNorm": (lambda x: _block(x, "batch"), _FEATURES),
    "InstanceNorm": (lambda x: _norm(x, "instance"), _FEATURES),
    "BatchNorm": (lambda x: _norm(x, "batch"), _FEATURES),
    "augmentation": (lambda x: augment(x, _parameters(x)), _IMAGES),
    "decoding and augmentation": (_decoding, _IMAGES),
}


def report(findings: dict[str, Any]) -> str:
    """Format the result of `examine` as text, one line per fact."""
    sections = []
    for title, facts in (("versions", findings.get("versions")), ("CPU", findings.get("cpu"))):
        if facts:
            sections.append((title, [f"{name}: {value}" for name, value in facts.items()]))
    gpu = findings["gpu"]
    sections.append(("GPU", [f"{name}: {value}" for name, value in gpu.items()] if gpu else ["none that PyTorch sees"]))
    sections.append(("what runs", [f"{name}: {how}" for name, how in findings["runs"].items()]))
    if "checks" in findings:
        lines = [
            f"{'right' if passes(name, error) else 'WRONG'}  {name}: "
            + (f"error {error:.1e}" if isinstance(error, float) else error)
            for name, error in findings["checks"].items()
        ]
        sections.append(("self-check against the equations in float64", lines))
    sections.append(("what would make it faster", findings["advice"] or ["no suggestions"]))
    return "\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
