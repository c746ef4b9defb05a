"""Randomness without state: known values, ranges, and permutations that permute."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.base import rng


def test_random_bits_are_splitmix64():
    # the first outputs of the reference implementation in C for seed 0 and seed 1234567
    expected = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
    }
    for key, values in expected.items():
        assert rng.random_bits(key, np.arange(3, dtype=np.uint64)).tolist() == values


def test_seeds_differ_by_root_purpose_and_step():
    seeds = {rng.seed(r, p, s) for r in (0, 1) for p in ("batch", "init") for s in range(50)}
    assert len(seeds) == 200
    assert rng.seed(1337, "batch", 7) == rng.seed(1337, "batch", 7)
    assert max(seeds) < 2**63


def test_random_integers_are_uniform():
    counts = np.bincount(rng.random_integers(5, 100_000, 10), minlength=10)
    assert len(counts) == 10
    assert counts.min() > 9_600
    assert counts.max() < 10_400


def test_random_uniforms_lie_in_the_unit_interval():
    values = rng.random_uniforms(3, 50_000)
    assert values.min() >= 0
    assert values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.01)


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_permuted_is_a_permutation_for_any_size(size, key):
    images = rng.permuted(key, np.arange(size), size)
    assert sorted(images.tolist()) == list(range(size))


@given(st.data(), st.integers(1, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_permuted_sends_no_two_places_to_one_however_large_the_size(data, size, key):
    places = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=200))
    images = rng.permuted(key, np.array(places, dtype=np.int64), size)
    assert len(set(images.tolist())) == len(places)
    assert all(0 <= image < size for image in images.tolist())


def test_permutations_differ_by_key_and_mix():
    a, b = (rng.permuted(key, np.arange(1000), 1000) for key in (1, 2))
    assert (a != b).mean() > 0.9
    assert abs(np.corrcoef(np.arange(1000), a)[0, 1]) < 0.1
