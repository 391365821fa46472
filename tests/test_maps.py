"""Linear maps of vectors: applied, transposed, fitted, saved."""

from __future__ import annotations

import numpy as np
import pytest

from ultrarag.errors import CheckpointError, UsageError
from ultrarag.maps import LinearMap, apply_chain, fit_ridge, unit_length

RANDOM = np.random.default_rng(0)


def vectors(rows: int, dim: int = 8) -> np.ndarray:
    return unit_length(RANDOM.normal(size=(rows, dim)))


def test_the_right_map_is_found_and_the_penalty_grows_with_the_noise():
    random = np.random.default_rng(1)
    old = unit_length(random.normal(size=(400, 8)))
    wanted = LinearMap(np.eye(8) + 0.3 * random.normal(size=(8, 8)), 0.1 * random.normal(size=8), False)
    clean, noisy, nothing = (
        fit_ridge(old[:rows], wanted.apply(old)[:rows] + noise * random.normal(size=(rows, 8)), normalize=False)
        for rows, noise in ((400, 0), (400, 0.3), (20, 30))
    )
    assert np.abs(clean.map.weight - wanted.weight).max() < 1e-2
    assert np.abs(clean.map.bias - wanted.bias).max() < 1e-2
    assert clean.error < 1e-5 < 0.05 < clean.identity_error
    assert clean.penalty < noisy.penalty < nothing.penalty
    assert np.abs(nothing.map.weight - np.eye(8)).max() < 0.1  # there is no map to find: the identity


def test_the_transposed_map_ranks_old_passages_as_the_map_ranks_new_ones():
    linear = LinearMap(RANDOM.normal(size=(8, 8)), RANDOM.normal(size=8), normalize=False)
    queries, passages = vectors(3), vectors(5)
    moved, constants = linear.transposed(queries)
    np.testing.assert_allclose(moved @ passages.T + constants[:, None], queries @ linear.apply(passages).T, atol=1e-5)


def test_a_chain_is_applied_in_order_and_to_any_block():
    first, second = (LinearMap(RANDOM.normal(size=(8, 8)), RANDOM.normal(size=8), last) for last in (False, True))
    some = vectors(6).astype(np.float16)
    found = apply_chain([first, second], some)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found[2:4], apply_chain([first, second], some[2:4]), atol=1e-6)
    np.testing.assert_array_equal(apply_chain([], some), some)
    assert np.abs(found - apply_chain([second, first], some)).max() > 0.1


def test_it_comes_back_and_its_digest_is_its_content(tmp_path):
    linear = LinearMap(RANDOM.normal(size=(8, 8)), RANDOM.normal(size=8), False, "colbert")
    linear.save(tmp_path / "map")
    found = LinearMap.load(tmp_path / "map")
    assert (found.digest, found.head, found.normalize) == (linear.digest, "colbert", False)
    others = [
        LinearMap(linear.weight, linear.bias, True, "colbert"),
        LinearMap(linear.weight, linear.bias, False, "dense"),
        LinearMap(linear.weight, linear.bias + 1e-3, False, "colbert"),
    ]
    assert len({linear.digest, *(other.digest for other in others)}) == 4
    (tmp_path / "map" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"map/model.safetensors is no linear map"):
        LinearMap.load(tmp_path / "map")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LinearMap(np.ones((2, 3)), np.ones(2)), r"W \(d, d\) and b \(d,\), not W \(2, 3\)"),
        (lambda: LinearMap(np.full((2, 2), np.nan), np.ones(2)), "not finite"),
        (lambda: LinearMap(np.eye(2), np.ones(2), head="sparse"), "no map of the head 'sparse'"),
        (lambda: LinearMap.identity(2).apply(np.ones((1, 3))), "vectors of 2 dimensions, not of shape"),
        (lambda: fit_ridge(np.ones((20, 2)), np.ones((20, 3))), "pairs of vectors of the same width"),
        (lambda: fit_ridge(np.ones((9, 2)), np.ones((9, 2))), "9 pairs of vectors are too few"),
    ],
)
def test_what_is_no_map_is_refused(call, words):
    with pytest.raises(UsageError, match=words):
        call()
