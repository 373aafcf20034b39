"""Compile a kernel to machine code without a GPU, and read what the compiler made of it.

Interpreted kernels cannot be compiled, so the work is done in a process without ``TRITON_INTERPRET``::

    report = compile_kernel("attention", "attention_forward_kernel", signature={...}, constants={...}, capability=90)
    assert report.spills == 0 and report.widest_load == 128
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

CAPABILITIES = (80, 90)


@dataclasses.dataclass(frozen=True)
class CubinReport:
    """What one kernel costs on one architecture."""

    registers: int
    spills: int  # bytes of stack frame and local memory a thread
    shared: int  # bytes of shared memory a program
    widest_load: int  # bits of the widest global load (cp.async and bulk copies count as 128), 0 where there is none
    widest_store: int  # bits of the widest global store
    narrow_loads: int  # how many global load instructions are narrower than the widest
    tensor_core: bool  # whether a matrix instruction is used
    sass: str = dataclasses.field(repr=False, default="")


def compile_kernel(
    module: str,
    kernel: str,
    *,
    signature: dict[str, str],
    constants: dict[str, object],
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: tuple[str, ...] = (),
) -> CubinReport:
    """Compile ``atom_fast.kernels.<module>.<kernel>`` for ``sm_<capability>``.

    Args:
        signature: argument name to Triton type, such as ``"*fp32"``, ``"i32"``, ``"i64"``, ``"fp32"``, ``"constexpr"``,
            for every argument of the kernel in order.
        constants: the values of the ``constexpr`` arguments. An integer argument that Triton would specialise
            to 1 (a stride of one) belongs here too, with type ``"constexpr"``.
        aligned: arguments that are divisible by 16 (pointers of whole tensors, most strides).
    """
    job = {
        "module": module,
        "kernel": kernel,
        "signature": signature,
        "constants": constants,
        "capability": capability,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "aligned": list(aligned),
    }
    worker = _worker()
    worker.stdin.write(json.dumps(job) + "\n")
    worker.stdin.flush()
    answer = json.loads(worker.stdout.readline())
    if "error" in answer:
        raise RuntimeError(f"{kernel} does not compile for sm_{capability}:\n{answer['error'][-4000:]}")
    return CubinReport(**answer)


@functools.lru_cache(maxsize=1)
def _worker() -> subprocess.Popen:
    """One compiling process a test session: starting it costs more than most compilations."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.cubin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parent.parent,
    )
    atexit.register(worker.kill)
    return worker


def _compile(job: dict) -> CubinReport:
    import importlib

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"atom_fast.kernels.{job['module']}"), job["kernel"])
    names = list(job["signature"])
    if names != function.arg_names:
        raise ValueError(f"signature must list {function.arg_names} in this order; got {names}")
    constants = {
        (names.index(name),): getattr(tl, value[3:]) if str(value).startswith("tl.") else value
        for name, value in job["constants"].items()
    }
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in job["aligned"]}
    source = ASTSource(function, job["signature"], constants, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", job["capability"], 32),
        options={"num_warps": job["num_warps"], "num_stages": job["num_stages"]},
    )
    return _read(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


def _read(cubin: bytes, ptx: str, shared: int) -> CubinReport:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", file.name], text=True)
        sass = subprocess.check_output([tools / "cuobjdump", "-sass", file.name], text=True)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    stack = int(re.search(r"STACK:(\d+)", usage).group(1))
    local = int(re.search(r"LOCAL:(\d+)", usage).group(1))
    loads = [_width(line) for line in re.findall(r"\bLDG\.[A-Z0-9.]+", sass)]
    if re.search(r"\bLDGSTS|\bUBLKCP|\bUTMALDG", sass):
        loads += [128 if re.search(r"LDGSTS\.[A-Z.]*128|UBLKCP|UTMALDG", sass) else 32]
    stores = [_width(line) for line in re.findall(r"\bSTG\.[A-Z0-9.]+", sass)]
    return CubinReport(
        registers=registers,
        spills=stack + local,
        shared=shared,
        widest_load=max(loads, default=0),
        widest_store=max(stores, default=0),
        narrow_loads=sum(width < max(loads) for width in loads),
        tensor_core=bool(re.search(r"\b(HMMA|HGMMA|IMMA|DMMA)", sass)),
        sass=sass if os.environ.get("ATOM_FAST_KEEP_SASS") else "",
    )


def _width(instruction: str) -> int:
    for bits in (256, 128, 64):
        if f".{bits}" in instruction:
            return bits
    if ".U8" in instruction or ".S8" in instruction:
        return 8
    if ".U16" in instruction or ".S16" in instruction:
        return 16
    return 32


def _serve() -> None:
    """Answer a line of JSON for each job on standard input; what the compiler prints goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer = dataclasses.asdict(_compile(json.loads(line)))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
