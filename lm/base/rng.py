"""Randomness without state: every random number is a function of (seed, purpose, step).

Nothing has to be saved to resume, and drawing for one purpose cannot disturb another.
It is computed here, because NumPy may change its streams between versions.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 4  # Luby and Rackoff 1988: four Feistel rounds give a pseudorandom permutation


def seed(root: int, purpose: str, *steps: int) -> int:
    """Return 63 bits for one purpose and step: seed(1337, "dropout", step, micro_batch)."""
    text = "/".join([str(root), purpose, *map(str, steps)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def random_bits(key: int, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return 64 bits for each counter: SplitMix64 (Steele, Lea and Flood 2014) at that index."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        z = np.uint64(key) + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_integers(key: int, count: int, high: int) -> NDArray[np.int64]:
    """Return `count` integers in [0, high), uniform to within high / 2**64."""
    bits = random_bits(key, np.arange(count, dtype=np.uint64))
    return (bits % np.uint64(high)).astype(np.int64)


def random_uniforms(key: int, count: int) -> NDArray[np.float64]:
    """Return `count` floats in [0, 1) with 53 random bits each."""
    bits = random_bits(key, np.arange(count, dtype=np.uint64)) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def permuted(key: int, indices: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the images of indices under a random permutation of range(size), without a table.

    A Feistel network permutes the next power of four numbers; an image outside of range(size) is
    permuted again until it lands inside ("cycle walking", Black and Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)

    def once(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> shift, values & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (random_bits(seed(key, "feistel", number), right) & mask)
        return (left << shift) | right

    images = once(indices.astype(np.uint64))
    while (outside := images >= size).any():
        images[outside] = once(images[outside])
    return images.astype(np.int64)
