"""Record the kernels that an operator launches and their arguments; compile the launches and count their bytes.

An operator runs with its kernels replaced by recorders, so that tests compile and count the real launches::

    with recorded(kernels) as launches:
        norm_block(x)
    report = compile_launch(launches[0], capability=90)
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from types import ModuleType

import torch

from tests.cubin import CubinReport, compile_kernel

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclasses.dataclass
class Launch:
    """One call of a kernel."""

    module: str  # stem of a file in kernels/
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, object]  # by name, in the kernel's order
    constants: set[str]  # names of the constexpr arguments
    options: dict[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of the kernel's tensor arguments, each tensor counted once."""
        tensors = {value.data_ptr(): value for value in self.arguments.values() if isinstance(value, torch.Tensor)}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class _Recorder:
    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append(bind(self.kernel, grid, args, kwargs))

        return launch


def bind(kernel, grid: tuple[int, ...], args: tuple, kwargs: dict) -> Launch:
    """Return a call of a kernel as a `Launch`."""
    options = {name: value for name, value in kwargs.items() if name in OPTIONS}
    signature = inspect.signature(kernel.fn)
    arguments = signature.bind(
        *args, **{name: value for name, value in kwargs.items() if name not in OPTIONS}
    ).arguments
    constants = {name for name, p in signature.parameters.items() if "constexpr" in str(p.annotation)}
    module = kernel.fn.__module__.rpartition(".")[2]
    return Launch(module, kernel.fn.__name__, grid, dict(arguments), constants, options)


@contextlib.contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Record the launches of the modules' kernels instead of running them."""
    launches: list[Launch] = []
    kernels = [(module, name) for module in modules for name in vars(module) if name.endswith("_kernel")]
    originals = [getattr(module, name) for module, name in kernels]
    for (module, name), kernel in zip(kernels, originals, strict=True):
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for (module, name), kernel in zip(kernels, originals, strict=True):
            setattr(module, name, kernel)


def compile_launch(launch: Launch, capability: int, triton: str | None = None, *, brief: bool = False) -> CubinReport:
    """Compile a launch's kernel, specialised for its arguments; see `tests.cubin.compile_kernel`."""
    return compile_kernel(**specialization(launch), capability=capability, triton=triton, brief=brief)


def specialization(launch: Launch) -> dict[str, object]:
    """Return the arguments of `tests.cubin.compile_kernel` for a launch; equal launches compile to the same code."""
    signature, constants, aligned = {}, {}, []
    for name, value in launch.arguments.items():
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", _plain(value)
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            aligned += [name] * (value % 16 == 0)
    return {
        "module": launch.module, "kernel": launch.kernel, "signature": signature, "constants": constants,
        "aligned": tuple(aligned), **launch.options,
    }  # fmt: skip


def _plain(value: object) -> object:
    """Convert a constant for JSON: Triton's types to their names."""
    import triton.language as tl

    return f"tl.{value}".replace("fp", "float") if isinstance(value, tl.dtype) else value
