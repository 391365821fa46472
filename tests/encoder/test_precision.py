"""Matrices cast once: what autocast gives, to the bit, and never from weights that the model no longer has."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ultrarag import Encoder
from ultrarag.errors import UsageError
from ultrarag.finetune.step.trainable import Trainable
from ultrarag.testing.tiny import (
    TEXTS,
    tiny_bert,
    tiny_cross_encoder,
    tiny_decoder,
    tiny_layerwise,
    tiny_m3,
    tiny_minicpm,
    tiny_yes_reranker,
)
from ultrarag.testing.tiny_causal import tiny_causal_reranker

BF16 = torch.bfloat16
MODELS = [
    ("bge", tiny_bert),
    ("sentence-transformers", tiny_bert),
    ("bgem3", tiny_m3),
    ("bge", tiny_decoder),
    ("minicpm-embedding", tiny_minicpm),
    ("bge-reranker", tiny_cross_encoder),
    ("bge-reranker-gemma", tiny_yes_reranker),
    ("causal-reranker", tiny_causal_reranker),
    ("bge-reranker-minicpm-layerwise", tiny_layerwise),
]


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    tiny_bert(tmp_path)
    return Encoder.load(tmp_path, "bge", device="cpu", precision="bf16")


def answers(encoder: Encoder) -> list[np.ndarray]:
    if encoder.adapter.declared.pair_input:
        return [encoder.score([(TEXTS[0], text) for text in TEXTS], progress=False)]
    found = encoder.encode(TEXTS, progress=False)
    return [np.asarray(array) for array in vars(found).values() if isinstance(array, np.ndarray)]


def vectors(encoder: Encoder) -> np.ndarray:
    return np.asarray(encoder.encode(TEXTS, progress=False).dense)


def called(encoder: Encoder) -> nn.Module:
    return encoder.casts.of(encoder.model, BF16)


@pytest.mark.parametrize(("adapter", "make"), MODELS, ids=[f"{name}-{make.__name__}" for name, make in MODELS])
@pytest.mark.parametrize("packing", ["on", "off"])
def test_same_to_the_bit_as_autocast_alone(
    adapter: str, make: Callable[[Path], None], packing: str, tmp_path, monkeypatch, caplog
):
    make(tmp_path)
    monkeypatch.setenv("ULTRARAG_PACKING", packing)
    encoder, plain = (Encoder.load(tmp_path, adapter, device="cpu", precision="bf16") for _ in range(2))
    plain.casts.stop()
    found, expected = answers(encoder), answers(plain)
    assert found
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert called(encoder) is not encoder.model
    assert called(plain) is plain.model
    assert "runs padded" not in caplog.text


def test_all_is_shared_but_the_matrices_of_the_backbone(encoder):
    before = vectors(encoder)
    twin = called(encoder)
    assert called(encoder) is twin
    own, others = dict(twin.named_parameters()), dict(encoder.model.named_parameters())
    assert own.keys() == others.keys()
    cast = {name for name in own if own[name] is not others[name]}
    assert cast == {name for name in own if "dense." in name or name.split(".")[-2] in ("query", "key", "value")}
    assert {own[name].dtype for name in cast} == {BF16}
    assert {weight.dtype for weight in encoder.model.parameters()} == {torch.float32}
    assert twin.tokenizer is encoder.tokenizer
    encoder.encode(TEXTS, precision="fp32", progress=False)
    np.testing.assert_array_equal(vectors(encoder), before)


def change_in_place(encoder: Encoder) -> None:
    with torch.no_grad():
        for weight in encoder.model.parameters():
            weight.mul_(1.5)


def load_others(encoder: Encoder) -> None:
    encoder.model.load_state_dict({name: tensor * 1.5 for name, tensor in encoder.model.state_dict().items()})


def exchange_tensors(encoder: Encoder) -> None:
    for weight in encoder.model.parameters():
        weight.data = weight.data * 1.5


def exchange_parameters(encoder: Encoder) -> None:
    for module in encoder.model.modules():
        for name, weight in module._parameters.items():
            module._parameters[name] = nn.Parameter(weight.detach() * 1.5)


def exchange_modules(encoder: Encoder) -> None:
    for module in list(encoder.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                other = nn.Linear(child.in_features, child.out_features)
                other.weight, other.bias = (nn.Parameter(w.detach() * 1.5) for w in (child.weight, child.bias))
                setattr(module, name, other)


@pytest.mark.parametrize(
    "change", [change_in_place, load_others, exchange_tensors, exchange_parameters, exchange_modules]
)
def test_changed_weights_are_seen(encoder, tmp_path, change):
    before = vectors(encoder)
    other = Encoder.load(tmp_path, "bge", device="cpu", precision="bf16")
    change(other)
    other.casts.stop()
    expected = vectors(other)
    assert np.abs(expected - before).max() > 0.01
    change(encoder)
    np.testing.assert_array_equal(vectors(encoder), expected)


def test_a_model_in_training_is_called_itself(encoder):
    vectors(encoder)
    assert called(encoder) is not encoder.model
    Trainable(encoder, ("dense",))
    assert called(encoder) is encoder.model


def test_a_compiled_model_is_called_itself(encoder):
    vectors(encoder)
    encoder.compile(backend="eager")
    assert called(encoder) is encoder.model


def test_code_of_others_keeps_its_weights(encoder):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(2, 2))

    odd = Odd()
    assert encoder.casts.of(odd, BF16) is odd


def test_copies_of_an_encoder_make_their_own(encoder):
    first = vectors(encoder)
    again = copy.deepcopy(encoder.casts)
    assert again.of(encoder.model, BF16) is not called(encoder)
    encoder.casts.stop()
    assert pickle.loads(pickle.dumps(encoder.casts)).of(encoder.model, BF16) is encoder.model
    np.testing.assert_array_equal(vectors(encoder), first)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", " cpu"])
def test_a_device_that_is_not_there_is_named(device: str, tiny_m3: str) -> None:
    with pytest.raises(UsageError, match=rf"device '{device}' cannot be used \(.+\): name another one, such as 'cpu'"):
        Encoder.load(tiny_m3, device=device)
