"""The C library's memory, kept when it is freed, so that a CPU's times are those of arithmetic."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> bool:
    """Have glibc keep what this process frees; PyTorch's allocator for GPUs does so by itself.

    By default glibc hands large blocks back to the system, and every step pays again for having its pages cleared: up
    to half of a step's time. Whether it does depends on the order of earlier allocations, so that two runs of the same
    step can differ by as much. PyTorch's tuning guide recommends an allocator that keeps memory, for the same reason.

    Returns:
        Whether this C library can be told.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return mallopt(_MMAP_MAX, 0) == 1 and mallopt(_TRIM_THRESHOLD, 2**31 - 1) == 1
