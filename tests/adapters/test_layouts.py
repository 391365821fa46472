"""What a checkpoint declares, in the published layouts: it is read as sentence-transformers reads it, and kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.finetune.test_run import QUICK, ROWS
from ultrarag import Encoder
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.finetune import finetune
from ultrarag.hookspecs import LoadOptions
from ultrarag.testing.layouts import LAYOUTS, write_layout
from ultrarag.testing.tiny import TEXTS, tiny_cross_encoder
from ultrarag.types import EncoderSettings, Passage

#: Both adapters that run these files.
ADAPTERS = ["bge", "sentence-transformers"]
RUN = {**QUICK, "train_group_size": 2, "max_steps": 2}
TEXT = list(TEXTS[:4])


def library(folder: Path | str):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def make(folder: Path, name: str, **changes) -> Path:
    write_layout(folder, replace(LAYOUTS[name], **changes))
    return folder


def load(folder: Path | str, adapter: str | None = "bge", **settings) -> Encoder:
    return Encoder.load(folder, adapter, device="cpu", **settings)


def off(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")


# ---- prompts


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("prompts", "default", "query", "passage"),
    [
        ({"query": "", "document": ""}, "query", "", ""),
        ({"query": "q: ", "passage": ""}, "query", "q: ", ""),
        ({"query": "", "document": "d: "}, "document", "", "d: "),
        ({"query": "q: ", "document": "d: ", "passage": "p: "}, None, "q: ", "d: "),
        ({"passage": "p: ", "corpus": "c: "}, None, "", "p: "),
        ({"web_search_query": "w: ", "sts": "s: "}, "web_search_query", "w: ", ""),
    ],
)
def test_prompts_are_those_of_the_library(tmp_path, adapter, prompts, default, query, passage):
    folder = make(tmp_path / "m", "MiniLM", prompts=prompts, default_prompt=default)
    encoder, theirs = load(folder, adapter), library(folder)
    assert (encoder.settings.query_instruction, encoder.settings.passage_instruction) == (query, passage)
    named = default if "query" not in prompts else "query"
    assert off(encoder.encode(TEXT, "query").dense, theirs.encode(TEXT, prompt_name=named)) < 1e-5
    if "document" in prompts or "passage" not in prompts:  # a passage prompt alone the library does not look at
        assert off(encoder.encode(TEXT, "passage").dense, theirs.encode_document(TEXT)) < 1e-5


@pytest.mark.parametrize(
    ("name", "adapter"), [("EmbeddingGemma", "bge"), ("harrier-oss", "icl"), ("jina-v3", "sentence-transformers")]
)
def test_a_fine_tune_keeps_what_the_checkpoint_declares(tmp_path, adapter, name):
    folder = make(tmp_path / "m", name, truncate_dim=16)
    result = finetune(str(folder), ROWS, tmp_path / "out", adapter=adapter, **RUN)
    before, after = library(folder), library(result.checkpoint)
    assert after.prompts.items() >= LAYOUTS[name].prompts.items()
    assert after.default_prompt_name == before.default_prompt_name == LAYOUTS[name].default_prompt
    assert (after.truncate_dim, after.similarity_fn_name) == (16, "cosine")
    encoder = load(result.checkpoint, None)
    assert encoder.dim == 16
    theirs = after.encode(TEXT, prompt_name=after.default_prompt_name or "query", normalize_embeddings=True)
    assert off(encoder.encode(TEXT, "query").dense, theirs) < 1e-5


def test_another_prompt_for_queries_is_the_one_that_is_saved(tmp_path):
    folder = make(tmp_path / "m", "e5")
    saved = load(folder, passage_instruction="text: ", query_instruction="find: ").save(tmp_path / "saved")
    wanted = {"query": "find: ", "document": "text: ", "passage": "text: "}
    assert library(saved).prompts == wanted
    assert load(saved, None).settings.prompts == LAYOUTS["e5"].prompts  # as first declared; the manifest has the rest
    assert load(saved, None).settings.passage_instruction == "text: "


def test_what_is_kept_for_other_tools_is_no_part_of_the_identity(tmp_path):
    plain = load(make(tmp_path / "a", "MiniLM", prompts={"query": "", "document": ""}))
    named = load(make(tmp_path / "b", "MiniLM", prompts={"query": "", "STS": "sts: "}, default_prompt="query"))
    cut = load(make(tmp_path / "c", "MiniLM", truncate_dim=8))
    assert plain.fingerprint == named.fingerprint != cut.fingerprint


# ---- dimensions and lengths


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["MiniLM", "EmbeddingGemma", "multi-qa-dot"])
def test_vectors_are_truncated_as_declared(tmp_path, adapter, name):
    folder = make(tmp_path / "m", name, truncate_dim=12)
    encoder, theirs = load(folder, adapter), library(folder)
    unit = LAYOUTS[name].normalize  # searched by dot product, so that they have unit length again
    wanted = theirs.encode_document(TEXT, normalize_embeddings=unit)
    assert off(encoder.encode(TEXT).dense, wanted) < 1e-5
    assert off(load(folder, adapter, truncate_dim=7).encode(TEXT).dense, wanted[:, :7]) < (2 if unit else 1e-5)
    with pytest.raises(UsageError, match="truncate_dim is 99, but the vectors have 32 dimensions"):
        load(folder, adapter, truncate_dim=99).encode(TEXT)


@pytest.mark.parametrize("cut", [0, True, "many"])
def test_a_truncation_to_nothing_is_refused(tmp_path, cut):
    with pytest.raises(CheckpointError, match=r"config_sentence_transformers.json: truncate_dim is .* a whole number"):
        load(make(tmp_path / "m", "MiniLM", truncate_dim=cut))


@pytest.mark.parametrize(
    ("adapter", "changes", "asked", "unit"),
    [
        ("bge", {}, {}, False),
        ("sentence-transformers", {}, {}, False),
        ("bge", {}, {"normalize_embeddings": True}, True),
        ("sentence-transformers", {"similarity": "cosine"}, {}, True),
        ("bge", {"similarity": None}, {}, True),
    ],
)
def test_vectors_compared_by_dot_product_keep_their_length(tmp_path, capsys, adapter, changes, asked, unit):
    folder = make(tmp_path / "m", "multi-qa-dot", **changes)
    result = finetune(str(folder), ROWS, tmp_path / "out", adapter=adapter, **{**RUN, "temperature": 1.0}, **asked)
    encoder = load(result.checkpoint, None)
    lengths = np.linalg.norm(encoder.encode(TEXT).dense, axis=1)
    assert bool(np.allclose(lengths, 1, atol=1e-5)) is unit
    assert ("compares vectors by dot product" in capsys.readouterr().err) is not (unit or bool(asked))
    assert library(result.checkpoint).similarity_fn_name == (changes.get("similarity", "dot") or "cosine")


# ---- causal models


@pytest.mark.parametrize("body", ["Qwen3", "Mistral", "Gemma"])
def test_a_causal_model_without_modules_pools_the_last_token(tmp_path, body):
    more = {"num_key_value_heads": 1, "head_dim": 8}
    folder = make(tmp_path / "m", "Qwen3 without modules.json", body=body, config=more, architecture="")
    encoder = load(folder)
    assert encoder.settings.pooling == "last_token"
    ids = torch.tensor(encoder.tokenize(TEXT[:1], "passage").ids)
    with torch.no_grad():
        hidden = encoder.model.backbone(input_ids=ids).last_hidden_state[0, -1]
    assert off(encoder.encode(TEXT[:1]).dense[0], (hidden / hidden.norm()).numpy()) < 1e-5
    assert load(encoder.save(tmp_path / "saved"), None).settings.pooling == "last_token"
    with pytest.raises(CheckpointError, match=r"pooling 'cls' takes the first token, and this \w+ is causal"):
        load(folder, options=LoadOptions(pooling="cls"))


@pytest.mark.parametrize("adapter", [*ADAPTERS, "icl"])
def test_a_causal_model_that_declares_cls_is_refused(tmp_path, adapter):
    folder = make(tmp_path / "m", "Qwen3-Embedding", pooling="cls")
    with pytest.raises(CheckpointError, match="is causal: its first token sees no other"):
        load(folder, adapter)


@pytest.mark.parametrize(("name", "pooling"), [("KaLM", "mean"), ("bge", "cls"), ("EmbeddingGemma", "cls")])
def test_models_that_look_both_ways_may_pool_the_first_token(tmp_path, name, pooling):
    assert load(make(tmp_path / "m", name, pooling="")).settings.pooling == pooling
    assert load(make(tmp_path / "n", name, pooling="cls")).settings.pooling == "cls"


@pytest.mark.parametrize(
    ("name", "query"),
    [("Qwen3-Embedding", "\nQuery:why?"), ("harrier-oss", "\nQuery: why?"), ("KaLM", "\nQuery: why?")],
)
def test_icl_reads_queries_and_ends_texts_as_the_library_does(tmp_path, name, query):
    folder = make(tmp_path / "m", name)
    encoder, theirs = load(folder, "icl"), library(folder)
    assert encoder.settings.render("why?", "query").endswith(query)
    assert encoder.settings.render("why?", "query", "Other.") == f"Instruct: Other.{query}"
    names = {"prompt_name": LAYOUTS[name].default_prompt or "query"}
    assert off(encoder.encode(TEXT, "query").dense, theirs.encode(TEXT, **names)) < 1e-5
    assert off(encoder.encode(TEXT).dense, theirs.encode_document(TEXT)) < 1e-5
    saved = encoder.save(tmp_path / "saved")
    assert off(library(saved).encode_query(TEXT), encoder.encode(TEXT, "query").dense) < 1e-5
    assert load(saved, None).tokenizer("ab")["input_ids"] == theirs.tokenizer("ab")["input_ids"]


# ---- padding, vocabulary, and models for other adapters


@pytest.mark.parametrize(("name", "adapter"), [("bge", "bge"), ("bge", ADAPTERS[1]), ("max pooling", ADAPTERS[1])])
def test_padding_on_the_left_changes_no_vector(tmp_path, name, adapter):
    encoder = load(make(tmp_path / "m", name), adapter)
    wanted = np.concatenate([encoder.encode([text]).dense for text in TEXTS])
    encoder.tokenizer.padding_side = "left"
    assert off(encoder.encode(TEXTS).dense, wanted) < 1e-5


def test_padding_on_the_left_changes_no_score(tmp_path):
    tiny_cross_encoder(tmp_path / "m")
    encoder = load(tmp_path / "m", "bge-reranker")
    pairs = [(TEXTS[0], text) for text in TEXTS]
    wanted = [encoder.score([pair])[0] for pair in pairs]
    encoder.tokenizer.padding_side = "left"
    assert np.allclose(encoder.score(pairs), wanted, atol=1e-5)


@pytest.mark.parametrize(("name", "adapter"), [("MiniLM", "bge"), ("e5", ADAPTERS[1]), ("Qwen3-Embedding", "icl")])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, name, adapter):
    from transformers import AutoTokenizer

    folder = make(tmp_path / "m", name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["seal-language"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"1 token\(s\) without .*, first 'seal-language' with number {rows}"):
        load(folder, adapter)


def test_a_token_for_images_needs_no_row(tmp_path):
    """EmbeddingGemma's tokenizer has one, its embeddings have no row for it."""
    folder = make(tmp_path / "m", "EmbeddingGemma")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    number = len(values["model"]["vocab"])
    token = {"id": number, "content": "<image_soft_token>", "special": True}
    same = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    path.write_text(json.dumps({**values, "added_tokens": [*values["added_tokens"], {**token, **same}]}))
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "image_token": "<image_soft_token>"}))
    encoder = load(folder)
    assert len(encoder.tokenizer) == number + 1
    assert off(encoder.encode(TEXT).dense, library(folder).encode_document(TEXT)) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("sentence-t5", {}, "over an encoder with a decoder"),
        ("max pooling", {}, "pooling max is not one"),
        ("MiniLM", {"pooling": "mean_sqrt_len_tokens"}, "pooling mean_sqrt_len_tokens is not one"),
        ("MiniLM", {"pooling": ["cls", "mean"]}, "pooling cls and mean is not one"),
    ],
)
def test_bge_names_the_adapter_for_what_it_cannot_run(tmp_path, name, changes, words):
    folder = make(tmp_path / "m", name, **changes)
    with pytest.raises(UsageError, match=f"{words}.*use the adapter 'sentence-transformers'"):
        load(folder)
    assert off(load(folder, ADAPTERS[1]).encode(TEXT).dense, library(folder).encode_document(TEXT)) < 1e-5


def test_a_t5_without_modules_is_told_how_to_get_them(tmp_path):
    folder = make(tmp_path / "m", "sentence-t5", pooling="", dense=())
    with pytest.raises(UsageError, match=r"saved by sentence-transformers: .*save_pretrained\(folder\)"):
        load(folder)


# ---- titles

PROMPT = "title: none | text: "


@pytest.mark.parametrize(
    ("title", "text", "prompt", "wanted"),
    [
        ("Seals", "They sleep.", PROMPT, "title: Seals | text: They sleep."),
        ("", "Two\nlines.", PROMPT, "title: none | text: Two\nlines."),
        (" ", "They sleep.", PROMPT, "title: none | text:  \nThey sleep."),
        ("Seals", "They sleep.", "passage: ", "passage: Seals\nThey sleep."),
        ("{}", "{0}", PROMPT, "title: {} | text: {0}"),
    ],
)
def test_a_title_stands_where_the_prompt_has_a_place_for_it(title, text, prompt, wanted):
    settings = EncoderSettings(passage_instruction=prompt)
    assert settings.render(Passage("1", text, title), "passage") == wanted
    assert settings.render(Passage("1", text, title), "query") == (f"{title}\n{text}" if title else text)


def test_an_index_encodes_titles_as_the_model_wants_them(tmp_path):
    from ultrarag.retrieve import LiveIndex

    folder = make(tmp_path / "m", "EmbeddingGemma")
    passages = [Passage("1", "They sleep under water.", "Seals"), Passage("2", "It rises in a hot oven.")]
    rendered = ["title: Seals | text: They sleep under water.", "title: none | text: It rises in a hot oven."]
    vectors = library(folder).encode(rendered, prompt="")
    query = library(folder).encode_query(["seals"])
    with LiveIndex.create(tmp_path / "index", load(folder)) as index:
        index.add(passages)
        hits = index.search("seals", weights={"dense": 1.0})
    found = {hit.id: hit.scores["dense"] for hit in hits}
    wanted = query @ vectors.T
    assert found == pytest.approx({"1": wanted[0, 0], "2": wanted[0, 1]}, abs=1e-5)
