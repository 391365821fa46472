"""Learned sparse encoders (SPLADE): their layouts, how many weights they keep, and training that gives them fewer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from transformers import TrainerState

from ultrarag import Encoder
from ultrarag.encoder import find_adapter
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.finetune import finetune
from ultrarag.loss_arguments import LossArguments
from ultrarag.losses import embedding_loss, flops, regularizer_share, sparsity
from ultrarag.retrieve import LiveIndex
from ultrarag.testing.tiny import TEXTS, tiny_cross_encoder, tiny_m3, tiny_masked_lm, tiny_router, tiny_splade
from ultrarag.types import Embeddings, Sparse

ROWS = [
    {"query": f"question {i} of seals", "pos": [f"the answer {i} is water"], "neg": [f"a database {i + 3}"]}
    for i in range(8)
]
RUN: dict[str, Any] = {"max_steps": 4, "train_group_size": 2, "use_cpu": True, "temperature": 1.0}


@pytest.fixture(scope="module")
def splade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splade") / "model"
    tiny_splade(folder)
    return folder


def spread(sparse: Sparse, tokens: int) -> np.ndarray:
    """The weights as sentence-transformers has them, (texts, tokens)."""
    found = np.zeros((len(sparse.ids), tokens), np.float32)
    for row, ids, weights in zip(found, sparse.ids, sparse.weights, strict=True):
        row[ids[ids >= 0]] = weights[ids >= 0]
    return found


def assert_same(encoder: Encoder, library: SparseEncoder) -> None:
    for kind, encode in (("query", library.encode_query), ("passage", library.encode_document)):
        theirs = encode(list(TEXTS), convert_to_tensor=True).to_dense().numpy()
        ours = encoder.encode(TEXTS, kind).sparse  # type: ignore[arg-type]
        np.testing.assert_allclose(spread(ours, theirs.shape[1]), theirs, atol=1e-5)


# ---- layouts


def test_a_masked_language_model_is_a_splade_where_its_card_says_so(splade: Path, tmp_path: Path) -> None:
    tiny_splade(tmp_path / "naver", bare=True)
    encoder = Encoder.load(tmp_path / "naver", device="cpu")
    assert encoder.adapter.name == "sentence-transformers"
    assert_same(encoder, SparseEncoder(str(splade), device="cpu"))
    with pytest.raises(UsageError, match=r"'bge' cannot be right .* learned sparse encoder .*README.md: splade"):
        Encoder.load(tmp_path / "naver", "bge")
    result = finetune(tmp_path / "naver", ROWS, tmp_path / "out", learning_rate=1e-2, **RUN)
    assert_same(Encoder.load(result.checkpoint, device="cpu"), SparseEncoder(str(result.checkpoint), device="cpu"))


def test_any_masked_language_model_may_be_asked_to_be_one(splade: Path, tmp_path: Path) -> None:
    tiny_masked_lm(tmp_path / "bare")
    assert find_adapter(tmp_path / "bare") == "bge"
    encoder = Encoder.load(tmp_path / "bare", "sentence-transformers", heads=("sparse",), device="cpu")
    assert_same(encoder, SparseEncoder(str(splade), device="cpu"))
    with pytest.raises(CheckpointError, match=r"or ask for a SPLADE of this masked language model .*--heads sparse"):
        Encoder.load(tmp_path / "bare", "sentence-transformers")
    more: dict[str, Any] = {"adapter": "sentence-transformers", "heads": ("sparse",)}
    result = finetune(tmp_path / "bare", ROWS, tmp_path / "out", learning_rate=1e-2, **more, **RUN)
    assert Encoder.load(result.checkpoint, device="cpu").heads == ("sparse",)


@pytest.mark.parametrize("table", ["idf.json", "query_token_weights.txt"])
def test_half_of_an_inference_free_model_is_refused(table: str, tmp_path: Path) -> None:
    tiny_masked_lm(tmp_path / "model")
    (tmp_path / "model" / table).write_text("{}")
    with pytest.raises(CheckpointError, match=f"queries are read by a table \\({table}\\), and without modules.json"):
        Encoder.load(tmp_path / "model")


# ---- how many weights are kept


def test_no_more_weights_are_kept_than_the_checkpoint_says(splade: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(splade, tmp_path / "few")
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_active_dims": 5}))
    encoder = Encoder.load(folder, device="cpu")
    assert encoder.settings.max_active_dims == 5
    assert encoder.encode(TEXTS).sparse.ids.shape[1] == 5
    assert_same(encoder, SparseEncoder(str(folder), device="cpu"))
    assert encoder.fingerprint != Encoder.load(splade, device="cpu").fingerprint
    result = finetune(folder, ROWS, tmp_path / "out", learning_rate=1e-2, **RUN)
    trained = Encoder.load(result.checkpoint, device="cpu")
    assert trained.encode(TEXTS).sparse.ids.shape[1] == 5
    assert_same(trained, SparseEncoder(str(result.checkpoint), device="cpu"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_active_dims": 0}))
    with pytest.raises(CheckpointError, match="max_active_dims is 0; it is a whole number above 0"):
        Encoder.load(folder, device="cpu")


def test_how_many_are_kept_may_be_told(splade: Path, tmp_path: Path) -> None:
    """Of any model with lexical weights: the greatest, in the order of their ids."""
    few = Encoder.load(splade, max_active_dims=3, device="cpu")
    assert_same(few, SparseEncoder(str(splade), max_active_dims=3, device="cpu"))
    saved = few.save(tmp_path / "saved")
    assert Encoder.load(saved, device="cpu").settings.max_active_dims == 3
    assert SparseEncoder(str(saved), device="cpu").max_active_dims == 3
    tiny_m3(tmp_path / "m3")
    whole, cut = (
        Encoder.load(tmp_path / "m3", device="cpu", max_active_dims=most).encode(TEXTS).sparse for most in (None, 2)
    )
    for ids, weights, all_ids, all_weights in zip(cut.ids, cut.weights, whole.ids, whole.weights, strict=True):
        best = {int(all_ids[place]) for place in np.argsort(-all_weights, kind="stable")[:2] if all_ids[place] >= 0}
        assert {int(number) for number in ids if number >= 0} == best
        assert list(ids[ids >= 0]) == sorted(ids[ids >= 0])
        assert (np.diff((ids < 0).astype(int)) >= 0).all()  # padding stands last
        assert weights[ids < 0].sum() == 0


def test_an_index_of_few_weights_finds_by_them(splade: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(splade, max_active_dims=8, device="cpu")
    with LiveIndex.create(tmp_path / "index", encoder, backend="numpy") as live:
        live.add([{"id": str(number), "text": text} for number, text in enumerate(TEXTS)])
        hits = live.search(TEXTS[0], k=3, weights={"sparse": 1.0})
    scores = encoder.similarity(encoder.encode([TEXTS[0]], "query"), encoder.encode(TEXTS))[0]
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True)[:3], rel=1e-5)


# ---- training for fewer


def embeddings(rows: int, seed: int, tokens: int = 40) -> tuple[Embeddings, torch.Tensor]:
    """Random weights of some tokens, as ours and as (rows, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    dense = (torch.randn(rows, tokens, generator=generator)).relu()
    dense[0, 6:] = 0  # one with few
    width = int((dense > 0).sum(1).max())
    ids = torch.full((rows, width), Sparse.PAD_ID)
    weights = torch.zeros(rows, width)
    for row, values in enumerate(dense):
        there = values.nonzero()[:, 0]
        ids[row, : len(there)], weights[row, : len(there)] = there, values[there]
    return Embeddings(sparse=Sparse(ids, weights)), dense


@pytest.mark.parametrize("thresholds", [(None, None), (8, 12)])
@pytest.mark.parametrize("weights", [(0.3, 0.2), (0.0, 0.2)])
def test_the_loss_is_that_of_splade(splade: Path, thresholds: Any, weights: Any) -> None:
    (query, dense), (passage, other) = embeddings(4, 1), embeddings(8, 2)
    args = LossArguments(
        temperature=1.0,
        query_regularizer_weight=weights[0],
        document_regularizer_weight=weights[1],
        query_regularizer_threshold=thresholds[0],
        document_regularizer_threshold=thresholds[1],
    )
    library = SparseEncoder(str(splade), device="cpu")
    theirs = SpladeLoss(
        library,
        SparseMultipleNegativesRankingLoss(library),
        document_regularizer_weight=weights[1],
        query_regularizer_weight=weights[0] or None,
        query_regularizer_threshold=thresholds[0],
        document_regularizer_threshold=thresholds[1],
    )
    sides = [dense, other[0::2], other[1::2]]
    expected = theirs.loss.compute_loss_from_embeddings(sides, None)
    expected = expected + weights[1] * theirs.document_regularizer.compute_loss_from_embeddings(torch.cat(sides[1:]))
    expected = expected + weights[0] * theirs.query_regularizer.compute_loss_from_embeddings(dense)
    ours = embedding_loss(query, passage, None, 0, args) + sparsity(query, passage, args)
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)


def test_the_gradient_of_flops(splade: Path) -> None:
    found, dense = embeddings(6, 3)
    found.sparse.weights.requires_grad_()
    dense.requires_grad_()
    flops(found.sparse).backward()
    dense.mean(0).square().sum().backward()
    there = found.sparse.ids >= 0
    rows = torch.arange(6)[:, None].expand_as(found.sparse.ids)[there]
    torch.testing.assert_close(found.sparse.weights.grad[there], dense.grad[rows, found.sparse.ids[there]])
    assert not found.sparse.weights.grad[~there].any()


@pytest.mark.parametrize(("steps", "ratio"), [(30, 1 / 3), (7, 0.5), (2, 0.1), (1, 1.0)])
def test_the_weights_grow_as_in_sentence_transformers(splade: Path, steps: int, ratio: float) -> None:
    library = SparseEncoder(str(splade), device="cpu")
    loss = SpladeLoss(library, SparseMultipleNegativesRankingLoss(library), document_regularizer_weight=1.0)
    schedule = SpladeRegularizerWeightSchedulerCallback(loss, warmup_ratio=ratio)
    state = TrainerState(max_steps=steps)
    schedule.on_train_begin(None, state, None)
    args = LossArguments(regularizer_warmup_ratio=ratio)
    for step in range(steps):
        state.global_step = step
        schedule.on_step_begin(None, state, None)
        assert regularizer_share(step, steps, args) == pytest.approx(loss.document_regularizer_weight)
    assert regularizer_share(0, steps, LossArguments(regularizer_warmup_ratio=0.0)) == 1


def cost(folder: Path | str, kind: str) -> float:
    """The FLOPS of what a model makes of some texts."""
    found = Encoder.load(folder, device="cpu").encode(TEXTS, kind).sparse  # type: ignore[arg-type]
    return float(flops(Sparse(*map(torch.as_tensor, (found.ids, found.weights)))))


@pytest.mark.parametrize("more", [{}, {"use_lora": True, "lora_rank": 8}, {"sub_batch_size": 3}], ids=str)
def test_training_gives_fewer_weights(splade: Path, more: dict[str, Any], tmp_path: Path) -> None:
    weights = {"query_regularizer_weight": 3.0, "document_regularizer_weight": 3.0}
    run: dict[str, Any] = {**RUN, "max_steps": 12, "learning_rate": 2e-2, "seed": 3, **more}
    plain = finetune(splade, ROWS, tmp_path / "plain", **run)
    kept = finetune(splade, ROWS, tmp_path / "kept", **weights, **run)
    for kind in ("query", "passage"):
        assert cost(kept.checkpoint, kind) < 0.85 * cost(plain.checkpoint, kind)
    assert_same(Encoder.load(kept.checkpoint, device="cpu"), SparseEncoder(str(kept.checkpoint), device="cpu"))


def test_a_router_gets_fewer_weights_in_its_documents(tmp_path: Path) -> None:
    tiny_router(tmp_path / "model")
    run: dict[str, Any] = {**RUN, "max_steps": 12, "learning_rate": 2e-2}
    for side in ("both", "passage"):
        kept, plain = (
            finetune(
                tmp_path / "model",
                ROWS,
                tmp_path / f"{side}{weight}",
                document_regularizer_weight=weight,
                train_side=side,
                **run,
            )
            for weight in (3.0, 0.0)
        )
        assert cost(kept.checkpoint, "passage") < 0.7 * cost(plain.checkpoint, "passage")


def test_what_cannot_be_is_refused(splade: Path, tmp_path: Path) -> None:
    from ultrarag.testing.tiny import tiny_bert

    tiny_bert(tmp_path / "bert")
    with pytest.raises(UsageError, match=r"--document_regularizer_weight is for lexical weights, .* trained are dense"):
        finetune(tmp_path / "bert", ROWS, tmp_path / "out", document_regularizer_weight=1e-3, **RUN)
    tiny_cross_encoder(tmp_path / "pairs")
    with pytest.raises(UsageError, match="--query_regularizer_weight does not suit a cross-encoder: it has no lexical"):
        finetune(tmp_path / "pairs", ROWS, tmp_path / "out", query_regularizer_weight=1e-3, **RUN)
    for name, value in {
        "query_regularizer_weight": -1.0,
        "document_regularizer_weight": float("nan"),
        "document_regularizer_threshold": -1,
        "regularizer_warmup_ratio": 1.5,
    }.items():
        with pytest.raises(UsageError, match=f"{name} is"):
            LossArguments(**{name: value})  # type: ignore[arg-type]
