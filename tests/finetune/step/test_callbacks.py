"""What the logs say of tokens, padding, memory and arithmetic."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ultrarag import Encoder
from ultrarag.finetune.step.callbacks import Throughput, peak_memory
from ultrarag.finetune.step.trainable import Trainable
from ultrarag.testing.tiny import tiny_bert

CPU = torch.device("cpu")


def side(*lengths: int) -> dict[str, torch.Tensor]:
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": mask.long() * 7, "attention_mask": mask.long()}


@pytest.fixture
def by_torch(monkeypatch) -> None:
    """No product is oneDNN's: torch's counter knows those of torch."""
    monkeypatch.setenv("ULTRARAG_ONEDNN", "off")


@pytest.fixture
def encoder(tmp_path) -> Encoder:
    tiny_bert(tmp_path)
    return Encoder.load(tmp_path, "bge", device="cpu")


def test_counts_until_the_log_and_begins_anew(encoder):
    counter = Throughput(encoder.model, CPU, half=False)
    assert counter.entries() == {}
    counter.count([side(10, 6), side(4)])
    time.sleep(0.01)
    found = counter.entries()
    assert found["padding"] == pytest.approx(4 / 24, abs=1e-3)
    assert 0 < found["tokens_per_second"] <= 20 / 0.01
    assert found["peak_memory_gib"] == pytest.approx(peak_memory(CPU) / 2**30, abs=0.01)
    assert "mfu" not in found  # nobody knows what this processor can do
    assert counter.entries() == {}


def test_mfu_is_the_share_of_what_the_device_can_do(encoder, monkeypatch):
    counter = Throughput(encoder.model, CPU, half=True, peak_tflops=2e-6)
    counter.count([side(8, 8)])
    flops = counter.flops()
    now = counter._since + 10
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert counter.entries()["mfu"] == pytest.approx(flops / 10 / 2e6, abs=1e-3)


def test_operations_are_those_that_torch_counts(by_torch, encoder):
    """Without padding, as nothing is dropped; torch also counts nothing but matrix products."""
    features = side(16, 16, 16)
    module = Trainable(encoder, ("dense",)).train()
    module([features])  # the first forward is also compared with a padded one
    with FlopCounterMode(display=False) as torchs:
        (vectors,) = module([features])
        vectors.dense.sum().backward()
    counter = Throughput(encoder.model, CPU, half=False)
    counter.count([features])
    assert counter.flops() == pytest.approx(torchs.get_total_flops(), rel=0.1)
