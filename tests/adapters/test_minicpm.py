"""minicpm-embedding: the published layout on a tiny scale, against a reference written from the formulas."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.adapters import minicpm_reference as reference
from ultrarag import Encoder
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.finetune import finetune
from ultrarag.hookspecs import LoadOptions

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "peer" / "model"
CONFIG = {
    "architectures": ["MiniCPM"],
    "model_type": "minicpm",
    "auto_map": {"AutoModel": "modeling_minicpm.MiniCPM", "AutoConfig": "configuration_minicpm.MiniCPMConfig"},
    "vocab_size": 267,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 120,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "is_causal": False,
    "torch_dtype": "float32",
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 9.0],
    "original_max_position_embeddings": 30,
}
LIGHT = {"num_key_value_heads": 2, "rope_scaling": LONGROPE, "adapt_mean_pooling": True}
KINDS = {"embedding": {}, "grouped": {"num_key_value_heads": 2}, "light": LIGHT}
LONG = "a long text about the nearest neighbour " * 3
TEXTS = ["a", "seals sleep under water", "what is a vector database? " * 3, "the quick brown fox", "x"]
ROWS = [
    {"query": f"question {i}", "pos": [f"the answer to number {i}"], "neg": [f"something else {i + 3}"]}
    for i in range(8)
]


def published(folder: Path, kind: str, prefix: str = "", **changes) -> Path:
    """A folder as openbmb publishes it: its config.json, its remote code's names, random weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **KINDS[kind], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    save_file(
        {prefix + k: v for k, v in random_weights(config).items()}, folder / "model.safetensors", {"format": "pt"}
    )
    if kind == "light":
        head = {"weight": torch.randn(1, 32, generator=torch.Generator().manual_seed(5)), "bias": torch.tensor([0.3])}
        torch.save(head, folder / "sparse_linear.pt")
    return folder


def random_weights(config: dict) -> dict[str, torch.Tensor]:
    """Weights under Llama's names, far from the near-uniform attention of a fresh model."""
    random = torch.Generator().manual_seed(7)
    wide, deep = config["hidden_size"], config["intermediate_size"]
    keys = wide * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {"embed_tokens.weight": (config["vocab_size"], wide), "norm.weight": (wide,)}
    for layer in range(config["num_hidden_layers"]):
        part = {
            "self_attn.q_proj": (wide, wide),
            "self_attn.k_proj": (keys, wide),
            "self_attn.v_proj": (keys, wide),
            "self_attn.o_proj": (wide, wide),
            "mlp.gate_proj": (deep, wide),
            "mlp.up_proj": (deep, wide),
            "mlp.down_proj": (wide, deep),
            "input_layernorm": (wide,),
            "post_attention_layernorm": (wide,),
        }
        shapes.update({f"layers.{layer}.{name}.weight": shape for name, shape in part.items()})
    return {
        name: torch.randn(shape, generator=random) * 0.3 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: published(tmp_path_factory.mktemp("minicpm") / kind, kind) for kind in KINDS}


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return str(request.param)


def load(folder: Path, **options) -> Encoder:
    return Encoder.load(folder, adapter="minicpm-embedding", device="cpu", **options)


def expected(encoder: Encoder, kind: str, texts=TEXTS, **changes) -> list[torch.Tensor]:
    config = {**CONFIG, **KINDS[kind], **changes}
    weights = random_weights(config)
    return [reference.hidden_states(weights, config, encoder.tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_dense_vectors_are_the_formulas(folders, kind, padding, attention):
    encoder = load(folders[kind])
    encoder.model.backbone.set_attn_implementation(attention)
    encoder.tokenizer.padding_side = "left" if padding == "left" else "right"
    found = encoder.encode(TEXTS, heads="dense", batch_tokens=1 if padding == "none" else 4096).dense
    wanted = torch.stack([reference.dense(hidden) for hidden in expected(encoder, kind)])
    assert np.abs(found - wanted.numpy()).max() < 2e-6


def test_bidirectional_without_padding_under_transformers_own_attention(folders):
    """SDPA with no mask goes by the modules' own is_causal."""
    encoder = load(folders["grouped"])
    ids = encoder.tokenizer([TEXTS[1]], return_tensors="pt")
    found = encoder.model.backbone(**ids).last_hidden_state[0]
    assert torch.allclose(found, expected(encoder, "grouped")[1], atol=2e-5)


def test_bf16_is_near(folders, kind):
    encoder = load(folders[kind])
    found = encoder.encode(TEXTS, heads="dense", precision="bf16").dense
    wanted = torch.stack([reference.dense(hidden) for hidden in expected(encoder, kind)]).numpy()
    assert ((found * wanted).sum(1) > 0.995).all()


def test_lexical_weights_are_the_formula(folders):
    encoder = load(folders["light"])
    head = torch.load(folders["light"] / "sparse_linear.pt", weights_only=True)
    found = encoder.encode(TEXTS, heads="sparse").sparse.to_dicts()
    for row, (text, hidden) in enumerate(zip(TEXTS, expected(encoder, "light"), strict=True)):
        wanted = reference.sparse(hidden, encoder.tokenizer(text)["input_ids"], head["weight"], head["bias"])
        assert found[row] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert any(found)


def test_vectors_do_not_depend_on_batchmates(folders):
    """One text is longer than LongRoPE's original length, the others are shorter."""
    texts = [*TEXTS, LONG]
    encoder = load(folders["light"])
    assert 30 < len(encoder.tokenizer(LONG)["input_ids"]) < 120
    together = encoder.encode(texts)
    for row, text in enumerate(texts):
        alone = encoder.encode([text])
        assert np.abs(alone.dense[0] - together.dense[row]).max() < 1e-6
        assert alone.sparse.to_dicts()[0] == pytest.approx(together.sparse.to_dicts()[row], rel=1e-5, abs=1e-5)
    wanted = reference.dense(expected(encoder, "light", texts)[-1])
    assert np.abs(together.dense[-1] - wanted.numpy()).max() < 2e-6


@pytest.mark.parametrize("original", [60, 120, 240])
def test_longrope_below_at_and_above_the_trained_length(tmp_path, original):
    scaling = {**LONGROPE, "original_max_position_embeddings": original}
    encoder = load(published(tmp_path, "grouped", rope_scaling=scaling))
    hidden = expected(encoder, "grouped", rope_scaling=scaling)
    wanted = torch.stack([reference.dense(states) for states in hidden])
    assert np.abs(encoder.encode(TEXTS).dense - wanted.numpy()).max() < 2e-6


def test_settings_of_the_published_models(folders):
    plain, light = load(folders["embedding"]), load(folders["light"])
    assert (plain.heads, light.heads) == (("dense",), ("dense", "sparse"))
    assert plain.settings.pooling == light.settings.pooling == "weighted_mean"
    assert light.max_length("passage") == 120
    assert np.array_equal(plain.encode("seals", "query").dense, plain.encode("Query: seals").dense)
    prompted = load(folders["embedding"], query_instruction="Find it.", query_format="Instruction: {} Query: {}")
    assert np.array_equal(
        prompted.encode("seals", "query").dense, plain.encode("Instruction: Find it. Query: seals").dense
    )


def test_short_models_are_cut_at_512(tmp_path):
    assert load(published(tmp_path, "embedding", max_position_embeddings=4096)).settings.passage_max_length == 512


def test_pooling_declared_by_modules_json(tmp_path):
    from ultrarag.adapters.sentence_transformers_files import write_declaration
    from ultrarag.types import EncoderSettings

    settings = EncoderSettings(pooling="mean", normalize=True)
    write_declaration(published(tmp_path / "mean", "embedding"), settings, 32)
    write_declaration(published(tmp_path / "adapted", "light"), settings, 32)
    assert load(tmp_path / "mean").settings.pooling == "mean"
    assert load(tmp_path / "adapted").settings.pooling == "weighted_mean"  # once, not twice


def test_saved_model_is_the_same_here_and_in_sentence_transformers(folders, kind, tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder = load(folders[kind])
    path = encoder.save(tmp_path / "saved")
    again = Encoder.load(path, device="cpu")
    assert again.adapter.name == "minicpm-embedding"
    assert again.settings == encoder.settings
    assert again.fingerprint == encoder.fingerprint
    texts = [*TEXTS, LONG]
    ours = encoder.encode(texts)
    for mine, other in zip(ours.arrays(), again.encode(texts).arrays(), strict=True):
        assert np.abs(mine - other).max() < 1e-6
    theirs = SentenceTransformer(str(path), device="cpu")
    for batch_size in (1, 8):  # without padding and with it
        assert np.abs(theirs.encode(texts, batch_size=batch_size) - ours.dense).max() < 1e-5
    queries = theirs.encode(texts, prompt_name="query")
    assert np.abs(queries - encoder.encode(texts, "query").dense).max() < 1e-5


def test_second_generation_is_the_first(folders, tmp_path):
    """config.json names eager attention for other tools; here a saved model runs as fast as a published one."""
    first = Encoder.load(load(folders["light"]).save(tmp_path / "1"), device="cpu")
    second = Encoder.load(first.save(tmp_path / "2"), device="cpu")
    assert second.fingerprint == first.fingerprint
    assert second.model.config._attn_implementation in ("sdpa", "ultrarag_packed")
    assert (tmp_path / "1" / "config.json").read_text() == (tmp_path / "2" / "config.json").read_text()


def test_plain_transformers_reads_the_saved_model_bidirectionally(folders, tmp_path):
    from transformers import AutoModel

    encoder = load(folders["embedding"])
    model = AutoModel.from_pretrained(encoder.save(tmp_path / "saved"), dtype=torch.float32).eval()
    ids = encoder.tokenizer([TEXTS[1]], return_tensors="pt")
    assert torch.allclose(model(**ids).last_hidden_state[0], expected(encoder, "embedding")[1], atol=2e-5)


def test_fine_tuning_trains_every_parameter(folders, tmp_path):
    result = finetune(
        str(folders["light"]),
        ROWS,
        output_dir=str(tmp_path / "out"),
        adapter="minicpm-embedding",
        unified_finetuning=True,
        learning_rate=1e-3,
        max_steps=3,
        per_device_train_batch_size=4,
        query_max_len=32,
        passage_max_len=64,
        report_to="none",
        use_cpu=True,
    )
    before, after = load(folders["light"]), Encoder.load(result.checkpoint, device="cpu")
    assert after.fingerprint == result.fingerprint
    start = dict(before.model.named_parameters())
    still = [name for name, tensor in after.model.named_parameters() if torch.equal(tensor, start[name])]
    assert still == []
    assert after.settings.render("why?", "query") == "Query: why?"
    assert after.settings.render("why?", "query", "Find it.") == "Instruction: Find it. Query: why?"


def test_instruction_of_a_run_gets_its_format(folders, tmp_path):
    options = {"max_steps": 1, "learning_rate": 1e-3, "passage_max_len": 64, "report_to": "none", "use_cpu": True}
    result = finetune(
        str(folders["embedding"]),
        ROWS,
        output_dir=str(tmp_path / "out"),
        adapter="minicpm-embedding",
        query_instruction_for_retrieval="Find the answer.",
        **options,
    )
    settings = Encoder.load(result.checkpoint).settings
    assert settings.render("why?", "query") == "Instruction: Find the answer. Query: why?"


@pytest.mark.parametrize("prefix", ["", "model."])
def test_published_names_with_and_without_prefix(folders, tmp_path, prefix):
    encoder = load(published(tmp_path, "embedding", prefix))
    assert np.array_equal(encoder.encode(TEXTS).dense, load(folders["embedding"]).encode(TEXTS).dense)


def edit_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_sparse_head_among_the_published_weights(folders, tmp_path):
    folder = published(tmp_path, "light")
    head = torch.load(folder / "sparse_linear.pt", weights_only=True)
    (folder / "sparse_linear.pt").unlink()
    edit_weights(folder, lambda weights: weights.update({f"head.{name}": value for name, value in head.items()}))
    found, wanted = load(folder), load(folders["light"])
    assert found.encode(TEXTS).sparse.to_dicts() == wanted.encode(TEXTS).sparse.to_dicts()


def test_language_model_head_is_left_out_and_nothing_else(folders, tmp_path):
    folder = published(tmp_path, "embedding")
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(267, 32)}))
    assert load(folder).heads == ("dense",)
    edit_weights(folder, lambda weights: weights.update({"layers.9.mlp.up_proj.weight": torch.zeros(48, 32)}))
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) that a MiniCPM embedder does not have: 'layers.9.mlp"):
        load(folder)


def test_missing_weights_are_refused(tmp_path):
    folder = published(tmp_path, "embedding")
    edit_weights(folder, lambda weights: weights.pop("layers.1.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lack 1 tensor.* first 'layers.1.self_attn.k_proj.weight'"):
        load(folder)


def test_sparse_head_is_never_made_up(folders):
    with pytest.raises(CheckpointError, match=r"no sparse_linear.pt: the head has no weights"):
        load(folders["embedding"], heads=["dense", "sparse"])
    trained = load(folders["embedding"], options=LoadOptions(training=True))
    assert trained.heads == ("dense", "sparse")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, "the adapter 'minicpm-embedding' cannot be right for"),
        ({"model_type": "granite", "is_causal": True}, "this Granite model is causal"),
        ({"is_causal": True}, "this is MiniCPM the language model"),
        ({"scale_emb": None}, "'scale_emb' is missing"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, r"rope_scaling\['long_factor'\] must hold 4 numbers"),
    ],
)
def test_what_is_not_a_minicpm_embedder_is_refused(tmp_path, changes, words):
    with pytest.raises((CheckpointError, UsageError), match=words):
        load(published(tmp_path, "embedding", **changes))


def test_unknown_pooling_is_refused(folders):
    with pytest.raises(UsageError, match="sentence_pooling_method 'means' is unknown; did you mean 'mean'"):
        load(folders["embedding"], options=LoadOptions(pooling="means"))
