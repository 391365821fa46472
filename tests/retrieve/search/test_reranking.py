"""Reranking: the order of a model that reads query and passage together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ultrarag import hookimpl
from ultrarag.errors import DataError, UsageError
from ultrarag.plugins import registry
from ultrarag.retrieve import rerank
from ultrarag.testing.tiny import tiny_cross_encoder, tiny_tokenizer
from ultrarag.types import Embeddings, Hit, Passage, Tokens


class Overlap:
    """A stand-in for a cross-encoder: the share of the query's words that the passage holds."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []
        self.options: dict[str, Any] = {}

    def score(self, pairs: list[tuple[str, str]], **options: Any) -> np.ndarray:
        self.pairs, self.options = pairs, options
        return np.array([len({*q.split()} & {*p.split()}) / len(q.split()) for q, p in pairs], np.float32)


def hit(id: str, text: str, score: float, title: str = "") -> Hit:
    return Hit(id, score, Passage(id, text, title), {"dense": score})


HITS = [hit("a", "a castle", 0.9), hit("b", "red apple", 0.8), hit("c", "a pie", 0.7, "red apple"), hit("d", "", 0.1)]


def test_the_rerankers_score_makes_the_order_and_the_former_is_kept() -> None:
    found = rerank(Overlap(), "red apple pie", HITS)  # type: ignore[arg-type]
    assert [item.id for item in found] == ["c", "b", "a", "d"]
    assert found[0].score == 1.0
    assert found[0].scores == {"dense": 0.7, "retrieval": 0.7}
    assert found[0].passage is HITS[2].passage
    assert [item.score for item in HITS] == [0.9, 0.8, 0.7, 0.1]


def test_a_weight_adds_the_rerankers_scores_to_the_hits_own() -> None:
    encoder = Overlap()
    alone, none, little, much = (
        [item.id for item in rerank(encoder, "red apple pie", HITS, weight=weight)]  # type: ignore[arg-type]
        for weight in (None, 0, 0.22, 100)
    )
    assert none == ["a", "b", "c", "d"]
    assert little == ["b", "a", "c", "d"]
    assert much == alone == ["c", "b", "a", "d"]
    (found, *_) = rerank(encoder, "red apple pie", HITS, weight=1)  # type: ignore[arg-type]
    own, others = np.array([0.9, 0.8, 0.7, 0.1]), np.array([0, 2 / 3, 1, 0])
    total = (own - own.mean()) / own.std() + (others - others.mean()) / others.std()
    assert found.score == pytest.approx(total.max(), abs=1e-6)
    assert found.scores["reranker"] == pytest.approx(others[total.argmax()])
    with pytest.raises(UsageError, match="weight is -1"):
        rerank(encoder, "red", HITS, weight=-1)  # type: ignore[arg-type]


def test_it_reads_title_and_text_and_passes_options_on() -> None:
    encoder = Overlap()
    rerank(encoder, "red", HITS, batch_tokens=64)  # type: ignore[arg-type]
    assert encoder.pairs == [("red", "a castle"), ("red", "red apple"), ("red", "red apple\na pie"), ("red", "")]
    assert encoder.options == {"batch_tokens": 64}


def test_equal_scores_keep_the_order_of_the_search() -> None:
    assert [item.id for item in rerank(Overlap(), "nothing", HITS)] == ["a", "b", "c", "d"]  # type: ignore[arg-type]


def test_no_hits_ask_nothing() -> None:
    encoder = Overlap()
    assert rerank(encoder, "red", []) == []  # type: ignore[arg-type]
    assert encoder.options == {}
    assert encoder.pairs == []


def test_a_score_that_is_no_number_is_refused() -> None:
    class Broken(Overlap):
        def score(self, pairs: list[tuple[str, str]], **options: Any) -> np.ndarray:
            return np.array([1.0, float("nan"), 0.0, 0.0])

    with pytest.raises(DataError, match="passage 'b' is not a number"):
        rerank(Broken(), "red", HITS)  # type: ignore[arg-type]


class Common:
    """A third party's cross-encoder: the score of a pair is the number of token ids that both sides share."""

    heads = ("scores",)
    pair_input = True

    @hookimpl
    def load(self, path, options):
        import torch

        class Model(torch.nn.Linear):
            tokenizer = tiny_tokenizer("bert", ("the sea a fast train home",))
            config = None

            def pair_tokens(self, queries, passages, query_max_length, max_length, **more):
                split = self.tokenizer(list(queries), add_special_tokens=False)["input_ids"]
                other = self.tokenizer(list(passages), add_special_tokens=False)["input_ids"]
                end = self.tokenizer.sep_token_id
                return Tokens([[*query, end, *passage] for query, passage in zip(split, other, strict=True)])

        return Model(1, 1)

    @hookimpl
    def encode(self, model, features):
        import torch

        def shared(ids, mask):
            row = ids[mask.bool()].tolist()
            end = row.index(model.tokenizer.sep_token_id)
            return float(len({*row[:end]} & {*row[end + 1 :]}))

        batch = zip(features["input_ids"], features["attention_mask"], strict=True)
        return Embeddings(scores=torch.tensor([shared(ids, mask) for ids, mask in batch]))

    @hookimpl
    def loss(self, model, query, passage, teacher, step, args):
        return passage.scores.sum()

    @hookimpl
    def save(self, model, path, state_dict):
        Path(path, "config.json").write_text("{}")


@pytest.fixture
def common(tmp_path: Path) -> Iterator[Any]:
    from ultrarag import Encoder

    registry().register(Common(), "common-words")
    try:
        yield Encoder.load(tmp_path, adapter="common-words", device="cpu")
    finally:
        registry().unregister("common-words")


def test_a_third_partys_adapter_reranks(common) -> None:
    hits = [hit(str(n), text, 1 - n / 10) for n, text in enumerate(["the sea", "a fast train", "the fast train home"])]
    found = rerank(common, "the fast train", hits, batch_tokens=16)
    assert [(item.id, item.score) for item in found] == [("2", 3.0), ("1", 2.0), ("0", 1.0)]


def test_the_built_in_one_reranks(tmp_path: Path) -> None:
    from ultrarag import Encoder

    tiny_cross_encoder(tmp_path / "model")
    encoder = Encoder.load(tmp_path / "model", adapter="bge-reranker", device="cpu")
    found = rerank(encoder, "red apple", HITS, normalize=True)
    alone = {item.id: rerank(encoder, "red apple", [item], normalize=True)[0].score for item in HITS}
    assert {item.id: item.score for item in found} == pytest.approx(alone, abs=1e-6)
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
    assert len(set(alone.values())) > 1
