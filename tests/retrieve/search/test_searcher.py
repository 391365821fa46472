"""Searches of a whole index: equal scores of every head, and of heads fused."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from ultrarag.errors import UsageError
from ultrarag.retrieve.engines import default_backend
from ultrarag.retrieve.live import LiveIndex

HEADS = [{name: 1.0} for name in ("dense", "sparse", "colbert", "bm25")]
FUSED = {"dense": 1.0, "sparse": 0.3, "colbert": 0.5, "bm25": 0.2}
#: The text of the same passages, and of two others.
SAME, OTHERS = "the river bends at the old mill", ["a mill by the sea", "stones in a dry river"]


@pytest.fixture(params=["numpy", default_backend()])
def tied(request: pytest.FixtureRequest, tmp_path: Path, tiny):
    """An index of 20 passages with the same text, added in no order."""
    numbers = random.Random(1).sample(range(20), 20)
    with closing(LiveIndex.create(tmp_path / "kb", tiny, backend=request.param)) as index:
        index.add({"id": f"p{number:02}", "text": SAME} for number in numbers)
        index.add({"id": f"x{number}", "text": text} for number, text in enumerate(OTHERS))
        yield index


def searched(live: LiveIndex, k: int, **options) -> list[str]:
    return [hit.id for hit in live.search("old mill at the river", k=k, **options)]


@pytest.mark.parametrize(
    "options",
    [*({"weights": weights} for weights in HEADS), {"weights": FUSED}, {"weights": FUSED, "normalize": "raw"},
     {"heads": ["dense", "bm25"], "fusion": "rrf"}],
    ids=lambda options: "-".join([*options.get("weights", options.get("heads")), *options]),
)  # fmt: skip
def test_passages_with_the_same_text_come_in_the_order_of_their_ids(tied: LiveIndex, options: dict) -> None:
    everything = searched(tied, 22, **options)
    assert [id for id in everything if id[0] == "p"] == [f"p{number:02}" for number in range(20)]
    for k in range(1, 22):
        assert searched(tied, k, **options) == everything[:k], "a page more changes those before it"


def test_the_same_passages_come_first_after_a_rebuild(tied: LiveIndex, tiny, other, quick_builds) -> None:
    before = searched(tied, 5, heads=["dense"])
    tied.swap(tied.build(other))
    tied.swap(tied.build(tiny))
    assert searched(tied, 5, heads=["dense"]) == before


def test_an_encoder_is_lent_between_searches(live: LiveIndex, tiny) -> None:
    texts = ["an old castle", "the deep ocean", "a red apple"]
    with live.encoding() as lent:
        assert (lent.generation, lent.fingerprint, lent.heads) == (1, live.fingerprint, live.encoder.heads)
        asked, held = lent.encode(texts[:1], "query"), lent.encode(texts)
        scores = lent.similarity(asked, held, {"dense": 1.0, "colbert": 0.5})
        assert lent.tokenize(texts).ids == tiny.tokenize(texts, "passage").ids
        with pytest.raises(UsageError, match="kind is 'question'"):
            lent.encode(texts, "question")
        with pytest.raises(UsageError, match="no text"):
            lent.encode([])
    np.testing.assert_allclose(held.dense, tiny.encode(texts).dense, atol=1e-6)
    wanted = tiny.similarity(tiny.encode(texts[:1], "query"), tiny.encode(texts), {"dense": 1.0, "colbert": 0.5})
    np.testing.assert_allclose(scores, wanted, atol=1e-5)
