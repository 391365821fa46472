"""Negatives of a corpus and maps of its vectors, as pure functions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ultrarag import Passage
from ultrarag.encode import CorpusVectors, passage_keys
from ultrarag.errors import DataError, TrainingError
from ultrarag.finetune.corpus.bank import (
    Bank,
    Columns,
    CorpusBatch,
    Nearest,
    draw_columns,
    keys_of,
    mask_of_columns,
    mask_of_groups,
    nearest_rows,
)
from ultrarag.finetune.corpus.maps import (
    MapData,
    Maps,
    MapSettings,
    ResidualMap,
    choose_settings,
    learned_map,
    map_loss,
)
from ultrarag.finetune.corpus.negatives import CorpusNegatives
from ultrarag.loss_arguments import LossArguments
from ultrarag.losses import embedding_loss
from ultrarag.types import Embeddings

CPU = torch.device("cpu")


def unit(count, dim=8, seed=0):
    found = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def vectors_of(passages, dim=8):
    ids = [item.id for item in passages]
    return CorpusVectors("who", ids, passage_keys(passages), unit(len(passages), dim))


@pytest.fixture
def bank():
    passages = [Passage(f"p{n}", f"text {n}", "Title" if n == 3 else "") for n in range(6)]
    return Bank(vectors_of([*passages, Passage("twin", "TEXT  2")]), ("dense",), CPU)


def test_a_text_finds_its_row_with_and_without_its_title(bank):
    assert bank.row_of(keys_of(["Title\ntext 3", "text 3", "text 5", "Text 2"])).tolist() == [3, 3, 5, 2]
    places, rows = bank.rows_of(keys_of(["text 2"]))
    assert (places.tolist(), rows.tolist()) == ([0, 0], [2, 6])  # a duplicate, but for case and spaces


def test_passages_outside_of_the_corpus_are_encoded_once(bank):
    asked = []

    def encode(texts):
        asked.append(texts)
        return Embeddings(dense=unit(len(texts), seed=5))

    assert bank.add(["text 1", "new", "NEW", "other"], encode) == 2
    assert bank.add(["new"], encode) == 0
    assert asked == [["new", "other"]]
    assert np.allclose(bank.read(np.array([8, 0])).dense, np.stack([unit(2, seed=5)[1], unit(7)[0]]))
    with pytest.raises(DataError, match="no stored vector"):
        bank.row_of(keys_of(["unheard of"]))


def test_other_positives_and_duplicates_are_no_negatives(bank):
    """Query 0 has positives 1 and 2 over all rows; its group holds 1 and, as a negative, 4."""
    positives = np.array([0, 0, 1]), keys_of(["text 1", "text 2", "text 5"])
    batch = CorpusBatch(keys_of(["a", "b"]), keys_of(["text 1", "text 4", "text 5", "text 2"]), positives)
    columns = Columns(np.array([1, 2, 3, 4, 6]))
    assert mask_of_columns(bank, batch, columns, 2).tolist() == [
        [True, True, False, True, True],
        [False, True, False, False, True],
    ]
    alone = mask_of_groups(batch, batch.passages, 2, whole=False, alone=True)
    assert alone.tolist() == [[False, False, True, True], [True, True, False, False]]
    beside = mask_of_groups(batch, batch.passages, 2, whole=False, alone=False)
    assert beside.tolist() == [[False, False, False, True], [False, False, False, False]]


def test_a_weighted_sample_stands_for_the_whole_corpus():
    """The mean of exp(loss of the sample) over many draws is that of the full softmax: the partition is unbiased."""
    passage, query = torch.from_numpy(unit(400)), torch.from_numpy(unit(1, seed=9))
    scores = (query @ passage.T)[0] / 0.2
    near = scores.argsort(descending=True)[:20].numpy()
    sums = []
    for step in range(300):
        columns = draw_columns(400, 60, near, 1, step)
        assert set(near) <= set(columns.rows)
        assert abs(len(columns.rows) - 60) < 12
        sums.append(float((scores[columns.rows] + torch.from_numpy(columns.offsets)).exp().sum()))
    assert np.mean(sums) == pytest.approx(float(scores.exp().sum()), rel=0.02)
    again = draw_columns(400, 60, near, 1, 7)
    assert np.array_equal(again.rows, draw_columns(400, 60, near, 1, 7).rows)


def test_loss_adds_the_offsets_to_every_head_once():
    query, passage = (Embeddings(dense=torch.from_numpy(unit(n, seed=n))) for n in (2, 6))
    offsets = torch.tensor([0.0, 0, 1, 2, 3, 4])
    args = LossArguments(temperature=0.5, group_size=1, score_offsets=offsets)
    expected = torch.nn.functional.cross_entropy(query.dense @ passage.dense.T / 0.5 + offsets, torch.arange(2))
    assert embedding_loss(query, passage, None, 0, args) == pytest.approx(float(expected))


def test_nearest_rows_are_exact_in_blocks(bank):
    query = Embeddings(dense=unit(3, seed=4))
    scores = query.dense @ unit(7).T
    assert np.array_equal(nearest_rows(bank, query, 3, "dense", block=2), np.argsort(-scores, 1)[:, :3])


def test_hard_negatives_of_an_epoch_are_those_that_it_began_with(bank, tmp_path):
    def negatives():
        return CorpusNegatives(bank, None, "passage", count=3)

    first = Nearest(keys_of(["a"]), np.array([[1, 2]]))
    one = negatives()
    one.refresh(4, 4, tmp_path, lambda: first, writes=True)
    resumed = negatives()
    resumed.refresh(6, 4, tmp_path, lambda: pytest.fail("mined again"), writes=True)
    assert resumed.nearest.of(keys_of(["a", "b"])).tolist() == [[1, 2], [-1, -1]]
    with pytest.raises(TrainingError, match="is gone"):
        negatives().refresh(9, 4, tmp_path, lambda: first, writes=True)


# ---- maps


def rotated(count=300, dim=8):
    """Queries that a linear map takes to their passages."""
    passages = unit(count, dim)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(dim, dim)))[0].astype(np.float32)
    mixed = passages @ (0.5 * np.eye(dim, dtype=np.float32) + turn)
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    pairs = np.stack([np.arange(count), np.arange(count)], axis=1)
    return MapData(torch.from_numpy(mixed), torch.from_numpy(passages), pairs)


def test_map_finds_the_way_back_and_is_the_same_each_time():
    data = rotated()
    train, held = data.of(np.arange(200)), data.of(np.arange(200, 300))
    choice = choose_settings(train, held, (True, False), MapSettings(steps=50), (3e-2,), (0.001,))
    assert choice.gains
    assert choice.after > choice.before + 0.1
    one, two = (learned_map(train, (True, False), choice.settings, CPU)[0].query.weights() for _ in range(2))
    assert np.array_equal(one[0], two[0])


def test_map_of_noise_gains_nothing():
    data = rotated()
    shuffled = np.stack([np.arange(300), np.random.default_rng(1).permutation(300)], axis=1)
    data = MapData(data.queries, data.passages, shuffled)
    choice = choose_settings(
        data.of(np.arange(150)), data.of(np.arange(150, 300)), (True, True), MapSettings(steps=50), (1e-2,)
    )
    assert not choice.gains


@pytest.mark.parametrize("rank", [None, 2])
def test_strength_holds_a_map_to_the_identity(rank):
    data, settings = rotated(), MapSettings(steps=30, rank=rank, learning_rate=1e-2)
    free, held = (
        learned_map(data, (False, True), replace(settings, strength=strength), CPU)[0].passage
        for strength in (0.0, 10.0)
    )
    assert held.distance().item() < 0.2 * free.distance().item()
    if rank:
        assert np.linalg.matrix_rank(free.weights()[0] - np.eye(8), tol=1e-4) <= rank


def test_fresh_map_is_the_identity():
    vectors = torch.from_numpy(unit(5))
    assert torch.allclose(ResidualMap(8, rank=3)(vectors), vectors, atol=1e-6)
    assert np.array_equal(ResidualMap(8).weights()[0], np.eye(8, dtype=np.float32))


def test_sampled_loss_of_a_map_is_near_the_full_one(monkeypatch):
    from ultrarag.finetune.corpus import maps

    data, chosen = rotated(), np.arange(64)
    settings = MapSettings(temperature=1.0)
    full = float(map_loss(Maps(), data, chosen, chosen, settings, 0))
    monkeypatch.setattr(maps, "COLUMNS", 150)
    sampled = [float(map_loss(Maps(), data, chosen, chosen, settings, step)) for step in range(10)]
    assert np.mean(sampled) == pytest.approx(full, rel=0.005)
