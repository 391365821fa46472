"""sentence-transformers: its modules behind our hooks, dense and sparse, give its vectors before and after training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ultrarag import Encoder
from ultrarag.adapters.sentence_transformers_model import nonzero
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.finetune import finetune
from ultrarag.hookspecs import LoadOptions

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "peer" / "model"
TEXTS = ["a", "seals sleep under water", "what is a vector database? " * 2, " the quick brown fox\n", ""]
ROWS = [
    {"query": f"question {i}", "pos": [f"the answer to number {i}"], "neg": [f"something else {i + 3}"]}
    for i in range(8)
]
RUN = {
    "adapter": "sentence-transformers",
    "learning_rate": 1e-3,
    "max_steps": 3,
    "train_group_size": 2,
    "passage_max_len": 64,
    "report_to": "none",
    "use_cpu": True,
}


def tiny_bert(folder: Path, masked: bool = False) -> str:
    """A tiny BERT with a tokenizer; its dropout is off, so that training mode gives the same vectors."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=267,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=130,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        pad_token_id=1,
    )
    (BertForMaskedLM if masked else BertModel)(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return str(folder)


def dense_model(folder: Path, kind: str):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        CNN,
        Dense,
        Normalize,
        Pooling,
        Transformer,
        WeightedLayerPooling,
    )

    options = {"config_kwargs": {"output_hidden_states": True}} if kind == "layers" else {}
    body = Transformer(tiny_bert(folder / "body"), max_seq_length=96, **options)
    width = 24 if kind == "cnn" else 32
    between = {
        "plain": [],
        "layers": [WeightedLayerPooling(32, num_hidden_layers=2, layer_start=1)],
        "cnn": [CNN(32, out_channels=8, kernel_sizes=[1, 3, 5])],
    }[kind]
    modules = [body, *between, Pooling(width, "mean"), Dense(width, 16), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu", prompts={"query": "find: "}, similarity_fn_name="cosine")


def splade_model(folder: Path):
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    body = MLMTransformer(tiny_bert(folder / "body", masked=True), max_seq_length=96)
    return SparseEncoder(modules=[body, SpladePooling("max")], device="cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, str]:
    """Folders that sentence-transformers itself wrote."""
    folders = {}
    for kind in ("plain", "layers", "cnn", "splade"):
        folder = tmp_path_factory.mktemp(kind)
        model = splade_model(folder) if kind == "splade" else dense_model(folder, kind)
        model.save_pretrained(str(folder / "model"), create_model_card=False)
        folders[kind] = str(folder / "model")
    return folders


def load(folder: str, **options) -> Encoder:
    return Encoder.load(folder, adapter="sentence-transformers", device="cpu", **options)


def library(folder: str):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu")


@pytest.mark.parametrize("kind", ["plain", "layers", "cnn"])
def test_dense_vectors_are_the_librarys(saved, kind):
    encoder, theirs = load(saved[kind]), library(saved[kind])
    assert encoder.heads == ("dense",)
    assert np.abs(encoder.encode(TEXTS).dense - theirs.encode(TEXTS)).max() < 1e-5
    queries = theirs.encode(TEXTS, prompt_name="query")
    assert np.abs(encoder.encode(TEXTS, "query").dense - queries).max() < 1e-5


def test_vectors_do_not_depend_on_batchmates(saved):
    for kind in ("plain", "splade"):
        encoder = load(saved[kind])
        together = encoder.encode(TEXTS)
        for row, text in enumerate(TEXTS):
            alone = encoder.encode([text])
            if kind == "plain":
                assert np.abs(alone.dense[0] - together.dense[row]).max() < 1e-5
            else:
                assert alone.sparse.to_dicts()[0] == pytest.approx(together.sparse.to_dicts()[row], abs=1e-5)


def test_settings_come_from_the_library(saved, minilm):
    settings = load(saved["plain"]).settings
    assert settings.query_instruction == "find: "
    assert settings.passage_instruction == ""
    assert settings.passage_max_length == 96
    assert settings.normalize is True
    assert load(minilm).max_length("passage") == library(minilm).max_seq_length


def test_real_model_is_the_same_as_by_the_adapter_bge(minilm, minilm_encoder):
    found = load(minilm).encode(TEXTS).dense
    assert np.abs(found - minilm_encoder.encode(TEXTS).dense).max() < 1e-5


def test_sparse_weights_are_the_librarys(saved):
    from sentence_transformers import SparseEncoder

    encoder = load(saved["splade"])
    assert encoder.heads == ("sparse",)
    found = encoder.encode(TEXTS).sparse.to_dicts()
    wanted = SparseEncoder(saved["splade"], device="cpu").encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    for row, vector in enumerate(wanted):
        assert found[row] == pytest.approx({i: float(v) for i, v in enumerate(vector) if v > 0}, abs=1e-5)


def test_sparse_weights_are_differentiable_in_evaluation_mode_too(saved):
    """The mode changes no value here, and the gradient is there whenever it is asked for."""
    encoder = load(saved["splade"])
    features = encoder.features(encoder.tokenize(TEXTS, "passage"))
    weights = []
    for mode in (False, True):
        encoder.model.train(mode).zero_grad()
        weights.append(encoder.adapter.encode(encoder.model, features).sparse.weights)
        weights[-1].sum().backward()
        assert all(p.grad is not None for p in encoder.model.parameters())
    assert torch.equal(*weights)


def test_nonzero_lists_ascending_ids_and_passes_gradients():
    vector = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    found = nonzero(vector)
    assert found.ids.tolist() == [[1, 3], [-1, -1]]
    (found.weights * torch.tensor([10.0, 100.0])).sum().backward()
    assert vector.grad.tolist() == [[0, 10, 0, 100], [0, 0, 0, 0]]


@pytest.mark.parametrize("kind", ["plain", "layers", "cnn", "splade"])
def test_fine_tuned_model_loads_again_here_and_there(saved, kind, tmp_path):
    result = finetune(saved[kind], ROWS, output_dir=str(tmp_path / "out"), **RUN)
    before, after = load(saved[kind]), Encoder.load(result.checkpoint, device="cpu")
    assert after.adapter.name == "sentence-transformers"
    assert after.fingerprint == result.fingerprint
    start = dict(before.model.named_parameters())
    trainable = {name for name, tensor in after.model.named_parameters() if tensor.requires_grad}
    assert {name for name in trainable if torch.equal(dict(after.model.named_parameters())[name], start[name])} <= {
        "backbone.model.bert.embeddings.token_type_embeddings.weight"
    }
    ours = after.encode(TEXTS)
    if kind == "splade":
        from sentence_transformers import SparseEncoder

        theirs = SparseEncoder(result.checkpoint, device="cpu").encode(TEXTS, convert_to_sparse_tensor=False).numpy()
        for row, vector in enumerate(theirs):
            assert ours.sparse.to_dicts()[row] == pytest.approx(
                {i: float(v) for i, v in enumerate(vector) if v > 0}, abs=1e-5
            )
    else:
        assert np.abs(library(result.checkpoint).encode(TEXTS) - ours.dense).max() < 1e-5


def test_fix_encoder_trains_the_modules_after_the_backbone(saved, tmp_path):
    result = finetune(saved["plain"], ROWS, output_dir=str(tmp_path / "out"), fix_encoder=True, **RUN)
    start = load(saved["plain"]).model.state_dict()
    moved = {
        k
        for k, v in Encoder.load(result.checkpoint, device="cpu").model.state_dict().items()
        if not torch.equal(v, start[k])
    }
    assert moved
    assert all(name.startswith("modules_after.") for name in moved)


def test_pooler_is_set_aside_and_saved_unchanged(minilm, tmp_path):
    encoder = load(minilm)
    assert not [name for name in encoder.model.state_dict() if "pooler" in name]
    from safetensors.torch import load_file

    path = encoder.save(tmp_path / "saved")
    files = [load_file(next(Path(folder).glob("*.safetensors"))) for folder in (minilm, path)]
    assert torch.equal(files[0]["pooler.dense.weight"], files[1]["pooler.dense.weight"])


def test_weights_given_to_save_are_the_ones_written(saved, tmp_path):
    encoder = load(saved["plain"])
    other = {name: tensor * 1.5 for name, tensor in encoder.model.state_dict().items()}
    untouched = encoder.encode(TEXTS).dense
    (tmp_path / "out").mkdir()
    encoder.adapter.save(encoder.model, str(tmp_path / "out"), other)
    found = load(str(tmp_path / "out")).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in other.items())
    assert np.array_equal(encoder.encode(TEXTS).dense, untouched)


def test_changed_prompts_are_saved(saved, tmp_path):
    path = load(saved["plain"], query_instruction="seek: ").save(tmp_path / "out")
    assert library(str(path)).prompts["query"] == "seek: "
    assert Encoder.load(path).settings.query_instruction == "seek: "


def test_normalize_is_added_where_it_is_asked_for(saved, tmp_path):
    folder = Path(shutil.copytree(saved["plain"], tmp_path / "model"))
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([row for row in modules if "Normalize" not in row["type"]]))
    plain = load(str(folder))
    assert plain.settings.normalize is False
    unit = load(str(folder), options=LoadOptions(normalize=True))
    length = np.linalg.norm(plain.encode(TEXTS).dense, axis=1, keepdims=True)
    assert np.abs(plain.encode(TEXTS).dense / length - unit.encode(TEXTS).dense).max() < 1e-6
    path = unit.save(tmp_path / "out")
    assert np.abs(library(str(path)).encode(TEXTS) - unit.encode(TEXTS).dense).max() < 1e-5


def test_what_cannot_be_followed_is_refused(saved, tmp_path):
    with pytest.raises(UsageError, match=r"'sentence-transformers' cannot be right .* use the adapter 'bge'"):
        load(tiny_bert(tmp_path / "plain"))
    with pytest.raises(UsageError, match="sentence_pooling_method 'cls' cannot be set"):
        load(saved["plain"], options=LoadOptions(pooling="cls"))
    with pytest.raises(UsageError, match="normalize_embeddings False contradicts the module Normalize"):
        load(saved["plain"], options=LoadOptions(normalize=False))
    with pytest.raises(CheckpointError, match="has no head 'sparse': this model is dense"):
        load(saved["plain"], heads=["sparse"])
