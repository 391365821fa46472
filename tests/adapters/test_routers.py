"""Routers of sentence-transformers: each kind of text takes its way, before and after training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch

from ultrarag import Encoder
from ultrarag.errors import CheckpointError, UltraragError, UsageError
from ultrarag.finetune import finetune
from ultrarag.retrieve import LiveIndex
from ultrarag.testing.tiny import tiny_router
from ultrarag.types import Embeddings

KINDS = ("inference-free", "dense", "heads", "static")
TEXTS = ["seals sleep under water", "what is a vector database? " * 60, "a, b; c!", "seals", "zzz \u4f60", ""]
ROWS = [
    {"query": f"question {i} of seals", "pos": [f"the answer {i} is water"], "neg": [f"a database {i + 3}"]}
    for i in range(8)
]
RUN: dict[str, Any] = {
    "learning_rate": 1e-2,
    "max_steps": 3,
    "train_group_size": 2,
    "report_to": "none",
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("routers") / kind for kind in KINDS}
    for kind, folder in folders.items():
        tiny_router(folder, kind)
    return folders


def assert_same(folder: Path, encoder: Encoder) -> None:
    """Both kinds of text have the library's vectors."""
    sparse = encoder.heads == ("sparse",)
    library = getattr(sentence_transformers, "SparseEncoder" if sparse else "SentenceTransformer")
    theirs = library(str(folder), device="cpu")
    for kind, encode in (("query", theirs.encode_query), ("passage", theirs.encode_document)):
        ours: Any = encoder.encode(TEXTS, kind)
        expected = encode(TEXTS, convert_to_tensor=True)
        if sparse:
            found = np.zeros(tuple(expected.shape), np.float32)
            for row, (ids, weights) in enumerate(zip(ours.sparse.ids, ours.sparse.weights, strict=True)):
                found[row, ids[ids >= 0]] = weights[ids >= 0]
            expected = expected.to_dense()
        else:
            found = ours.dense
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def difference(one: Embeddings, other: Embeddings) -> float:
    """The largest, of dense vectors, or of the weights' sums."""
    if one.dense is not None:
        return float(np.abs(one.dense - other.dense).max())
    return float(np.abs(one.sparse.weights.sum(1) - other.sparse.weights.sum(1)).max())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_text_takes_its_way(routers, kind: str) -> None:
    encoder = Encoder.load(routers[kind], device="cpu")
    assert encoder.adapter.name == "sentence-transformers"
    assert_same(routers[kind], encoder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_a_router_is_trained_and_loads_again_here_and_there(routers, kind: str, lora: bool, tmp_path) -> None:
    more = {"use_lora": True, "lora_rank": 2} if lora else {}
    result = finetune(routers[kind], ROWS, tmp_path / "out", **RUN, **more)
    before, after = Encoder.load(routers[kind], device="cpu"), Encoder.load(result.checkpoint, device="cpu")
    for side in ("passage",) if kind in ("inference-free", "static") and lora else ("query", "passage"):
        moved = difference(before.encode(TEXTS, side), after.encode(TEXTS, side))  # type: ignore[arg-type]
        assert moved > 1e-4, side
    assert_same(Path(result.checkpoint), after)


def test_an_index_asks_by_the_table_what_the_model_has_read(routers, tmp_path) -> None:
    encoder = Encoder.load(routers["inference-free"], device="cpu")
    with LiveIndex.create(tmp_path / "index", encoder, backend="numpy") as live:
        live.add([{"id": f"p{n}", "text": text} for n, text in enumerate(TEXTS) if text])
        found = live.search("seals", k=3, weights={"sparse": 1.0})
    scores = encoder.encode(["seals"], "query").sparse, encoder.encode(TEXTS, "passage").sparse
    query = dict(zip(scores[0].ids[0].tolist(), scores[0].weights[0].tolist(), strict=True))
    each = [
        sum(query.get(id, 0.0) * weight for id, weight in zip(ids.tolist(), weights.tolist(), strict=True) if id >= 0)
        for ids, weights in zip(scores[1].ids, scores[1].weights, strict=True)
    ]
    best = sorted((row for row in range(len(TEXTS)) if each[row] > 0), key=lambda row: -each[row])[:3]
    assert best
    assert [hit.id for hit in found] == [f"p{row}" for row in best]
    assert [hit.score for hit in found] == pytest.approx([each[row] for row in best], rel=1e-5)


@pytest.fixture(scope="module")
def frozen(routers, tmp_path_factory) -> Path:
    """The inference-free router, whose table is declared frozen."""
    library = sentence_transformers.SparseEncoder(str(routers["inference-free"]), device="cpu")
    library[0].sub_modules["query"][0].frozen = True
    folder: Path = tmp_path_factory.mktemp("frozen") / "model"
    library.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.mark.parametrize("more", [{}, {"train_side": "passage"}, {"use_lora": True}, {"sub_batch_size": 4}], ids=str)
def test_a_table_that_is_declared_frozen_stays(frozen: Path, more: dict[str, Any], tmp_path) -> None:
    result = finetune(frozen, ROWS, tmp_path / "out", **more, **RUN)
    before, after = Encoder.load(frozen, device="cpu"), Encoder.load(result.checkpoint, device="cpu")
    assert difference(before.encode(TEXTS, "query"), after.encode(TEXTS, "query")) == 0
    assert difference(before.encode(TEXTS, "passage"), after.encode(TEXTS, "passage")) > 1e-4


def test_a_table_behind_other_modules_that_is_declared_frozen_stays(routers, tmp_path) -> None:
    """A weight for each token behind a SPLADE, in the passages' route; what is frozen is written as frozen again."""
    library = sentence_transformers.SparseEncoder(str(routers["inference-free"]), device="cpu")
    table = copy.deepcopy(library[0].sub_modules["query"][0])
    table.frozen = True
    library[0].sub_modules["document"].append(table)
    library.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    result = finetune(tmp_path / "model", ROWS, tmp_path / "out", **RUN)
    before, after = Encoder.load(tmp_path / "model", device="cpu"), Encoder.load(result.checkpoint, device="cpu")
    tables = [encoder.model.library_model[0].sub_modules["document"][2] for encoder in (before, after)]
    assert tables[1].frozen
    assert torch.equal(tables[0].weight, tables[1].weight)
    assert difference(before.encode(TEXTS, "passage"), after.encode(TEXTS, "passage")) > 1e-4
    assert_same(Path(result.checkpoint), after)


def test_a_side_that_is_declared_frozen_is_not_trained(frozen: Path, tmp_path) -> None:
    with pytest.raises(UsageError, match="declares frozen"):
        finetune(frozen, ROWS, tmp_path / "out", train_side="query", **RUN)


def test_a_table_has_no_layer_for_lora(routers, tmp_path) -> None:
    with pytest.raises(UsageError, match="no linear layer"):
        finetune(routers["inference-free"], ROWS, tmp_path / "out", train_side="query", use_lora=True, **RUN)


def test_a_table_that_is_not_frozen_is_trained_alone(routers, tmp_path) -> None:
    result = finetune(routers["inference-free"], ROWS, tmp_path / "out", train_side="query", **RUN)
    before, after = (Encoder.load(path, device="cpu") for path in (routers["inference-free"], result.checkpoint))
    assert difference(before.encode(TEXTS, "query"), after.encode(TEXTS, "query")) > 1e-4
    assert difference(before.encode(TEXTS, "passage"), after.encode(TEXTS, "passage")) == 0


def test_a_router_without_a_way_for_queries_is_refused(routers, tmp_path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    modules = list(SentenceTransformer(str(routers["dense"]), device="cpu"))
    routes = list(modules[0].sub_modules.values())
    odd = SentenceTransformer(modules=[Router({"left": list(routes[0]), "document": list(routes[1])})], device="cpu")
    odd.save_pretrained(str(tmp_path / "odd"), create_model_card=False)
    with pytest.raises(CheckpointError, match="routes left, document, and none called 'query'"):
        Encoder.load(tmp_path / "odd", device="cpu")


def test_other_adapters_still_refuse_a_router(routers) -> None:
    assert json.loads((routers["dense"] / "modules.json").read_text())[0]["type"].endswith("Router")
    with pytest.raises(UltraragError, match=r"ways of its own for queries and for documents"):
        Encoder.load(routers["dense"], adapter="bge", device="cpu")
