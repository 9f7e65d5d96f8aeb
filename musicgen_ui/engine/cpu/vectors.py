"""Arithmetic on rows of float32, compiled by numba, in a form that LLVM makes vectors of.

What is no number stays none throughout, so that music that has overflowed is seen by its logits.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from musicgen_ui.engine.cpu.microkernel import compiled, pointer

ALL, SIZE = np.int32(-1), np.int32(2**31 - 1)  # the bits of a float32; all but its sign


@compiled
def at_most(x: Any, limit: Any) -> Any:
    """The lesser of the two; NaN for NaN, which `min` does not promise."""
    return limit if x > limit else x


@compiled
def at_least(x: Any, limit: Any) -> Any:
    """The greater of the two; NaN for NaN."""
    return limit if x < limit else x


@compiled
def exp(x: Any) -> Any:
    """e to the x for x up to 0, within 2e-6 of it down to x = -40, so that loops become vectors."""
    y = at_least(x * np.float32(1.44269504), np.float32(-125))
    whole = np.floor(y + np.float32(0.5))
    f = (y - whole) * np.float32(0.69314718)
    p = np.float32(1 / 720)  # Taylor's polynomial, for f up to 0.35 either way
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def gelu(x: Any) -> None:
    """GELU in place; the error function after Abramowitz and Stegun 7.1.26, within 1.5e-7."""
    for i in range(len(x)):
        z = abs(x[i]) * np.float32(0.70710678)
        t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * z)
        p = np.float32(1.061405429)
        p = p * t - np.float32(1.453152027)
        p = p * t + np.float32(1.421413741)
        p = p * t - np.float32(0.284496736)
        p = p * t + np.float32(0.254829592)
        erf = np.float32(1) - p * t * exp(-z * z)
        x[i] = np.float32(0.5) * (x[i] + abs(x[i]) * erf)


@compiled
def floats(address: Any, count: Any) -> Any:
    """float32 [count] at an address."""
    return numba.carray(pointer(address), count, np.float32)


@compiled
def largest(x: Any, count: Any, kept: Any) -> Any:
    """Of the first numbers, with the bits `kept` of each.

    They are compared as integers in the same order: of these LLVM makes vectors (a tenth of the
    time). NaN is the largest of all where the sign is dropped.
    """
    numbers, best = numba.carray(pointer(x.ctypes.data), count, np.int32), np.int32(-(2**31))
    for i in range(count):
        bits = numbers[i] & kept
        best = max(best, bits ^ ((bits >> np.int32(31)) & SIZE))
    return np.int32(best ^ ((best >> np.int32(31)) & SIZE)).view(np.float32)


@compiled
def quantise(x: Any, codes: Any, most: Any) -> Any:
    """float32 [n] to the first n int16 of `codes`; gives their scale."""
    peak = at_least(largest(x, len(x), SIZE), np.float32(1e-12))
    inverse = np.float32(most) / peak
    for i in range(len(x)):
        codes[i] = np.int16(np.rint(x[i] * inverse))
    return peak / np.float32(most)


@compiled
def normalise(x: Any, norm: Any, epsilon: Any, out: Any) -> None:
    """A layer norm of one row; `norm`: scales and shifts."""
    mean, square = np.float32(0), np.float32(0)
    for i in range(len(x)):
        mean += x[i]
    mean /= np.float32(len(x))
    for i in range(len(x)):
        square += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1) / np.sqrt(square / np.float32(len(x)) + np.float32(epsilon))
    for i in range(len(x)):
        out[i] = (x[i] - mean) * scale * norm[0, i] + norm[1, i]
