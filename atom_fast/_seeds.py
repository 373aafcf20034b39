"""Derive independent seeds from one seed."""

_MASK = 2**64 - 1


def derive_seed(seed: int, index: int) -> int:
    """Return a 64-bit seed for stream ``index`` of ``seed``: SplitMix64's finaliser (Steele et al. 2014), twice.

    Neighbouring seeds and indices give unrelated streams; ``seed + index`` would give the same stream several times.
    """
    return _mix(_mix(seed & _MASK) ^ (index & _MASK))


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
