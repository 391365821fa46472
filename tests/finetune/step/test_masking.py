"""False negatives: the masks by brute force, the loss without them, the same on two processes and with GradCache."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.finetune.batches.planning import batch_plan, train_data
from tests.finetune.step.masking_worker import BATCH, MASKS, arguments_of, embeddings, loss_of, make
from tests.finetune.test_run import QUICK, ROWS
from ultrarag.errors import UsageError
from ultrarag.finetune import finetune
from ultrarag.finetune.step.gradcache import by_texts, cached_step
from ultrarag.finetune.step.masking import score_mask, spare, text_keys, text_mask
from ultrarag.loss_arguments import LossArguments
from ultrarag.losses import embedding_loss
from ultrarag.rows.row import text_key
from ultrarag.types import Embeddings, Sparse

ROOT = Path(__file__).parents[3]


def norm(text: str) -> str:
    return " ".join(text.lower().split())


def by_hand(batch) -> list[list[bool]]:
    """The text mask by its definition, positives excepted."""
    group, mask = batch.group_size, []
    for i, query in enumerate(batch.queries):
        known = {norm(text) for text in batch.positives[i]}
        known |= {
            norm(batch.passages[r * group]) for r, other in enumerate(batch.queries) if norm(other) == norm(query)
        }
        mask.append([norm(text) in known and j != i * group for j, text in enumerate(batch.passages)])
    return mask


def test_text_mask_is_what_its_definition_says():
    keys = text_keys(BATCH)
    mask = spare(text_mask(keys["passages"], keys["positives"], BATCH.group_size), BATCH.group_size, False)
    assert mask.tolist() == by_hand(BATCH)
    assert mask.any(1).tolist() == [True, True, True, False]
    assert text_key("Ｂread  RISES\n") == text_key("bread rises") != text_key("bread rise")
    whole = spare(torch.ones(4, 8, dtype=torch.bool), 2, whole_group=True)
    assert whole.sum() == 4 * 6
    assert not whole[1, 2:4].any()


def test_score_mask_counts_the_margin_from_the_positive():
    scores = torch.tensor([[0.5, 0.46, 0.44, 0.6], [0.1, -0.46, -0.4, -0.38]])
    # positives: 0.5 at column 0, and -0.4 at column 2
    assert score_mask(scores, 2, 0.0, False).tolist() == [[False, False, False, True], [True, False, False, True]]
    assert score_mask(scores, 2, 0.05, False).tolist() == [[True, True, False, True], [True, False, True, True]]
    assert score_mask(scores, 2, -0.15, False).tolist() == [[False] * 4, [True, False, False, False]]
    assert score_mask(scores, 2, 0.1, True).tolist() == [[True, True, False, True], [True, False, True, True]]


@pytest.mark.parametrize("options", [{}, {"use_self_distill": True}, {"use_mrl": True, "mrl_dims": (2, 3)}])
@pytest.mark.parametrize("teacher", [None, "kl_div", "m3_kd_loss"])
def test_masked_passages_have_no_share_in_the_loss_and_get_no_gradient(options, teacher):
    torch.manual_seed(0)
    query = Embeddings(dense=torch.randn(2, 4), colbert=torch.randn(2, 3, 4), mask=torch.ones(2, 3))
    query.sparse = Sparse(torch.arange(6).view(2, 3), torch.rand(2, 3))
    dense = torch.randn(6, 4, requires_grad=True)
    colbert, weights = torch.randn(6, 3, 4, requires_grad=True), torch.rand(6, 3, requires_grad=True)
    ids = torch.arange(6).repeat(3).view(6, 3).sort(1).values
    passage = Embeddings(dense, Sparse(ids, weights), colbert, torch.ones(6, 3))
    target = None if teacher is None else torch.randn(2, 2)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 4:] = True
    args = LossArguments(temperature=0.1, group_size=2, kd_loss_type=teacher or "kl_div", **options)
    masked = embedding_loss(query, passage, target, 1, replace(args, false_negatives=mask))
    masked.backward()
    # the last two passages are masked for every query: the loss is that of a batch without them
    alone = embedding_loss(query, passage[:4], target, 1, args)
    assert masked.item() == pytest.approx(alone.item(), rel=1e-5)
    assert all(bool((leaf.grad[4:] == 0).all()) and bool(leaf.grad[:4].any()) for leaf in (dense, colbert, weights))


@pytest.mark.parametrize("mask", MASKS)
def test_gradcache_gives_the_gradients_of_the_whole_batch(tiny_m3, mask):
    module, sides, masking = make(tiny_m3, mask)
    loss = loss_of(module, masking, BATCH, across=False)
    plain = loss(module(sides))
    plain.backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert masking.share() > 0
    module.zero_grad()
    cached = cached_step(sides, module, loss, lambda value: value.backward(), by_texts(3), nullcontext)
    assert cached.item() == pytest.approx(plain.item(), rel=1e-12)
    assert all(torch.allclose(p.grad, expected[n], rtol=1e-9, atol=1e-12) for n, p in module.named_parameters())
    unmasked = module.adapter.loss(module.model, *embeddings(module, sides), None, 0, arguments_of(BATCH))
    assert unmasked.item() != pytest.approx(plain.item(), rel=1e-6)


def test_two_processes_have_the_loss_and_the_gradient_of_one(tiny_m3, tmp_path):
    words = ["-m", "tests.finetune.step.masking_worker", tiny_m3, str(tmp_path / "found.json")]
    done = forked.torchrun(words, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    for mask, found in json.loads((tmp_path / "found.json").read_text()).items():
        for name in ("two", "chunks"):
            assert found[name] == pytest.approx(found["one"], rel=1e-9), (mask, name)
        assert found["one"]["loss"] != pytest.approx(found["unmasked"]["loss"], rel=1e-6)


def test_a_run_masks_logs_and_records(tiny_m3, tmp_path, capsys):
    rows = [*ROWS, *({"query": row["query"].upper(), "pos": row["pos"], "neg": row["neg"]} for row in ROWS)]
    options = {**QUICK, "adapter": "bgem3", "unified_finetuning": True, "train_group_size": 2, "max_steps": 2}
    options |= {"per_device_train_batch_size": 16, "logging_steps": 1}
    plain = finetune(tiny_m3, rows, tmp_path / "plain", **options)
    assert "false_negatives" not in capsys.readouterr().err
    masked = finetune(tiny_m3, rows, tmp_path / "masked", false_negative_mask="text", **options)
    assert "false_negatives 0." in capsys.readouterr().err
    guided = {**options, "false_negative_mask": "guide", "guide_model": tiny_m3, "sub_batch_size": 5}
    by_guide = finetune(tiny_m3, rows, tmp_path / "guided", **guided)
    assert len({plain.fingerprint, masked.fingerprint, by_guide.fingerprint}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"false_negative_mask": "texts"}, "did you mean 'text'"),
        ({"false_negative_mask": "guide"}, "needs --guide_model"),
        ({"guide_model": "x"}, "no effect without --false_negative_mask guide"),
        ({"false_negative_margin": 0.1}, "needs --false_negative_mask margin or guide"),
        ({"false_negative_mask": "text", "adapter": "bge-reranker"}, "does not suit a cross-encoder"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tiny_m3, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        finetune(tiny_m3, ROWS, tmp_path / "out", **{"adapter": "bge", **QUICK, **options})


def test_a_loss_that_would_ignore_the_mask_is_refused(tiny_m3, tmp_path, monkeypatch):
    from ultrarag import losses

    monkeypatch.setattr(losses, "hide", lambda scores, mask: scores)
    with pytest.raises(UsageError, match=r"does not look at args\.false_negatives"):
        finetune(tiny_m3, ROWS, tmp_path / "out", adapter="bge", false_negative_mask="text", **QUICK)


def test_batches_carry_all_positives_of_their_rows():
    rows = [{"query": f"q{i}", "pos": [f"p{i}", f"other {i}"]} for i in range(4)]
    batch = batch_plan(train_data(rows), 4, train_group_size=1).batch(0, 0, 0)
    for query, known in zip(batch.queries, batch.positives, strict=True):
        assert known == (f"p{query[1:]}", f"other {query[1:]}")
