"""The smallest kernel, to test that device, driver and compiler work together."""

import triton
import triton.language as tl


@triton.jit
def probe_kernel(p_out):
    """Write 1. Grid: (1,).

    Args:
        p_out: [1] float32.
    """
    tl.store(p_out, 1.0)
