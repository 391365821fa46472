"""Compressed vectors: what each format keeps, to the bit where it is exact."""

from __future__ import annotations

import numpy as np
import pytest

from ultrarag.encode.corpus import FORMATS, Compression, truncated
from ultrarag.errors import UsageError


@pytest.fixture
def dense() -> np.ndarray:
    found = np.random.default_rng(0).normal(size=(50, 20)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("format", "cosine", "width"),
    [("float32", 1, 80), ("float16", 0.999999, 40), ("int8", 0.9999, 20), ("binary", 0.6, 3)],
)
def test_decoded_vectors_are_near_the_given_ones(dense, format, cosine, width):
    chosen = Compression(format)
    codes, scale = chosen.encode(dense)
    back = chosen.decode(codes, scale, 20)
    found = (back * dense).sum(1) / np.linalg.norm(back, axis=1)
    assert found.min() >= cosine - 1e-6
    assert codes[0].nbytes == width
    assert back.dtype == np.float32


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_code_alone_and_among_others(dense, format):
    together, scales = Compression(format).encode(dense)
    alone, scale = Compression(format).encode(dense[7:8])
    assert np.array_equal(alone[0], together[7])
    assert scale[0] == scales[7]


def test_a_zero_vector_stays_zero_in_int8():
    codes, scale = Compression("int8").encode(np.zeros((1, 4), np.float32))
    assert not Compression("int8").decode(codes, scale, 4).any()


def test_truncated_vectors_have_unit_length_again_where_they_had_it(dense):
    assert np.linalg.norm(truncated(dense, 8), axis=1) == pytest.approx(1, abs=1e-6)
    assert np.array_equal(truncated(3 * dense, 8), (3 * dense)[:, :8])
    with pytest.raises(UsageError, match="have 20 dimensions"):
        truncated(dense, 21)


def test_unknown_formats():
    with pytest.raises(UsageError, match="did you mean 'int8'"):
        Compression("int9")
