"""Draws: random choices that are a function of a few integers, in every process, on every machine, for good."""

from __future__ import annotations

import hashlib

import numpy as np


class Draws:
    """A stream of choices for one key, such as (seed, epoch, row).

    Only numpy's bit generators promise the same stream in every later version (NEP 19), its distributions do
    not; so permutations and bounded numbers are made here from raw 64-bit words. A run resumed after an
    upgrade of numpy sees the same batches.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def order(self, count: int) -> np.ndarray:
        """Return a permutation of 0..count-1, (count,) int64."""
        return np.argsort(self._bits.random_raw(count), kind="stable")

    def below(self, limit: int) -> int:
        """Return a number from 0 to limit-1 (the bias of the remainder is below limit / 2**64)."""
        return int(self._bits.random_raw()) % limit

    def happens(self, probability: float) -> bool:
        """Return True with this probability."""
        return probability > 0 and (int(self._bits.random_raw()) >> 11) * 2.0**-53 < probability


def number_of(name: str) -> int:
    """Return a number that stands for `name` in a key; Python's own `hash` differs between processes."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
