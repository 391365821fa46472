"""Which adapter a model folder gets by itself, which are refused for it, and how plugins of others take part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ultrarag import Embeddings, Encoder, UltraragError, hookimpl
from ultrarag.claims import Claim, ModelFolder, Refusal
from ultrarag.encoder import find_adapter
from ultrarag.errors import PluginError, UsageError
from ultrarag.plugins import registry
from ultrarag.testing.tiny import tiny_bert, tiny_cross_encoder, tiny_masked_lm, tiny_splade

ST = "sentence_transformers"
EMBEDDER = (f"{ST}.models.Transformer", f"{ST}.models.Pooling", f"{ST}.models.Normalize")
NEW_NAMES = (
    f"{ST}.base.modules.transformer.Transformer",
    f"{ST}.sentence_transformer.modules.pooling.Pooling",
    f"{ST}.base.modules.dense.Dense",
)
PYLATE = (f"{ST}.models.Transformer", "pylate.models.Dense.Dense")
ST_COLBERT = (
    f"{ST}.base.modules.transformer.Transformer",
    f"{ST}.base.modules.dense.Dense",
    f"{ST}.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
)
SPLADE = (f"{ST}.models.Transformer", f"{ST}.sparse_encoder.models.SpladePooling")
LOGITS = (
    f"{ST}.base.modules.transformer.Transformer",
    f"{ST}.cross_encoder.modules.logit_score.LogitScore",
)
STATIC = (f"{ST}.models.StaticEmbedding", f"{ST}.models.Normalize")
LABEL = {"id2label": {"0": "LABEL_0"}}
SPLADE_CARD = "---\nlanguage: en\ntags:\n- splade\n- query-expansion\n---\n# SPLADE"
RANKS = "---\nlicense: mit\npipeline_tag: text-ranking\n---\n# A reranker"


def lay_out(folder: Path, architecture: str = "", modules: tuple[str, ...] = (), **more: Any) -> Path:
    """Write the small files of a model: no weights, which nobody reads to tell what it is."""
    folder.mkdir(exist_ok=True)
    library, card, files = (more.pop(name, None) for name in ("library", "card", "files"))
    if architecture:
        config = {"architectures": [architecture], "model_type": "bert", **more}
        (folder / "config.json").write_text(json.dumps(config))
    rows = [{"idx": n, "name": str(n), "path": f"{n}_" if n else "", "type": kind} for n, kind in enumerate(modules)]
    if rows:
        (folder / "modules.json").write_text(json.dumps(rows))
    for row in rows:
        if row["type"].endswith("Pooling"):
            (folder / row["path"]).mkdir(exist_ok=True)
            pooling = {"word_embedding_dimension": 8, "pooling_mode": more.get("pooling", "mean")}
            (folder / row["path"] / "config.json").write_text(json.dumps(pooling))
    if library:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": library}))
    if card:
        (folder / "README.md").write_text(card)
    for name, content in (files or {}).items():
        (folder / name).write_text(content)
    return folder


#: family -> how it is laid out, and the adapter it gets
CHOSEN: dict[str, tuple[dict[str, Any], str]] = {
    "bge, e5, MiniLM": ({"architecture": "BertModel", "modules": EMBEDDER}, "bge"),
    "Qwen3-Embedding": ({"architecture": "Qwen3ForCausalLM", "model_type": "qwen3", "modules": EMBEDDER}, "bge"),
    "EmbeddingGemma": ({"architecture": "Gemma3TextModel", "modules": NEW_NAMES}, "bge"),
    "a bare encoder": ({"architecture": "BertForMaskedLM"}, "bge"),
    "bge-m3": ({"architecture": "XLMRobertaModel", "modules": EMBEDDER, "files": {"sparse_linear.pt": ""}}, "bgem3"),
    "bge-en-icl": (
        {"architecture": "MistralModel", "files": {"added_tokens.json": '{"<instruct>": 9, "<query>": 10}'}},
        "icl",
    ),
    "MiniCPM-Embedding": ({"architecture": "MiniCPM", "model_type": "minicpm"}, "minicpm-embedding"),
    "sentence-t5": (
        {"architecture": "T5EncoderModel", "model_type": "t5", "is_encoder_decoder": True, "modules": EMBEDDER},
        "sentence-transformers",
    ),
    "max pooling": ({"architecture": "BertModel", "modules": EMBEDDER, "pooling": "max"}, "sentence-transformers"),
    "code of its own": (
        {"architecture": "XLMRobertaModel", "modules": ("custom_st.Transformer", *EMBEDDER[1:])},
        "sentence-transformers",
    ),
    "SPLADE": ({"architecture": "BertForMaskedLM", "modules": SPLADE}, "sentence-transformers"),
    "SPLADE by its class": (
        {"architecture": "BertForMaskedLM", "modules": EMBEDDER, "library": "SparseEncoder"},
        "sentence-transformers",
    ),
    "SPLADE of naver": ({"architecture": "BertForMaskedLM", "card": SPLADE_CARD}, "sentence-transformers"),
    "SPLADE by its class, bare": (
        {"architecture": "BertForMaskedLM", "library": "SparseEncoder"},
        "sentence-transformers",
    ),
    "potion": ({"architecture": "StaticModel", "model_type": "model2vec"}, "static"),
    "static": ({"modules": STATIC}, "static"),
    "bge-reranker": ({"architecture": "XLMRobertaForSequenceClassification", **LABEL}, "bge-reranker"),
    "a CrossEncoder": (
        {"architecture": "BertForSequenceClassification", "modules": EMBEDDER[:1], "library": "CrossEncoder", **LABEL},
        "bge-reranker",
    ),
    "bge-reranker-gemma": (
        {"architecture": "GemmaForCausalLM", "model_type": "gemma", "card": RANKS},
        "bge-reranker-gemma",
    ),
    "layerwise": (
        {"architecture": "LayerWiseMiniCPMForCausalLM", "model_type": "minicpm"},
        "bge-reranker-minicpm-layerwise",
    ),
}


@pytest.mark.parametrize("family", CHOSEN)
def test_a_folder_gets_its_adapter(tmp_path: Path, family: str) -> None:
    files, adapter = CHOSEN[family]
    assert find_adapter(lay_out(tmp_path, **files)) == adapter


#: family -> how it is laid out, and what is said where no adapter runs it (those of other rooms claim theirs)
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "PyLate": ({"architecture": "BertModel", "modules": PYLATE}, r"late-interaction .*pylate.models.Dense.Dense"),
    "Stanford": ({"architecture": "HF_ColBERT"}, "late-interaction .*HF_ColBERT"),
    "MultiVectorEncoder": ({"architecture": "BertModel", "modules": ST_COLBERT}, "late-interaction .*MultiVectorMask"),
    "Qwen3-Reranker": (
        {"architecture": "Qwen3ForCausalLM", "model_type": "qwen3", "modules": LOGITS, "library": "CrossEncoder"},
        "causal reranker.*LogitScore",
    ),
    "Qwen3-Reranker, bare": (
        {"architecture": "Qwen3ForCausalLM", "model_type": "qwen3", "card": RANKS},
        "causal reranker.*text-ranking",
    ),
    "a classifier": ({"architecture": "BertForSequenceClassification"}, "a classifier .*2 labels"),
    "T5": ({"architecture": "T5ForConditionalGeneration", "is_encoder_decoder": True}, "an encoder with a decoder"),
}


@pytest.mark.parametrize("family", NAMED)
def test_no_kind_is_loaded_as_another(tmp_path: Path, family: str) -> None:
    files, message = NAMED[family]
    folder = lay_out(tmp_path, **files)
    runs = [name for name, answer in registry().answers(ModelFolder(folder)).items() if isinstance(answer, Claim)]
    if runs:  # an adapter made for it
        assert find_adapter(folder) in runs
    else:
        with pytest.raises(UsageError, match=message):
            find_adapter(folder)
    with pytest.raises(UsageError, match=rf"the adapter 'bge' cannot be right for .*{message}"):
        Encoder.load(folder, "bge")


def test_the_adapter_that_can_is_named(tmp_path: Path) -> None:
    for name, make in {"splade": tiny_splade, "pairs": tiny_cross_encoder}.items():
        make(tmp_path / name)
    with pytest.raises(UsageError, match=r"'bge' cannot be right .* use the adapter 'sentence-transformers'"):
        Encoder.load(tmp_path / "splade", "bge")
    with pytest.raises(UsageError, match=r"'bgem3' cannot be right .* use the adapter 'bge-reranker'"):
        Encoder.load(tmp_path / "pairs", "bgem3")
    with pytest.raises(UsageError, match=r"'bge-reranker' cannot be right .* the adapter 'sentence-transformers'"):
        Encoder.load(tmp_path / "splade", "bge-reranker")


def test_a_language_model_has_to_be_told_what_to_become(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, "Qwen3ForCausalLM", model_type="qwen3")
    with pytest.raises(UsageError, match=r"says neither .* such as .*'bge'.* to embed texts, .*'bge-reranker'.* pairs"):
        find_adapter(folder)


def test_a_layerwise_reranker_of_ours_is_no_encoder(tmp_path: Path) -> None:
    from ultrarag.testing.tiny import tiny_layerwise

    (tmp_path / "model").mkdir()
    tiny_layerwise(tmp_path / "model")
    Encoder.load(tmp_path / "model").save(tmp_path / "saved")  # as a Granite, which says no more than that
    with pytest.raises(UsageError, match="is a reranker, saved by the adapter 'bge-reranker-minicpm-layerwise'"):
        Encoder.load(tmp_path / "saved", "bge")


class Plugin:
    """A contract-1 plugin; `answer` is what its claims return."""

    contract = 1

    @hookimpl
    def load(self, path):
        """Not called here."""

    @hookimpl
    def encode(self, model, features):
        return Embeddings()

    @hookimpl
    def loss(self, query, passage, teacher, step, args):
        """Not called here."""

    @hookimpl
    def save(self, model, path, state_dict):
        """Not called here."""


class Claiming(Plugin):
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def claims(self, folder: ModelFolder) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def plugin():
    """Registers plugins by name until the test is over."""
    names = []

    def register(name: str, plugin: Any) -> None:
        registry().register(plugin, name)
        names.append(name)

    yield register
    for name in names:
        registry().unregister(name)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Claim("acme.json", "exact"), "acme"),
        (Claim("an encoder", "could"), "bge"),
        (Refusal("nothing of ours"), "bge"),
        (None, "bge"),
    ],
)
def test_the_most_specific_claim_wins(tmp_path: Path, plugin: Any, answer: Any, expected: str) -> None:
    plugin("acme", Claiming(answer))
    assert find_adapter(lay_out(tmp_path, "BertModel", EMBEDDER)) == expected


def test_a_tie_names_both(tmp_path: Path, plugin: Any) -> None:
    plugin("acme", Claiming("config.json: model_type bert"))
    with pytest.raises(UsageError, match=r"claimed by the adapters 'acme' and 'bge' .*name one of them"):
        find_adapter(lay_out(tmp_path, "BertModel", EMBEDDER))


def test_a_plugin_without_claims_has_to_be_named(tmp_path: Path, plugin: Any) -> None:
    plugin("acme", Plugin())
    folder = lay_out(tmp_path, "HF_ColBERT")
    assert registry().answer("acme", ModelFolder(folder)) is None
    with pytest.raises(PluginError, match="hook 'load' returned None"):  # it was asked to
        Encoder.load(folder, "acme")


def test_claims_that_fail_harm_nobody_else(tmp_path: Path, plugin: Any) -> None:
    plugin("acme", Claiming(KeyError("x")))
    plugin("loud", Claiming(3))
    folder = lay_out(tmp_path, "BertModel", EMBEDDER)
    with pytest.warns(UserWarning, match="claims (raised KeyError|returned 3)") as caught:
        assert find_adapter(folder) == "bge"
    assert len(caught) == 2


def test_claims_of_another_signature_are_refused() -> None:
    class Wrong(Plugin):
        def claims(self) -> None:
            """Takes no folder."""

    with pytest.raises(PluginError, match="must be a function of one argument"):
        registry().register(Wrong(), "wrong")


def test_the_adapter_in_use_reads_what_says_nothing(tmp_path: Path) -> None:
    tiny_masked_lm(tmp_path / "bare")
    tiny_bert(tmp_path / "said")
    assert find_adapter(tmp_path / "bare", usual="bgem3") == "bgem3"
    assert find_adapter(tmp_path / "said", usual="bgem3") == "bge"
    assert find_adapter(tmp_path / "said", usual="colbert") == "bge"
    assert find_adapter(tmp_path / "bare", usual="static") == "bge"  # which cannot be it


def test_commands_need_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ultrarag.cli import main

    tiny_bert(tmp_path / "model")
    tiny_cross_encoder(tmp_path / "pairs")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"query": "seals", "pos": ["Seals sleep."], "neg": ["Bread."]}) + "\n")
    train = ["--train_data", str(rows), "--train_group_size", "2", "--dry_run", "--passage_max_len", "64"]
    assert main(["finetune", "--model_name_or_path", str(tmp_path / "model"), *train, "--output_dir", "o"]) == 0
    assert main(["finetune", "--model_name_or_path", str(tmp_path / "pairs"), *train, "--output_dir", "o"]) == 0
    assert main(["index", "create", str(tmp_path / "index"), "--model", str(tmp_path / "model")]) == 0
    assert main(["index", "create", str(tmp_path / "no"), "--model", str(tmp_path / "pairs")]) == 2
    assert "is a reranker" in capsys.readouterr().err
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"_id": "1", "text": "Seals sleep."}\n')
    encode = ["data", "encode", "--input_file", str(passages), "--output", str(tmp_path / "vectors")]
    assert main([*encode, "--model_name_or_path", str(tmp_path / "pairs")]) == 2
    assert "is a reranker" in capsys.readouterr().err
    mine = ["data", "mine", "--input_file", str(rows), "--output_file", str(tmp_path / "mined.jsonl")]
    assert main([*mine, "--model_name_or_path", str(tmp_path / "pairs")]) == 2
    assert "is a reranker" in capsys.readouterr().err


def test_nothing_heavy_is_read_to_answer(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, "BertModel", files={"config_sentence_transformers.json": "{ damaged"})
    assert ModelFolder(folder).library == {}
    assert str(ModelFolder(folder).family) == "an encoder without a declared use (config.json: BertModel)"
    with pytest.raises(UltraragError):
        find_adapter(lay_out(tmp_path / "empty"))


# ---- models of two sides, and LoRA folders


def test_a_model_of_two_sides_is_claimed_as_its_passage_side_is(tmp_path: Path) -> None:
    from ultrarag.maps import LinearMap

    tiny_bert(tmp_path / "bert")
    plain = Encoder.load(tmp_path / "bert", device="cpu")
    saved = Encoder.of_sides(plain, query_maps=[LinearMap.identity(32, True)]).save(tmp_path / "sided")
    assert find_adapter(saved) == "bge"
    (saved / "ultrarag.json").unlink()
    assert find_adapter(saved) == "bge"  # by the files of the side, and not as a Router of other modules
    assert Encoder.load(saved, "bge", device="cpu").asymmetric
    assert Encoder.load(saved, device="cpu").adapter.name == "bge"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_lora_folder_is_claimed_as_its_base_is(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    tiny_bert(tmp_path / "bert")
    model = get_peft_model(AutoModel.from_pretrained(tmp_path / "bert"), LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path / "lora")
    assert find_adapter(tmp_path / "lora") == "bge"
    assert Encoder.load(tmp_path / "lora", device="cpu").adapter.name == "bge"
