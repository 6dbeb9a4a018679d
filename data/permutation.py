"""Keyed permutations of [0, n): the same on every machine and with every version of every library."""

import hashlib

import numpy as np

MASK = (1 << 64) - 1
ROUNDS = 6


def key_of(*parts: object) -> int:
    """64 bits from anything with a faithful repr."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permutation(n: int, key: int) -> np.ndarray:
    """All of [0, n) in an order drawn by `key`, int64."""
    x = np.arange(n, dtype=np.uint64) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable").astype(np.int64)


class Shuffle:
    """A permutation of [0, n) without a table: a Feistel network, walked until it lands inside."""

    def __init__(self, n: int, key: int) -> None:
        assert n > 0
        self.n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1
        self._keys = [key_of(key, number) for number in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        assert 0 <= index < self.n
        while True:
            left, right = index >> self._half, index & self._low
            for key in self._keys:
                left, right = right, left ^ (_mix(right + key) & self._low)
            index = left << self._half | right
            if index < self.n:
                return index


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)
