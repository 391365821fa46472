"""`auto` sizes: what the probe finds, and that it changes nothing but the sizes."""

from __future__ import annotations

import json

import pytest
import torch

from ultrarag import Encoder
from ultrarag.errors import TrainingError, UsageError
from ultrarag.finetune import finetune
from ultrarag.finetune import memory as batch_probe
from ultrarag.finetune.flags.arguments import from_keywords
from ultrarag.finetune.memory import Room, choose_sizes, measure_room
from ultrarag.testing.tiny import tiny_bert

ROWS = [{"query": f"query {n}", "pos": [f"passage {n}"], "neg": [f"other {n}"]} for n in range(24)]
MIB = 1 << 20


@pytest.fixture
def model(tmp_path):
    tiny_bert(tmp_path / "model")
    return tmp_path / "model"


def arguments(model, tmp_path, **more):
    given = {"train_group_size": 2, "query_max_len": 32, "passage_max_len": 64, "use_cpu": True, **more}
    return from_keywords(model, ROWS, tmp_path / "out", "bge", **given)


def with_memory(monkeypatch, mib: int) -> None:
    monkeypatch.setattr(batch_probe, "free_memory", lambda device: mib * MIB)


def test_twice_the_memory_holds_twice_the_texts(model, tmp_path, monkeypatch):
    encoder, asked = Encoder.load(model, "bge", device="cpu"), arguments(model, tmp_path)
    found = []
    for mib in (200, 400):
        with_memory(monkeypatch, mib)
        found.append(measure_room(asked, encoder, ("dense",), whole=True))
    assert found[1] / found[0] == pytest.approx(2, rel=0.05)
    with_memory(monkeypatch, 400)
    texts = measure_room(asked, encoder, ("dense",), whole=False)
    assert texts / found[1] == pytest.approx(2.5, rel=0.15)  # a query of half the length, and two passages


def test_the_probe_leaves_weights_gradients_and_random_numbers_alone(model, tmp_path):
    encoder, asked = Encoder.load(model, "bge", device="cpu"), arguments(model, tmp_path)
    before, state = {name: p.clone() for name, p in encoder.model.named_parameters()}, torch.get_rng_state()
    measure_room(asked, encoder, ("dense",), whole=True)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in encoder.model.named_parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_fits(model, tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match=r"not even one text fits.*--passage_max_len"):
        Room(10 * MIB, 0, 11 * MIB).fits()
    with_memory(monkeypatch, 1)
    with pytest.raises(TrainingError, match="not even one"):
        measure_room(arguments(model, tmp_path), Encoder.load(model, "bge", device="cpu"), ("dense",), whole=True)


def test_a_chunk_is_needed_only_where_the_batch_does_not_fit(model, tmp_path, monkeypatch):
    encoder, notes = Encoder.load(model, "bge", device="cpu"), []
    for mib, wanted in ((100_000, None), (60, int)):
        with_memory(monkeypatch, mib)
        asked = arguments(model, tmp_path, sub_batch_size="auto", per_device_train_batch_size=512)
        choose_sizes(asked, encoder, ("dense",), 10_000, None, notes.append)
        assert asked.model.sub_batch_size is None if wanted is None else 1 <= asked.model.chunk_texts < 1024
    assert "sub_batch_size auto: none: the whole batch fits" in notes[0]


def test_a_run_finds_its_batch_and_a_resumed_one_keeps_it(model, tmp_path, monkeypatch, capsys):
    with_memory(monkeypatch, 100)
    asked = {"train_group_size": 2, "passage_max_len": 64, "query_max_len": 32, "use_cpu": True}
    asked |= {"per_device_train_batch_size": "auto", "save_steps": 1, "adapter": "bge"}
    result = finetune(model, ROWS, tmp_path / "out", num_train_epochs=1, **asked)
    note = next(line for line in result.notes if line.startswith("per_device_train_batch_size auto"))
    batch = int(note.split(": ")[1].split()[0])
    assert batch & (batch - 1) == 0
    assert batch <= len(ROWS)
    manifest = json.loads((tmp_path / "out" / "ultrarag.json").read_text())
    assert manifest["training"]["arguments"]["training"]["per_device_train_batch_size"] == batch
    assert result.steps == -(-len(ROWS) // batch)
    with_memory(monkeypatch, 100_000)  # more memory would mean another batch, and so other batches
    again = finetune(model, ROWS, tmp_path / "out", num_train_epochs=2, resume_from_checkpoint=True, **asked)
    assert again.steps == 2 * result.steps
    assert f"per_device_train_batch_size auto: {batch}, as before" in again.notes


def test_words_that_are_no_size(model, tmp_path):
    with pytest.raises(UsageError, match="a whole number, or auto"):
        arguments(model, tmp_path, per_device_train_batch_size="automatic")
