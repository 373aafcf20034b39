"""Run the kernels in C as compiled for arm64, in an emulator, wherever tests call them: a plugin, loaded by hand.

    pip install ziglang unicorn pyelftools
    python -m pytest -p tests.arm64 tests/ops tests/test_functional.py -k "torch and not 32_bits"

It takes minutes, on one thread. `native.run` copies the tensors of a call into the emulator and back.
"""

import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from elftools.elf.elffile import ELFFile
from unicorn import UC_ARCH_ARM64, UC_MODE_ARM, Uc
from unicorn import arm64_const as arm

from atom_fast.ops import native

PAGE = 0x1000
STOP, THREAD, STACK, HEAP = 0x7D0000000, 0x7E0000000, 0x7F0000000, 0x100000000
HEAP_BYTES = 1 << 28
FLOATING_POINT = 3 << 20  # of CPACR_EL1


def compiled() -> ELFFile:
    """Compile the kernels into a static program with a C library, which is never started."""
    folder = Path(tempfile.mkdtemp(prefix="atom_fast-arm64-"))
    (folder / "main.c").write_text("int main(void) { return 0; }")
    program = folder / "kernels"
    flags = [flag for flag in native._FLAGS if flag not in ("-shared", "-fPIC")]
    subprocess.run(
        [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static", "-Wl,--no-gc-sections",
         *flags, *map(str, native._sources("*.c")), str(folder / "main.c"), "-o", str(program), "-lm"],
        check=True,
    )  # fmt: skip
    return ELFFile(program.open("rb"))


def loaded(program: ELFFile) -> Uc:
    machine = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
    for segment in program.iter_segments("PT_LOAD"):
        first, last = segment["p_vaddr"] // PAGE, -(-(segment["p_vaddr"] + segment["p_memsz"]) // PAGE)
        for page in range(first, last):
            if not any(start <= page * PAGE <= end for start, end, _ in machine.mem_regions()):
                machine.mem_map(page * PAGE, PAGE)
        machine.mem_write(segment["p_vaddr"], segment.data())
    for start, size in ((STOP, PAGE), (THREAD, 1 << 16), (STACK, 1 << 20), (HEAP, HEAP_BYTES)):
        machine.mem_map(start, size)
    machine.reg_write(arm.UC_ARM64_REG_TPIDR_EL0, THREAD + (1 << 15))
    machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, machine.reg_read(arm.UC_ARM64_REG_CPACR_EL1) | FLOATING_POINT)
    return machine


PROGRAM = compiled()
MACHINE = loaded(PROGRAM)
ADDRESSES = {symbol.name: symbol["st_value"] for symbol in PROGRAM.get_section_by_name(".symtab").iter_symbols()}


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes from a tensor's first to its last value, as a view."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.itemsize
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return whole[start : start + (span if tensor.numel() else 0) * tensor.itemsize]


def run(name: str, samples: int, *arguments) -> None:
    """Stand in for `native.run`: whole numbers and pointers in x0 to x7, then on the stack; numbers in d0 to d7."""
    whole, numbers, copied, end = [], [], [], HEAP
    for argument in (*arguments, 1):  # one thread
        if isinstance(argument, torch.Tensor):
            content = memory_of(argument)
            before = content.numpy().tobytes()
            MACHINE.mem_write(end, before)
            copied.append((content, before, end))
            whole.append(end)
            end += -(-len(before) // 128) * 128
        elif isinstance(argument, float):
            numbers.append(argument)
        else:
            whole.append(int(argument or 0))
    assert end < HEAP + HEAP_BYTES
    for position, value in enumerate(whole[:8]):
        MACHINE.reg_write(arm.UC_ARM64_REG_X0 + position, value)
    for position, value in enumerate(numbers):
        MACHINE.reg_write(arm.UC_ARM64_REG_D0 + position, struct.unpack("<Q", struct.pack("<d", value))[0])
    MACHINE.mem_write(STACK + (1 << 19), struct.pack(f"<{len(whole[8:])}q", *whole[8:]))
    MACHINE.reg_write(arm.UC_ARM64_REG_SP, STACK + (1 << 19))
    MACHINE.reg_write(arm.UC_ARM64_REG_LR, STOP)
    MACHINE.emu_start(ADDRESSES[name], STOP)
    for content, before, start in copied:
        after = bytes(MACHINE.mem_read(start, len(before)))
        if after != before:  # an input may share memory with an output
            content.copy_(torch.frombuffer(bytearray(after), dtype=torch.uint8))


def pytest_configure(config):
    native.run = run
