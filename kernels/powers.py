"""The attention power |f|^p and its slope, shared by the kernels that compute attention maps."""

import triton
import triton.language as tl


@triton.jit
def power(u, P: tl.constexpr):
    """Return u^P for u >= 0: products if P is 1, 2, 4 or 8, otherwise exp2(P log2 u) with 0 at u = 0."""
    if P == 1:
        result = u
    elif P == 2:
        result = u * u
    elif P == 4:
        square = u * u
        result = square * square
    elif P == 8:
        square = u * u
        fourth = square * square
        result = fourth * fourth
    else:
        # log2 of a positive value: log2(0) would give 0 * inf.
        result = tl.where(u > 0, tl.exp2(P * tl.log2(tl.where(u > 0, u, 1.0))), u)
    return result


@triton.jit
def slope(u, P: tl.constexpr):
    """Return u^(P - 1) for u >= 0: the derivative of u^P without its factor P; 1 at u = 0 and P = 1."""
    if P == 1:
        result = u * 0 + 1.0
    elif P == 2:
        result = u
    elif P == 4:
        result = u * u * u
    elif P == 8:
        cube = u * u * u
        result = cube * cube * u
    else:
        result = tl.where(u > 0, tl.exp2((P - 1.0) * tl.log2(tl.where(u > 0, u, 1.0))), u)
    return result
