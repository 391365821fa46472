"""bge-reranker-gemma and -minicpm-layerwise on tiny random models, against plain references."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.adapters import minicpm_reference as reference
from tests.adapters.test_minicpm import CONFIG, TOKENIZER, random_weights
from tests.adapters.test_reranker import ROWS
from ultrarag import Encoder
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.finetune import finetune
from ultrarag.hookspecs import LoadOptions
from ultrarag.loss_arguments import LossArguments
from ultrarag.losses import cross_encoder_loss
from ultrarag.packing import hidden_states
from ultrarag.plugins import registry

PAIRS = [
    ("How long do seals sleep under water?", "Seals sleep for minutes at a time while they sink slowly."),
    ("Why does bread need a hot oven?", "Seals sleep."),
    ("怎样防止自行车链条生锈？", "骑车淋雨以后先擦干链条，再滴一点润滑油。"),
    ("a", ""),
]
PROMPT = "Does B answer A?"
QUICK = {"query_max_len": 32, "passage_max_len": 96, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
QUICK |= {"train_group_size": 3, "max_steps": 2}
START = 2
GEMMA, LAYERWISE = "bge-reranker-gemma", "bge-reranker-minicpm-layerwise"


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TOKENIZER / "tokenizer.json", folder / "tokenizer.json")
    values = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "model_max_length": 400}))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    from transformers import GemmaConfig, GemmaForCausalLM

    folder = tmp_path_factory.mktemp("gemma")
    write_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 267}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "pad_token_id": 1, "bos_token_id": 0}
    GemmaForCausalLM(GemmaConfig(**sizes, **heads, initializer_range=0.2)).save_pretrained(folder)
    return folder


def write_layerwise(folder: Path, heads: bool = True, **changes) -> Path:
    """A folder as BAAI publishes it: MiniCPM's configuration and names, and a head per layer; or MiniCPM itself."""
    from safetensors.torch import save_file

    write_tokenizer(folder)
    config = {**CONFIG, "max_position_embeddings": 400, **changes}
    del config["is_causal"]
    weights = {f"model.{name}": tensor for name, tensor in random_weights(config).items()}
    generator = torch.Generator().manual_seed(9)
    if heads:
        config |= {"start_layer": START, "head_multi": True, "head_type": "simple"}
        for number in range(config["num_hidden_layers"] - START + 1):
            weights[f"lm_head.{number}.linear_head.weight"] = torch.randn(1, 32, generator=generator)
    else:
        weights["lm_head.weight"] = torch.randn(267, 32, generator=generator)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def layerwise(tmp_path_factory) -> Path:
    return write_layerwise(tmp_path_factory.mktemp("layerwise"))


@pytest.fixture(params=[GEMMA, LAYERWISE])
def either(request, gemma, layerwise) -> Encoder:
    # the tiny tokenizer has no line break: another separator shows where it goes
    path, settings = gemma if request.param == GEMMA else layerwise, {"prompt": PROMPT, "separator": "oven"}
    return Encoder.load(path, adapter=request.param, device="cpu", **settings)


def expected_ids(encoder: Encoder, query: str, passage: str, prompt: str = PROMPT) -> list[int]:
    """`<bos>A: {query}`, separator, `B: {passage}`, separator, prompt: each tokenized by itself."""
    separator = encoder.settings.separator
    parts = [f"A: {query}", separator, f"B: {passage}", separator, prompt]
    ids = [encoder.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    return [encoder.tokenizer.bos_token_id, *(token for part in ids for token in part)]


def causal_scores(weights, config, ids, heads) -> list[float]:
    """Scores after each layer from START, from the formulas: token t sees the tokens up to t."""
    residual = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    hidden = weights["embed_tokens.weight"][torch.tensor(ids)] * config["scale_emb"]
    cos, sin = reference.angles(config, len(ids))
    found = []
    for layer in range(config["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        normed = reference.rms_norm(hidden, part["input_layernorm.weight"], config)
        seen = [(normed[: t + 1], cos[: t + 1], sin[: t + 1]) for t in range(len(ids))]
        hidden = hidden + residual * torch.stack([reference.attention(part, config, *item)[-1] for item in seen])
        normed = reference.rms_norm(hidden, part["post_attention_layernorm.weight"], config)
        hidden = hidden + residual * reference.feed_forward(part, normed)
        if layer + 1 >= START:
            final = reference.rms_norm(hidden, weights["norm.weight"], config)
            found.append(float(heads[layer + 1 - START] @ final[-1]))
    return found


def plain_layerwise(folder: Path, encoder: Encoder) -> np.ndarray:
    """(pairs, layers) from the published files."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    heads = [weights[f"lm_head.{n}.linear_head.weight"][0] for n in range(2)]
    body = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    config = json.loads((folder / "config.json").read_text())
    return np.array([causal_scores(body, config, expected_ids(encoder, *pair), heads) for pair in PAIRS])


# ---- what is read


def test_pairs_are_read_in_parts(either):
    tokens = either.tokenize_pairs(PAIRS)
    assert tokens.ids == [expected_ids(either, *pair) for pair in PAIRS]
    assert tokens.types is None
    assert tokens.truncated == 0


def test_default_prompt_is_the_published_one(gemma):
    encoder = Encoder.load(gemma, adapter=GEMMA)
    assert encoder.settings.prompt.startswith("Given a query A and a passage B, determine whether the passage")
    assert encoder.settings.separator == "\n"
    assert encoder.tokenize_pairs(PAIRS[:1]).ids[0] == expected_ids(encoder, *PAIRS[0], encoder.settings.prompt)


def test_of_a_long_pair_the_passage_is_cut_and_the_prompt_is_whole(either):
    long = "bread oven water " * 20
    (whole,) = either.tokenize_pairs([("why", long)]).ids
    (cut,) = either.tokenize_pairs([("why", long)], max_length=64).ids
    end = either.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    assert len(cut) == 64
    assert cut[-len(end) :] == end
    start = 64 - len(end) - len(either.tokenizer("oven", add_special_tokens=False)["input_ids"])
    assert cut[:start] == whole[:start]
    separator = either.tokenizer("oven", add_special_tokens=False)["input_ids"]
    fixed = 1 + 2 * len(separator) + len(end)
    with pytest.raises(UsageError, match=f"max_length is {fixed - 1}, and the question put to the model"):
        either.tokenize_pairs(PAIRS, max_length=fixed - 1)


# ---- scores


def test_gemma_is_the_logit_of_yes_at_the_end(gemma):
    from transformers import AutoModelForCausalLM

    encoder = Encoder.load(gemma, adapter=GEMMA, device="cpu", prompt=PROMPT)
    model = AutoModelForCausalLM.from_pretrained(gemma).eval()
    yes = encoder.tokenizer("Yes", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        expected = [model(torch.tensor([expected_ids(encoder, *pair)])).logits[0, -1, yes].item() for pair in PAIRS]
    assert np.ptp(expected) > 0.01
    assert encoder.score(PAIRS) == pytest.approx(expected, abs=1e-5)
    assert encoder.score(PAIRS, normalize=True) == pytest.approx(1 / (1 + np.exp(-np.array(expected))), abs=1e-6)


@pytest.mark.parametrize("layer", [None, 2, 3])
def test_layerwise_scores_follow_the_formulas(layerwise, layer):
    encoder = Encoder.load(layerwise, adapter=LAYERWISE, device="cpu", prompt=PROMPT, cutoff_layer=layer)
    expected = plain_layerwise(layerwise, encoder)[:, (layer or 3) - START]
    assert np.ptp(expected) > 0.1
    assert encoder.score(PAIRS) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_all_layers_score_while_training(layerwise):
    encoder = Encoder.load(layerwise, adapter=LAYERWISE, device="cpu", prompt=PROMPT)
    features = encoder.features(encoder.tokenize_pairs(PAIRS))
    with torch.no_grad():
        found = encoder.adapter.encode(encoder.model.train(), features).scores
    assert np.allclose(found, plain_layerwise(layerwise, encoder), rtol=1e-4, atol=1e-4)


def test_cutoff_runs_no_layer_above(layerwise):
    encoder = Encoder.load(layerwise, adapter=LAYERWISE, device="cpu", cutoff_layer=2)
    ran = []
    for number, layer in enumerate(encoder.model.backbone.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    encoder.score(PAIRS)
    assert set(ran) == {0, 1}
    with pytest.raises(UsageError, match="cutoff_layer is 1; this model has scores after the layers 2 to 3"):
        Encoder.load(layerwise, adapter=LAYERWISE, cutoff_layer=1).score(PAIRS)


def test_scores_depend_on_the_pair_alone(either):
    together = either.score(PAIRS)
    assert together == pytest.approx([either.score([pair])[0] for pair in PAIRS], abs=1e-4)
    left = either.features(either.tokenize_pairs(PAIRS))
    either.tokenizer.padding_side = "left" if either.tokenizer.padding_side == "right" else "right"
    right = either.features(either.tokenize_pairs(PAIRS))
    for mode in (False, True):
        with torch.no_grad():
            scores = [either.adapter.encode(either.model.train(mode), f).scores for f in (left, right)]
        assert torch.allclose(*scores, atol=1e-4)
    assert not torch.equal(left["input_ids"], right["input_ids"])


def test_softcap_and_scaling_are_followed(gemma):
    encoder = Encoder.load(gemma, adapter=GEMMA, device="cpu", prompt=PROMPT)
    plain = encoder.score(PAIRS)
    encoder.model.config.final_logit_softcapping = 0.5
    assert encoder.score(PAIRS) == pytest.approx(np.tanh(plain / 0.5) * 0.5, abs=1e-6)


# ---- files


def test_save_and_load(either, tmp_path):
    either.settings.cutoff_layer = 2 if either.adapter.name == LAYERWISE else None
    saved = either.save(tmp_path / "saved")
    again = Encoder.load(saved)
    assert again.settings == either.settings
    assert again.settings.prompt == PROMPT
    assert np.abs(again.score(PAIRS) - either.score(PAIRS)).max() < 1e-5
    assert again.fingerprint == either.fingerprint


def test_tied_weights_are_written_once(gemma, tmp_path):
    from safetensors.torch import load_file

    saved = Encoder.load(gemma, adapter=GEMMA).save(tmp_path / "saved")
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")


def test_language_model_is_no_layerwise_reranker_until_it_is_trained(tmp_path):
    folder = write_layerwise(tmp_path / "minicpm", heads=False, start_layer=2)
    with pytest.raises(CheckpointError, match="has no score for the layers 2 to 3: it is no layerwise reranker"):
        Encoder.load(folder, adapter=LAYERWISE)
    model = registry().adapter(LAYERWISE).load(str(folder), LoadOptions(training=True))
    yes = model.tokenizer("Yes", add_special_tokens=False)["input_ids"][0]
    from safetensors.torch import load_file

    row = load_file(folder / "model.safetensors")["lm_head.weight"][yes]
    assert len(model.layer_heads) == 2
    assert all(torch.equal(head.weight[0], row) for head in model.layer_heads)


def test_other_models_are_refused(gemma, layerwise, tiny_m3, tmp_path):
    with pytest.raises(UsageError, match=r"'bge-reranker-minicpm-layerwise' cannot be right .*'bge-reranker-gemma'"):
        Encoder.load(gemma, adapter=LAYERWISE)
    folder = shutil.copytree(layerwise, tmp_path / "raw")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "head_type": "raw"}))
    with pytest.raises(CheckpointError, match="head_type is 'raw'; only 'simple' heads"):
        Encoder.load(folder, adapter=LAYERWISE)


# ---- fine-tuning


def test_loss_of_all_layers():
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    arguments = LossArguments(group_size=3)
    adapter = registry().adapter(LAYERWISE)
    from ultrarag import Embeddings

    found = adapter.loss(torch.nn.Linear(1, 1), None, Embeddings(scores=scores), None, 0, arguments)
    groups = scores.view(2, 3, 3)
    wanted = [torch.nn.functional.cross_entropy(groups[..., n], torch.zeros(2, dtype=torch.long)) for n in range(3)]
    target = groups[..., 2].detach().softmax(-1)
    wanted += [-(target * groups[..., n].log_softmax(-1)).sum(-1).mean() for n in range(2)]
    assert found.item() == pytest.approx(sum(wanted).item(), rel=1e-6)
    teacher = torch.tensor([[3.0, 1, 0], [2, 0, 1]])
    taught = adapter.loss(torch.nn.Linear(1, 1), None, Embeddings(scores=scores), teacher, 0, arguments)
    columns = [cross_encoder_loss(scores[:, n], teacher, arguments) for n in range(3)]
    assert taught.item() == pytest.approx(sum(columns).item(), rel=1e-6)


@pytest.mark.parametrize("more", [{}, {"sub_batch_size": 5}, {"use_lora": True, "lora_rank": 4}])
@pytest.mark.parametrize("name", [GEMMA, LAYERWISE])
def test_fine_tuning(name, more, gemma, layerwise, tmp_path):
    path = gemma if name == GEMMA else layerwise
    rows = [{**row, "prompt": PROMPT} for row in ROWS]
    result = finetune(path, rows, tmp_path / "out", adapter=name, sep_token="\\n", **QUICK, **more)
    encoder = Encoder.load(result.checkpoint)
    assert encoder.fingerprint == result.fingerprint
    assert encoder.settings.separator == "\n"
    start = Encoder.load(path, adapter=name)
    assert np.abs(encoder.score(PAIRS) - start.score(PAIRS)).max() > 1e-4
    if name == LAYERWISE:
        for before, after in zip(start.model.layer_heads, encoder.model.layer_heads, strict=True):
            assert not torch.equal(before.weight, after.weight)


def test_rows_prompt_is_the_question(gemma, tmp_path, monkeypatch):
    from ultrarag.adapters.llm_reranker_model import YesReranker

    seen = []
    original = YesReranker.pair_tokens
    monkeypatch.setattr(
        YesReranker, "pair_tokens", lambda self, *a, **k: seen.append((a, k)) or original(self, *a, **k)
    )
    rows = [{**row, "prompt": f"{number}?"} for number, row in enumerate(ROWS)]
    finetune(gemma, rows, tmp_path / "out", adapter=GEMMA, **QUICK)
    trained = [(a, k) for a, k in seen if "prompts" in k]
    for (queries, passages, *_), options in trained:
        numbers = [int(prompt[:-1]) for prompt in options["prompts"]]
        assert queries == [f"A: {ROWS[number]['query']}" for number in numbers]
        assert all(passage.startswith("B: ") for passage in passages)
    assert trained


def test_packed_and_padded_agree(gemma):
    encoder = Encoder.load(gemma, adapter=GEMMA, device="cpu", prompt=PROMPT)
    features = encoder.features(encoder.tokenize_pairs(PAIRS))
    with torch.no_grad():
        found = [hidden_states(encoder.model.backbone.base_model, features, packing) for packing in (True, False)]
    keep = features["attention_mask"].bool()
    assert torch.allclose(found[0][keep], found[1][keep], atol=1e-4)
