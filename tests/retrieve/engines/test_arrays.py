"""Arrays of engines: inner products that do not depend on the row."""

from __future__ import annotations

import numpy as np

from ultrarag.retrieve.engines.arrays import products


def test_the_same_vector_has_the_same_product_in_every_row() -> None:
    """Those of OpenBLAS differ in the last bit between rows of a block and the rows left over."""
    rng = np.random.default_rng(0)
    for rows, width in ((23, 384), (37, 100), (1001, 384)):
        vector, query = rng.normal(size=(2, width)).astype(np.float32)
        found = products(vector[None].repeat(rows, 0), query)
        assert set(found.tolist()) == set(products(vector[None], query).tolist())
