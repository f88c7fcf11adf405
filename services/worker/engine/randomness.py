"""Uniform numbers without state: each is a hash of a seed and a counter.

The finaliser is that of SplitMix64 (Steele, Lea, Flood 2014).
"""

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def hash64(seed: int, counter: int) -> int:
    """64 well-mixed bits, equal for equal arguments on every machine."""
    return _mix((_mix((seed + _GOLDEN) & _MASK) + counter * _GOLDEN) & _MASK)


def uniform(seed: int, counter: int) -> float:
    """In [0, 1), with 53 bits."""
    return (hash64(seed, counter) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
