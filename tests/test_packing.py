"""Packed and padded forwards agree: hidden states, gradients, and the ways back to padded."""

from __future__ import annotations

import copy
import json
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ultrarag import packing
from ultrarag.errors import UsageError
from ultrarag.packed_attention import Layout, Terms, _by_runs, _nested
from ultrarag.packing import hidden_states

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LENGTHS = [20, 3, 7, 7, 13]
NAMES = ["bert", "xlm-roberta", "modernbert", "granite", "mistral"]


def make(name: str) -> torch.nn.Module:
    """A tiny random backbone; `granite` is bidirectional, `mistral` causal with a sliding window."""
    import transformers as hf

    torch.manual_seed(3)
    special = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
    grouped = {"num_key_value_heads": 2, "pad_token_id": 0}
    if name == "bert":
        model = hf.BertModel(hf.BertConfig(**SIZES))
    elif name == "xlm-roberta":
        model = hf.XLMRobertaModel(hf.XLMRobertaConfig(**SIZES, pad_token_id=1))
    elif name == "modernbert":
        model = hf.ModernBertModel(
            hf.ModernBertConfig(**SIZES, **special, local_attention=8, global_attn_every_n_layers=2)
        )
    elif name == "granite":
        config = hf.GraniteConfig(**SIZES, **grouped, attention_multiplier=0.3, residual_multiplier=0.7)
        config.is_causal = False
        model = hf.GraniteModel(config)
    else:
        model = hf.MistralModel(hf.MistralConfig(**SIZES, **grouped, sliding_window=6))
    for parameter in model.parameters():  # far from the initial near-uniform attention
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model.eval()


def batch(model: torch.nn.Module, lengths=LENGTHS, side="right", seed=0):
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.randint(5, 90, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids.masked_fill(~mask, model.config.pad_token_id), "attention_mask": mask.long()}


@pytest.fixture
def always(monkeypatch):
    """Pack even where there is nothing to gain."""
    monkeypatch.setattr(packing, "MIN_PADDING", -1.0)


@pytest.fixture
def seen(monkeypatch):
    """The number of tokens of each packed forward."""
    totals = []
    original = packing._packed

    def spy(backbone, stock, inputs, layout):
        totals.append(len(layout.index))
        return original(backbone, stock, inputs, layout)

    monkeypatch.setattr(packing, "_packed", spy)
    return totals


@pytest.mark.parametrize("lengths", [LENGTHS, [9, 9, 9], [11]], ids=["mixed", "equal", "one"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_padded_and_each_text_alone(name, side, lengths, always, seen):
    model = make(name)
    plain = copy.deepcopy(model)
    features = batch(model, lengths, side)
    real = features["attention_mask"].bool()
    with torch.no_grad():
        packed = hidden_states(model, features)
        padded = hidden_states(plain, features, packing=False)
    assert seen[-1] == sum(lengths)
    assert torch.allclose(packed[real], padded[real], rtol=0, atol=2e-6)
    assert not packed[~real].any()
    for row, mask in enumerate(real):
        with torch.no_grad():
            alone = plain(features["input_ids"][row][mask][None], torch.ones(1, int(mask.sum()))).last_hidden_state[0]
        assert torch.allclose(packed[row][mask], alone, rtol=0, atol=2e-6)


def gradients(model, features, **options):
    model.zero_grad()
    hidden = hidden_states(model, features, **options)
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    (hidden * weights * features["attention_mask"][..., None]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_equal(name, checkpointing, seen):
    model = make(name).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    features = batch(model)
    expected = gradients(model, features, packing=False)
    if checkpointing:
        model.activation_checkpointing_enable()
    found = gradients(model, features)
    assert seen[-1] == sum(LENGTHS)
    assert all(module.training for module in model.modules())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-9, atol=1e-9), key


def test_first_use_under_autocast_keeps_every_gradient(seen):
    model = make("bert").train()
    features = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, features)
    assert seen[-1] == sum(LENGTHS)
    assert set(found) == {name for name, _ in model.named_parameters() if "pooler" not in name}
    exact = gradients(make("bert").eval(), features)
    assert found.keys() == exact.keys()


def test_autocast_is_close_to_padded_autocast(seen):
    model = make("bert")
    features = batch(model)
    real = features["attention_mask"].bool()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        packed, padded = hidden_states(model, features), hidden_states(model, features, packing=False)
    assert seen[-1] == sum(LENGTHS)
    cosine = torch.nn.functional.cosine_similarity(packed[real].float(), padded[real].float(), dim=-1)
    assert cosine.min() > 0.999


def test_dropout_of_training_reaches_packed_attention():
    model = make("bert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    features = batch(model)
    evaluated = hidden_states(model, features)
    model.train()
    assert not torch.allclose(hidden_states(model, features), evaluated, atol=1e-3)


def test_threads_share_a_model():
    model = make("bert")
    batches = [batch(model, LENGTHS, seed=seed) for seed in range(6)] + [batch(model, [9, 9], seed=7)]
    with torch.inference_mode():
        expected = [hidden_states(copy.deepcopy(model), features, packing=False) for features in batches]

    def encode(number):
        with torch.inference_mode():
            return number, hidden_states(model, batches[number])

    with ThreadPoolExecutor(4) as pool:
        for number, found in pool.map(encode, list(range(len(batches))) * 5):
            real = batches[number]["attention_mask"].bool()
            assert torch.allclose(found[real], expected[number][real], rtol=0, atol=2e-6)


def test_a_packed_backbone_serves_other_callers_and_saves_as_before(tmp_path, seen):
    from transformers import AutoModel

    model = make("bert")
    features = batch(model)
    before = model(**features).last_hidden_state
    config = model.config.to_json_string()
    hidden_states(model, features)
    assert seen
    assert torch.equal(model(**features).last_hidden_state, before)
    assert model.config.to_json_string() == config
    model.save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text()
    assert "ultrarag" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(**features).last_hidden_state, before)


def test_it_can_be_switched_off(monkeypatch, seen):
    model = make("bert")
    hidden_states(model, batch(model), packing=False)
    monkeypatch.setenv("ULTRARAG_PACKING", "off")
    hidden_states(model, batch(model))
    assert not seen
    hidden_states(model, batch(model), packing=True)
    assert seen
    monkeypatch.setenv("ULTRARAG_PACKING", "no")
    with pytest.raises(UsageError, match="ULTRARAG_PACKING is 'no'"):
        hidden_states(model, batch(model))


def test_a_batch_with_little_padding_is_not_packed(seen):
    model = make("bert")
    hidden_states(model, batch(model, [9, 9, 9]))
    assert 27 not in seen  # the comparison at first use is there
    hidden_states(model, batch(model, [9, 9, 3]))
    assert seen[-1] == 21


def test_a_backbone_that_packing_does_not_suit_falls_back_with_one_line(caplog, seen):
    import transformers as hf

    model = hf.T5EncoderModel(hf.T5Config(vocab_size=90, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4))
    packing._logged.clear()
    with caplog.at_level(logging.WARNING, "ultrarag"):
        for _ in range(2):
            found = hidden_states(model.eval(), batch(model))
    assert not seen
    assert torch.equal(found, model(**batch(model)).last_hidden_state)
    assert [record.message for record in caplog.records] == [
        "T5EncoderModel runs padded, which is slower: packing does not suit it (its attention cannot be replaced)"
    ]


@pytest.mark.parametrize("failure", ["differs", "raises"])
def test_a_packed_forward_that_fails_its_check_is_not_used(failure, caplog, monkeypatch):
    model = make("bert")
    features = batch(model)
    expected = hidden_states(model, features, packing=False)
    original = packing._packed

    def wrong(*args):
        if failure == "raises":
            raise NotImplementedError("its attention uses 'softcap'")
        return original(*args) + 1e-2

    monkeypatch.setattr(packing, "_packed", wrong)
    packing._logged.clear()
    with caplog.at_level(logging.WARNING, "ultrarag"):
        found = hidden_states(model, features)
    assert torch.equal(found, expected)
    assert model.config._attn_implementation == "sdpa"
    [record] = caplog.records
    assert ("differ by 1.0e-02" if failure == "differs" else "softcap") in record.message


def test_attention_chosen_by_the_user_is_kept(seen):
    model = make("bert")
    model.set_attn_implementation("eager")
    hidden_states(model, batch(model))
    assert not seen
    assert model.config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_jagged_attention_agrees_with_runs():
    layout = Layout.of(torch.arange(9)[None] < torch.tensor([9, 5, 5, 2])[:, None], torch.device("cpu"))
    query, key, value = torch.randn(21, 4, 8), torch.randn(21, 2, 8), torch.randn(21, 2, 8)
    terms = Terms(0.0, 0.4, False, None)
    assert torch.allclose(
        _nested(query, key, value, layout, terms), _by_runs(query, key, value, layout, terms), atol=1e-6
    )


def test_layout_skips_empty_rows_and_sorts_by_length():
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1]])
    layout = Layout.of(mask, torch.device("cpu"))
    assert layout.index.tolist() == [6, 7, 8, 0, 11]
    assert layout.runs == ((1, 3), (2, 1))
    assert layout.offsets.tolist() == [0, 3, 4, 5]


def test_a_round_number_of_tokens_is_packed():
    """What belongs to no text has no attention, and is not handed on."""
    layout = Layout.of(torch.arange(9)[None] < torch.tensor([9, 5, 5, 2])[:, None], torch.device("cpu"), True)
    assert layout.spare == 3
    values = torch.arange(36).view(4, 9)
    assert layout.packed(values)[0].tolist() == [*layout.index.tolist(), *[layout.index[-1].item()] * 3]
    query = torch.randn(24, 4, 8)
    found = _by_runs(query, query, query, layout, Terms(0.0, 0.4, False, None))
    assert found.shape == query.shape
    assert not found[21:].any()
    assert found[:21].any(dim=-1).all()


@pytest.mark.parametrize(("setting", "half", "spare"), [("on", False, 3), ("off", False, 0), ("off", True, 3)])
def test_tokens_are_a_round_number_where_onednn_multiplies(setting, half, spare, monkeypatch):
    monkeypatch.setenv("ULTRARAG_ONEDNN", setting)
    mask = torch.arange(9)[None] < torch.tensor([9, 5, 5, 2])[:, None]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert packing._layout(mask, torch.float32, torch.device("cpu")).spare == spare
    assert packing._layout(mask, torch.bfloat16, torch.device("cpu")).spare == 3
    assert packing._layout(mask, torch.bfloat16, torch.device("meta")).spare == 0


def test_encoder_gives_the_same_vectors(minilm_encoder, monkeypatch, seen):
    texts = ["milvus", "a vector database of the open source kind", "who sells sea shells by the sea shore?"]
    packed = minilm_encoder.encode(texts, progress=False).dense
    assert seen
    monkeypatch.setenv("ULTRARAG_PACKING", "off")
    assert np.abs(packed - minilm_encoder.encode(texts, progress=False).dense).max() < 2e-6
