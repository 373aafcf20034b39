"""Keep freed memory in the process, so that steps on a CPU do not wait for the kernel to clear pages."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> bool:
    """Make glibc keep the memory that this process frees, as PyTorch's caching allocator does on a GPU.

    By default glibc returns large blocks to the system, and every step then waits for new pages to be cleared: up to
    half of its time. Which blocks are returned depends on the order of earlier allocations, so the same step can differ
    as much between runs. PyTorch's tuning guide recommends a caching allocator for the same reason.

    Returns:
        True if the C library accepted both settings; False if it is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return mallopt(_MMAP_MAX, 0) == 1 and mallopt(_TRIM_THRESHOLD, 2**31 - 1) == 1
