"""Compile a kernel to machine code without a GPU, and report its registers, spills, loads and shared memory.

Interpreted kernels cannot be compiled, so a process without ``TRITON_INTERPRET`` compiles them::

    report = compile_kernel("attention", "attention_forward_kernel", signature={...}, constants={...}, capability=90)
    check_report(report, capability=90)
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
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The GPUs with 100 KB of shared memory (sm_80, 89 and 120 differ from sm_86 in few instructions), and an H100.
CAPABILITIES = (86, 90)
# An addition of two packed 16-bit numbers that lost its constant: ptxas 12.8 and 12.9 generate it, for sm_90 and above,
# from `add.s16x2` with a constant if one half of the result is used.
LOST_CONSTANT = re.compile(r"\bVIADD\.16x2 [^;]*, 0x0\b")


@dataclasses.dataclass(frozen=True)
class CubinReport:
    """Resources and instructions of one kernel on one architecture."""

    registers: int
    spills: int  # bytes of stack frame and local memory per thread
    shared: int  # bytes of shared memory per program
    widest_load: int  # bits of the widest global load (cp.async and bulk copies count as 128); 0 if there is none
    widest_store: int  # bits of the widest global store
    narrow_loads: int  # number of global load instructions narrower than the widest
    tensor_core: bool  # True if a matrix instruction is used
    lost_constants: int  # miscompiled additions, see LOST_CONSTANT
    instructions: int  # instructions of a thread, each counted once
    loop: int  # of these, in the longest loop; 0 without one
    sass: str = dataclasses.field(repr=False, default="")


def check_report(report: CubinReport, capability: int, name: str = "") -> None:
    """Assert that a kernel fits the chip's shared memory, spills nothing and lost no constant."""
    from atom_fast._device import SHARED_MEMORY

    assert report.spills == 0, name
    assert report.shared <= SHARED_MEMORY[capability], name
    assert report.lost_constants == 0, name


def compile_kernel(
    module: str,
    kernel: str,
    *,
    signature: dict[str, str],
    constants: dict[str, object],
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
    aligned: tuple[str, ...] = (),
    triton: str | None = None,
    brief: bool = False,
) -> CubinReport:
    """Compile ``kernels/<module>.py``'s ``kernel`` for ``sm_<capability>``.

    Args:
        signature: argument name to Triton type, such as ``"*fp32"``, ``"i32"``, ``"i64"``, ``"fp32"``, ``"constexpr"``,
            for every argument of the kernel in order.
        constants: the values of the ``constexpr`` arguments. An integer argument that Triton would specialise
            to 1 (a stride of one) belongs here too, with type ``"constexpr"``.
        aligned: arguments that are divisible by 16 (pointers of whole tensors, most strides).
        triton: folder of another, unpacked Triton; None for the installed one.
        brief: disassemble the machine code, which takes as long as compiling, only if it may have lost a constant;
            otherwise widths, tensor_core, instructions, loop and sass stay empty.

    Raises:
        RuntimeError: the kernel does not compile.
    """
    job = {
        "module": module,
        "kernel": kernel,
        "signature": signature,
        "constants": constants,
        "capability": capability,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "maxnreg": maxnreg,
        "aligned": list(aligned),
        "brief": brief,
    }
    return compile_job(json.dumps(job), triton)


@functools.cache
def compile_job(job: str, triton: str | None = None) -> CubinReport:
    """Compile a job of `compile_kernel`, given as JSON; equal jobs are compiled once per process."""
    worker = _worker(triton)
    worker.stdin.write(job + "\n")
    worker.stdin.flush()
    answer = json.loads(worker.stdout.readline())
    if "error" in answer:
        what = "{kernel} does not compile for sm_{capability}".format_map(json.loads(job))
        raise RuntimeError(f"{what}:\n{answer['error'][-4000:]}")
    return CubinReport(**answer)


@functools.cache
def _worker(triton: str | None) -> subprocess.Popen:
    """Start a compiling process, one per Triton: its start takes longer than most compilations."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if triton is not None:
        environment["PYTHONPATH"] = triton
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.cubin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    atexit.register(worker.kill)
    return worker


def _kernels(module: str) -> types.ModuleType:
    """Import ``kernels/<module>.py`` without the package, whose import takes seconds and needs PyTorch."""
    import importlib

    package = types.ModuleType("compiled_kernels")
    package.__path__ = [str(ROOT / "kernels")]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{module}")


def _compile(job: dict) -> CubinReport:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(_kernels(job["module"]), job["kernel"])
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
        options={name: job[name] for name in ("num_warps", "num_stages", "maxnreg")},
    )
    disassembled = not job["brief"] or "16x2" in compiled.asm["ptx"]
    return _read(compiled.asm["cubin"], compiled.metadata.shared, disassembled)


def _read(cubin: bytes, shared: int, disassembled: bool) -> CubinReport:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([_tool("cuobjdump"), "-res-usage", file.name], text=True)
        sass = disassemble(file.name) if disassembled else ""
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
        tensor_core=bool(re.search(r"\b(HMMA|HGMMA|IMMA|DMMA|UTC\w*MMA)", sass)),
        lost_constants=len(LOST_CONSTANT.findall(sass)),
        instructions=len(code := _instructions(sass)),
        loop=_longest_loop(code),
        sass=sass if os.environ.get("ATOM_FAST_KEEP_SASS") else "",
    )


def disassemble(cubin: str | Path) -> str:
    """Return the disassembled machine code of a file."""
    return subprocess.run([_tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True).stdout


def assemble(ptx: str, capability: int, cubin: str | Path) -> None:
    """Assemble PTX with Triton's ptxas for ``sm_<capability>``, and write the result to ``cubin``."""
    tool = "ptxas-blackwell" if capability >= 100 and _tool("ptxas-blackwell").exists() else "ptxas"
    command = [_tool(tool), f"-arch=sm_{capability}", "-o", cubin, "-"]
    subprocess.run(command, input=ptx, capture_output=True, text=True, check=True)


def _tool(name: str) -> Path:
    """Return the path of a program that comes with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _instructions(sass: str) -> list[tuple[int, str]]:
    """Return address and text of the instructions up to the last exit; padding follows it."""
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?) *;", sass)]
    code = [(address, text) for address, text in code if text != "NOP"]
    while code and re.search(r"\bBRA\b", code[-1][1]):
        code.pop()  # the endless loop after the last exit
    return code


def _longest_loop(code: list[tuple[int, str]]) -> int:
    """Return the number of instructions in the longest loop: from the target of a backward branch to the branch."""
    lengths = [0]
    for address, text in code:
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)$", text)
        if branch and int(branch.group(1), 16) <= address:
            lengths.append(sum(int(branch.group(1), 16) <= place <= address for place, _ in code))
    return max(lengths)


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
    """Answer each job on standard input with a line of JSON; the compiler's output goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer = dataclasses.asdict(_compile(json.loads(line)))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
