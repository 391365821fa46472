"""causal-reranker on tiny copies of what is published, against sentence-transformers and transformers alone."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.adapters.test_reranker import ROWS
from ultrarag import Encoder
from ultrarag.claims import ModelFolder
from ultrarag.encoder import find_adapter
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.finetune import finetune
from ultrarag.finetune.__main__ import main
from ultrarag.packing import hidden_states
from ultrarag.testing import tiny
from ultrarag.testing.tiny_causal import LAYOUTS, tiny_causal_reranker
from ultrarag.types import Hit, Passage

NAME = "causal-reranker"
#: unlike lengths, Chinese, empty texts, spaces and line breaks at the seams, quotes, braces
PAIRS = [
    ("How do seals sleep?", "Seals sleep for minutes at a time while they sink slowly."),
    ("Why does bread need a hot oven?\n", "Seals sleep.\n"),
    ("怎样防止自行车链条生锈？", "骑车淋雨以后先擦干链条，再滴一点润滑油。"),
    ("a", ""),
    (" 'x' {{ y }} ", ' <b>"z"</b>  '),
    ("", ""),
]
TASK = "Find what answers the question."
#: what the layouts without templates read, from their model cards
PUBLISHED = {
    "qwen3": (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {task}\n'
        "<Query>: {query}\n",
        "<Document>: {passage}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "qwen2": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\ninstruction: {task}\nquery: {query}\n",
        "document: {passage}\nYou are a search relevance expert who evaluates how well documents match search queries. "
        "For each query-document pair, carefully analyze the semantic relationship between them, then provide your "
        "binary relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "zerank": (
        "<|im_start|>system\n{query}<|im_end|>\n",
        "<|im_start|>user\n{passage}<|im_end|>\n<|im_start|>assistant\n",
    ),
}
QUICK = {"adapter": NAME, "query_max_len": 32, "passage_max_len": 200, "learning_rate": 3e-3}
QUICK |= {"per_device_train_batch_size": 4, "train_group_size": 3, "max_steps": 2}
#: those that sentence-transformers reads as they are published
DECLARED = ["qwen3", "qwen3-classifier", "mxbai", "zerank"]
ORIGINAL = ["qwen3-original", "mxbai-original", "zerank-original"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("causal")
    for name in LAYOUTS:
        tiny_causal_reranker(root / name, name)
    return {name: root / name for name in LAYOUTS}


def load(path: Path, **settings) -> Encoder:
    return Encoder.load(path, adapter=NAME, device="cpu", **settings)


def library_scores(folder: Path, pairs=PAIRS, **options) -> np.ndarray:
    """What sentence-transformers gives: the score before its activation."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu")
    if length := options.pop("max_length", None):
        model.max_seq_length = length
    return model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False, **options)


def published_text(layout: str, query: str, passage: str, task: str) -> tuple[str, str]:
    kind = "zerank" if layout.startswith("zerank") else LAYOUTS[layout][0]
    if kind == "zerank":
        query, passage = query.strip(), passage.strip()
    return tuple(part.format(task=task, query=query, passage=passage) for part in PUBLISHED[kind])


def transformers_scores(folder: Path, layout: str, task: str = TASK, pairs=PAIRS) -> list[float]:
    """The model card's recipe: the text, the logits of the last token, yes less no."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    answers = [tokenizer.convert_tokens_to_ids(word) for word in LAYOUTS[layout][2]]
    found = []
    for pair in pairs:
        ids = tokenizer("".join(published_text(layout, *pair, task)), return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            logits = model(**ids).logits[0, -1, answers].tolist()
        found.append(logits[0] - sum(logits[1:]))
    return found


# ---- scores


@pytest.mark.parametrize("layout", DECLARED)
def test_scores_are_those_of_sentence_transformers(folders, layout):
    scores = load(folders[layout]).score(PAIRS)
    assert np.ptp(scores) > 0.1
    assert scores == pytest.approx(library_scores(folders[layout]), abs=1e-5)


@pytest.mark.parametrize("layout", ORIGINAL)
def test_scores_of_the_original_layout_follow_the_model_card(folders, layout):
    options = {} if layout.startswith("zerank") else {"instruction": TASK}
    scores = load(folders[layout]).score(PAIRS, **options)
    assert np.ptp(scores) > 0.1
    assert scores == pytest.approx(transformers_scores(folders[layout], layout), abs=1e-5)


def test_the_usual_instruction_of_the_original_layout(folders):
    usual = "Given a web search query, retrieve relevant passages that answer the query"
    scores = load(folders["qwen3-original"]).score(PAIRS)
    assert scores == pytest.approx(transformers_scores(folders["qwen3-original"], "qwen3-original", usual), abs=1e-5)


def test_a_classifier_without_files_reads_what_its_card_writes(folders):
    """sentence-transformers is given both sides of the written text, as the card of the converted model says."""
    written = [published_text("qwen3-classifier-original", *pair, TASK) for pair in PAIRS]
    scores = load(folders["qwen3-classifier-original"]).score(PAIRS, instruction=TASK)
    assert scores == pytest.approx(library_scores(folders["qwen3-classifier-original"], written), abs=1e-5)


def test_a_classifier_of_another_kind_is_run_as_it_is(tmp_path):
    """One that does not read its last token, whose chat template writes pairs."""
    tiny.tiny_cross_encoder(tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text(
        '<s>question: {{ (messages | selectattr("role", "eq", "query") | first).content }}</s>'
        'passage: {{ (messages | selectattr("role", "eq", "document") | first).content }}</s>'
    )
    scores = load(tmp_path / "other").score(PAIRS[:3])
    assert scores == pytest.approx(library_scores(tmp_path / "other", PAIRS[:3]), abs=1e-5)
    with pytest.raises(UsageError, match=r"'bge-reranker' cannot .* a causal reranker.*template writes the roles"):
        Encoder.load(tmp_path / "other", adapter="bge-reranker")


@pytest.mark.parametrize("layout", ["qwen3", "mxbai", "qwen3-classifier"])
def test_an_instruction_is_put_to_the_model(folders, layout):
    encoder = load(folders[layout])
    asked = encoder.score(PAIRS, instruction=TASK)
    assert np.abs(asked - encoder.score(PAIRS)).max() > 1e-2
    assert asked == pytest.approx(library_scores(folders[layout], prompt=TASK), abs=1e-5)
    set_up = load(folders[layout], prompt=TASK)
    assert set_up.score(PAIRS) == pytest.approx(asked, abs=1e-6)
    assert set_up.score(PAIRS, instruction="") == pytest.approx(encoder.score(PAIRS), abs=1e-6)


def test_a_model_without_a_place_for_an_instruction_says_so(folders):
    with pytest.raises(UsageError, match=r"has no place for an instruction, and one was given \('Find what"):
        load(folders["zerank"]).score(PAIRS, instruction=TASK)


def test_a_declared_default_prompt_is_the_instruction(folders, tmp_path):
    folder = shutil.copytree(folders["mxbai"], tmp_path / "asked")
    file = folder / "config_sentence_transformers.json"
    values = json.loads(file.read_text()) | {"prompts": {"web": TASK}, "default_prompt_name": "web"}
    file.write_text(json.dumps(values))
    encoder = load(folder)
    assert encoder.settings.prompt == TASK
    assert encoder.score(PAIRS) == pytest.approx(library_scores(folder), abs=1e-5)


def test_structured_messages(folders, tmp_path):
    """A template that wants lists of parts, as those of models for images do."""
    folder = shutil.copytree(folders["mxbai"], tmp_path / "structured")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace('map(attribute="content")', 'map(attribute="content.0.text")'))
    file = folder / "sentence_bert_config.json"
    file.write_text(file.read_text().replace('"flat"', '"structured"'))
    assert load(folder).score(PAIRS) == pytest.approx(load(folders["mxbai"]).score(PAIRS), abs=1e-6)
    assert load(folder).score(PAIRS) == pytest.approx(library_scores(folder), abs=1e-5)


def test_scores_depend_on_the_pair_alone(folders):
    encoder = load(folders["qwen3"])
    assert encoder.tokenizer.padding_side == "left"
    together = encoder.score(PAIRS)
    assert together == pytest.approx([encoder.score([pair])[0] for pair in PAIRS], abs=1e-5)
    features = encoder.features(encoder.tokenize_pairs(PAIRS))
    assert not features["attention_mask"][:, 0].all()
    with torch.no_grad():
        packed, padded = (hidden_states(encoder.model.backbone.base_model, features, on) for on in (True, False))
    keep = features["attention_mask"].bool()
    assert torch.allclose(packed[keep], padded[keep], atol=1e-5)
    assert not packed[~keep].any()  # nothing was computed there


# ---- lengths


@pytest.mark.parametrize("layout", DECLARED)
@pytest.mark.parametrize("passage", ["bread oven. " * 200, "water oven?\n" * 200, "骑车淋雨" * 200])
def test_of_a_long_pair_the_passage_is_cut(folders, layout, passage, caplog):
    """Equal to sentence-transformers, which restores what ends the pair."""
    encoder, pairs = load(folders[layout]), [("why water", passage), PAIRS[0]]
    ids = encoder.tokenize_pairs(pairs, max_length=150).ids
    assert len(ids[0]) == 150
    with caplog.at_level(logging.WARNING):
        scores = encoder.score(pairs, max_length=150)
    assert "1 of 2 pairs were longer than 150 tokens and were cut" in caplog.text
    assert scores == pytest.approx(library_scores(folders[layout], pairs, max_length=150), abs=1e-5)
    (ending,) = encoder.tokenizer(["x<|im_end|>\n<|im_start|>assistant\n"], add_special_tokens=False)["input_ids"]
    assert any(ids[0][n : n + len(ending) - 1] == ending[1:] for n in range(100, 150))


def test_limits_of_each_side(folders):
    encoder = load(folders["qwen3"])
    words = "seals sleep " * 40
    limits = {"query_max_length": 6, "max_length": 384, "passage_max_length": 9}
    (ids,) = encoder.model.pair_tokens([words], [words], **limits).ids
    query, passage = encoder.tokenizer.decode(ids).split("<Query>:")[1].split("\n<Document>:")
    assert len(encoder.tokenizer(query.strip())["input_ids"]) == 6
    # the first word of the passage is one token with the space before it, which is the template's
    assert len(encoder.tokenizer(passage.partition("<|im_end|>")[0])["input_ids"]) == 1 + 9
    tokens = encoder.model.pair_tokens(["a", words], ["b", "b"], **limits)
    assert tokens.truncated == 1
    with pytest.raises(UsageError, match=r"max_length is 40, and what the chat template of .* takes \d+ tokens"):
        encoder.score(PAIRS, max_length=40)


# ---- files


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_and_loaded_by_all(folders, layout, tmp_path):
    encoder = load(folders[layout])
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.mul_(1.01)
    wanted = encoder.score(PAIRS)
    saved = encoder.save(tmp_path / "saved")
    again = Encoder.load(saved, device="cpu")
    assert again.score(PAIRS) == pytest.approx(wanted, abs=1e-5)
    assert again.fingerprint == encoder.fingerprint
    if layout != "qwen3-classifier-original":
        assert library_scores(saved) == pytest.approx(wanted, abs=1e-5)
    if "classifier" not in layout:
        assert again.tokenizer.padding_side == "left"
    if layout in ORIGINAL:
        usual = "" if layout.startswith("zerank") else TASK
        asked = again.score(PAIRS, **({"instruction": TASK} if usual else {}))
        assert transformers_scores(saved, layout) == pytest.approx(asked, abs=1e-5)
    for file in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        if layout in DECLARED and (folders[layout] / file).is_file():
            assert json.loads((saved / file).read_text()) == json.loads((folders[layout] / file).read_text())


def test_instruction_and_length_that_were_set_are_what_others_read(folders, tmp_path):
    encoder = load(folders["qwen3"], prompt=TASK, passage_max_length=150)
    saved = encoder.save(tmp_path / "saved")
    pairs = [*PAIRS, ("why water", "bread oven. " * 200)]
    assert library_scores(saved, pairs) == pytest.approx(encoder.score(pairs), abs=1e-5)
    assert Encoder.load(saved, device="cpu").settings == encoder.settings


def test_a_transformer_in_a_folder_of_its_own(folders, tmp_path):
    folder = tmp_path / "nested"
    shutil.copytree(folders["qwen3"], folder / "0_Transformer")
    for name in ("modules.json", "1_LogitScore", "config_sentence_transformers.json"):
        shutil.move(folder / "0_Transformer" / name, folder / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    encoder = load(folder)
    assert encoder.score(PAIRS) == pytest.approx(load(folders["qwen3"]).score(PAIRS), abs=1e-6)
    assert library_scores(encoder.save(tmp_path / "saved")) == pytest.approx(encoder.score(PAIRS), abs=1e-5)


# ---- refusals


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_adapter_of_gemma_refuses_them(folders, layout):
    if layout.endswith("classifier-original"):  # nothing in its files says what it reads
        assert ModelFolder(folders[layout]).family.name == "cross-encoder"
        return
    with pytest.raises(UsageError, match=r"'bge-reranker-gemma' cannot be .* is a causal reranker.* 'causal-reranker'"):
        Encoder.load(folders[layout], adapter="bge-reranker-gemma")
    assert find_adapter(folders[layout]) == "causal-reranker"


def test_a_language_model_trained_as_gemma_stays_so(folders, tmp_path):
    folder = shutil.copytree(folders["qwen3-original"], tmp_path / "base")
    (folder / "README.md").unlink()
    encoder = Encoder.load(folder, adapter="bge-reranker-gemma", device="cpu", passage_max_length=384)
    saved = encoder.save(tmp_path / "saved")
    assert "pipeline_tag: text-ranking" in (saved / "README.md").read_text()
    assert Encoder.load(saved, device="cpu").score(PAIRS) == pytest.approx(encoder.score(PAIRS), abs=1e-5)


def test_other_models_are_refused_by_what_they_are(folders, tmp_path):
    tiny.tiny_bert(tmp_path / "bert")
    with pytest.raises(UsageError, match=r"'causal-reranker' cannot .* of sentence-transformers.* the adapter 'bge'"):
        load(tmp_path / "bert")
    tiny.tiny_yes_reranker(tmp_path / "gemma")
    with pytest.raises(UsageError, match=r"'causal-reranker' cannot be right .* a language model"):
        load(tmp_path / "gemma")
    folder = shutil.copytree(folders["qwen3"], tmp_path / "generic")
    shutil.copy(folders["qwen3-original"] / "chat_template.jinja", folder / "chat_template.jinja")
    with pytest.raises(CheckpointError, match=r"does not carry messages of the roles 'query' and 'document'"):
        load(folder)
    (folder / "chat_template.jinja").write_text(
        (folders["qwen3"] / "chat_template.jinja").read_text().replace("{{ query }}", "{{ query | replace('a', 'b') }}")
    )
    with pytest.raises(CheckpointError, match="changes the texts that it writes"):
        load(folder)
    (folder / "1_LogitScore" / "config.json").write_text('{"true_token_id": 99999}')
    shutil.copy(folders["qwen3"] / "chat_template.jinja", folder / "chat_template.jinja")
    with pytest.raises(CheckpointError, match=r"LogitScore names the tokens \[99999\] of a vocabulary of"):
        load(folder)


# ---- fine-tuning


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("qwen3", {}),
        ("mxbai", {"knowledge_distillation": True}),
        ("zerank", {"use_lora": True, "lora_rank": 4}),
        ("qwen3-classifier", {"use_lora": True, "lora_rank": 4, "knowledge_distillation": True}),
    ],
    ids=str,
)
def test_fine_tuning_is_what_sentence_transformers_reads(folders, layout, more, tmp_path):
    result = finetune(folders[layout], ROWS, tmp_path / "out", **QUICK, **more)
    encoder = Encoder.load(result.checkpoint, device="cpu")
    assert encoder.fingerprint == result.fingerprint
    scores = encoder.score(PAIRS)
    assert np.abs(scores - load(folders[layout]).score(PAIRS)).max() > 1e-3
    assert scores == pytest.approx(library_scores(result.checkpoint), abs=1e-5)


def test_rows_and_run_have_their_own_instruction(folders, tmp_path, monkeypatch):
    from ultrarag.adapters.causal_reranker_model import CausalReranker

    seen = []
    original = CausalReranker.pair_tokens

    def spy(self, queries, *args, **options):
        seen.append((list(queries), options.get("prompts"), self.settings.prompt))
        return original(self, queries, *args, **options)

    monkeypatch.setattr(CausalReranker, "pair_tokens", spy)
    rows = [{**row, "prompt": f"{number}?"} if number % 2 else row for number, row in enumerate(ROWS)]
    result = finetune(folders["qwen3"], rows, tmp_path / "out", prompt=TASK, **QUICK)
    by_query = {row["query"]: row.get("prompt") for row in rows}
    trained = [(queries, prompts, usual) for queries, prompts, usual in seen if prompts]
    assert trained
    for queries, prompts, usual in trained:
        assert prompts == [by_query[query] for query in queries]
        assert usual == TASK
    encoder = Encoder.load(result.checkpoint, device="cpu")
    assert encoder.settings.prompt == TASK
    assert library_scores(result.checkpoint) == pytest.approx(encoder.score(PAIRS), abs=1e-5)


def test_one_command_trains_it(folders, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    words = ["--model_name_or_path", str(folders["qwen3-original"]), "--train_data", str(data), "--adapter", NAME]
    words += ["--output_dir", str(tmp_path / "out"), "--train_group_size", "3", "--max_len", "256", "--max_steps", "2"]
    words += ["--learning_rate", "3e-3", "--per_device_train_batch_size", "4", "--prompt", TASK]
    assert main(words) == 0
    encoder = Encoder.load(tmp_path / "out", device="cpu")
    assert library_scores(tmp_path / "out") == pytest.approx(encoder.score(PAIRS), abs=1e-5)


def test_the_flag_for_the_instruction_is_for_rerankers(folders, tmp_path):
    with pytest.raises(UsageError, match="--prompt is for rerankers"):
        finetune(folders["qwen3"], ROWS, tmp_path / "out", adapter="bge", prompt=TASK)


# ---- search


def test_it_reranks_hits(folders):
    from ultrarag.retrieve import rerank

    encoder = load(folders["qwen3"])
    hits = [Hit(str(n), 1.0, Passage(str(n), passage)) for n, (_, passage) in enumerate(PAIRS)]
    found = rerank(encoder, "seals", hits, instruction=TASK)
    scores = encoder.score([("seals", passage) for _, passage in PAIRS], instruction=TASK)
    assert [hit.score for hit in found] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
