"""The stored vectors of an index as a corpus to train against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.retrieve.test_live import corpus
from ultrarag.encode import CorpusVectors, passage_keys
from ultrarag.errors import DataError, UsageError
from ultrarag.retrieve import LiveIndex, export


@pytest.mark.parametrize("on_disk", [False, True])
def test_every_row_is_a_passage_with_its_vectors(
    live: LiveIndex, tiny, tmp_path: Path, on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "CHUNK_TEXTS", 4)
    passages = corpus(11)
    live.add(passages)
    live.delete(["p3"])
    kept = [passage for passage in passages if passage.id != "p3"]
    heads = ("dense",) if on_disk else ("dense", "sparse", "colbert")
    found = live.corpus_vectors(tmp_path / "vectors" if on_disk else None, heads)
    assert isinstance(found, CorpusVectors)
    assert list(found.ids) == [passage.id for passage in kept]
    assert np.array_equal(found.keys, passage_keys(kept))
    assert found.fingerprint == tiny.passage_fingerprint
    rows = np.array([7, 0])
    fresh = tiny.encode([kept[row].content for row in rows])
    held = found.read(rows, heads)
    np.testing.assert_allclose(held.dense, fresh.dense, atol=1e-5)
    found.check(tiny, heads)
    if on_disk:
        return
    assert [set(row) for row in held.sparse.to_dicts()] == [set(row) for row in fresh.sparse.to_dicts()]
    np.testing.assert_allclose(held.colbert[0][held.mask[0] > 0], fresh.colbert[0][fresh.mask[0] > 0], atol=1e-5)


def test_what_cannot_be_read_is_named(live: LiveIndex, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no passages"):
        live.corpus_vectors()
    live.add(corpus(2))
    with pytest.raises(UsageError, match="stores no head 'dens'"):
        live.corpus_vectors(heads=["dens"])
    assert live.corpus_vectors(tmp_path / "one", heads=["dense"]).heads == ("dense",)
