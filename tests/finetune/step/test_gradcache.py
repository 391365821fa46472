"""GradCache: the loss and gradients of the plain step, for every head, with dropout, in any chunk size."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from ultrarag.encoder import Encoder
from ultrarag.finetune.step.gradcache import by_texts, by_tokens, cached_step
from ultrarag.finetune.step.trainable import Trainable
from ultrarag.hookspecs import LoadOptions
from ultrarag.loss_arguments import LossArguments
from ultrarag.plugins import registry

QUERIES = ["why does bread rise", "seals", "bicycle chains rust in the rain and need oil"]
PASSAGES = ["a hot oven", "bread " * 9, "under water", "seals sleep", "oil", "the rainy season begins in June"]


def make(tiny_m3, dropout):
    adapter = registry().adapter("bgem3")
    model = adapter.load(tiny_m3, LoadOptions(training=True)).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    encoder = Encoder(adapter, model, model.settings, device="cpu")
    sides = [encoder.features(encoder.tokenize(texts, "query")) for texts in (QUERIES, PASSAGES)]
    return Trainable(encoder, ("dense", "sparse", "colbert")).train(), sides


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cut", [*map(by_texts, (1, 2, 4, 100)), *map(by_tokens, (1, 14, 40, 1000))])
def test_equals_the_plain_step(tiny_m3, cut):
    module, sides = make(tiny_m3, dropout=0.0)
    arguments = LossArguments(use_self_distill=True, group_size=2)

    def loss(embeddings):
        return module.adapter.loss(module.model, *embeddings, None, 5, arguments)

    plain = loss(module(sides))
    plain.backward()
    expected = gradients(module)
    module.zero_grad()
    cached = cached_step(sides, module, loss, lambda value: value.backward(), cut, nullcontext)
    assert cached.item() == pytest.approx(plain.item(), rel=1e-12)
    found = gradients(module)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-9, atol=1e-12), name


def test_dropout_is_the_same_in_both_passes(tiny_m3):
    """The gradient must be that of the very embeddings whose loss was taken: checked by finite differences."""
    module, sides = make(tiny_m3, dropout=0.3)
    weight = module.model.sparse_linear.bias
    arguments = LossArguments(temperature=1.0, group_size=2)

    def loss(embeddings):
        return module.adapter.loss(module.model, *embeddings, None, 0, arguments)

    def step():
        torch.manual_seed(7)
        module.zero_grad()
        return cached_step(sides, module, loss, lambda value: value.backward(), by_texts(2), nullcontext).item()

    step()
    analytic = weight.grad.item()
    values = []
    for shift in (1e-6, -2e-6):
        with torch.no_grad():
            weight += shift
        values.append(step())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(analytic, rel=1e-4)


def test_random_state_goes_on_as_after_a_plain_step(tiny_m3):
    module, sides = make(tiny_m3, dropout=0.3)

    def loss(embeddings):
        return embeddings[0].dense.sum() + embeddings[1].dense.sum()

    torch.manual_seed(3)
    loss(module([part for side in sides for _, part in by_texts(2)(side)]))
    expected = torch.rand(4)
    torch.manual_seed(3)
    cached_step(sides, module, loss, lambda value: value.backward(), by_texts(2), nullcontext)
    assert torch.equal(torch.rand(4), expected)


def test_chunks_are_no_wider_than_their_longest_text(tiny_m3):
    _, sides = make(tiny_m3, dropout=0.0)
    widths = [part["input_ids"].shape[1] for _, part in by_texts(1)(sides[1])]
    assert widths == sides[1]["attention_mask"].sum(1).tolist()


def test_chunks_by_tokens_hold_texts_of_similar_length(tiny_m3):
    _, sides = make(tiny_m3, dropout=0.0)
    lengths = sides[1]["attention_mask"].sum(1)
    parts = by_tokens(16)(sides[1])
    assert sorted(torch.cat([rows for rows, _ in parts]).tolist()) == list(range(len(PASSAGES)))
    assert [len(rows) for rows, _ in parts] != [1] * len(PASSAGES)
    for rows, part in parts:
        assert part["input_ids"].shape == (len(rows), lengths[rows].max())
        assert len(rows) == 1 or part["input_ids"].numel() <= 16
    longest = [int(lengths[rows].max()) for rows, _ in parts]
    assert longest == sorted(longest, reverse=True)
