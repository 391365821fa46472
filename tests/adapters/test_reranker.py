"""bge-reranker: pairs, scores and segments as everybody else has them, and fine-tuning whole."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import forked, golden
from ultrarag import Encoder
from ultrarag.adapters.reranker_model import load_cross_encoder
from ultrarag.checkpoint.manifest import read_manifest
from ultrarag.errors import CheckpointError, DataError, PluginError, UsageError
from ultrarag.finetune import finetune
from ultrarag.finetune.__main__ import main
from ultrarag.finetune.batches import PairLengths
from ultrarag.finetune.flags.groups import DataArguments
from ultrarag.hookspecs import LoadOptions
from ultrarag.plugins import registry
from ultrarag.testing import tiny

PAIRS = [
    ("How do seals sleep?", "Seals sleep for minutes at a time while they sink slowly."),
    ("Why does bread need a hot oven?", "Seals sleep."),
    ("怎样防止自行车链条生锈？", "骑车淋雨以后先擦干链条，再滴一点润滑油。"),
    ("a", ""),
    ("water", "the water in the dough " * 3),
]
WORDS = ["bread", "oven", "water", "seals", "sleep", "dough", "steam", "slowly", "sink", "hot", "time", "stores"]
ROWS = [
    {
        "query": f"why {word}",
        "pos": [f"embeddings the {word} rises"],
        "neg": [f"the {WORDS[(i + 1) % 12]} rises", f"the {word} minutes at a time"],
        "pos_scores": [3.0],
        "neg_scores": [0.5, -1.0],
    }
    for i, word in enumerate(WORDS)
]
QUICK = {"query_max_len": 16, "passage_max_len": 24, "learning_rate": 3e-3, "per_device_train_batch_size": 4}
QUICK |= {"adapter": "bge-reranker", "train_group_size": 3}
BATCH = ["--per_device_train_batch_size"]
VISIBLE = pytest.mark.skipif(not golden.VISIBLE_SET.present(), reason=golden.WHY_SKIPPED)


@pytest.fixture(scope="module")
def xlmr(tmp_path_factory) -> Path:
    """A tiny XLM-RoBERTa with a head of one output, as bge-reranker has."""
    folder = tmp_path_factory.mktemp("xlmr")
    tiny.tiny_cross_encoder(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # runs are compared exactly
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def plain_bert(tmp_path_factory) -> Path:
    """A tiny BERT, with two segments and without a head."""
    folder = tmp_path_factory.mktemp("bert")
    tiny.tiny_bert(folder)
    file = folder / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]  # as published BERT tokenizers have them
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": names}))
    return folder


@pytest.fixture(scope="module")
def bert(plain_bert, tmp_path_factory) -> Path:
    """The same with a fresh head, saved."""
    torch.manual_seed(5)
    model = load_cross_encoder(str(plain_bert), LoadOptions(training=True))
    torch.nn.init.normal_(model.backbone.classifier.weight)  # the usual 0.02 gives all pairs nearly one score
    encoder = Encoder(registry().adapter("bge-reranker"), model, model.settings, device="cpu")
    return encoder.save(tmp_path_factory.mktemp("saved") / "bert")


@pytest.fixture
def encoder(xlmr):
    return Encoder.load(xlmr, adapter="bge-reranker", device="cpu")


# ---- pairs and scores, against others


def golden_encoder() -> Encoder:
    model = load_cross_encoder(str(golden.VISIBLE_SET.model), LoadOptions(training=True))
    head = golden.arrays(golden.VISIBLE_SET.data / "inputs.npz")
    prefix = "head/reranker/"
    weights = {key.removeprefix(prefix): torch.tensor(head[key]) for key in head if key.startswith(prefix)}
    model.backbone.classifier.load_state_dict(weights)
    return Encoder(registry().adapter("bge-reranker"), model, model.settings, device="cpu")


@VISIBLE
def test_golden_reranker_scores():
    """The peer's own scores, with pair ids as transformers 4.57.6 makes them."""
    values = golden.read(golden.VISIBLE_SET.data / "inference.json")["reranker"]
    pairs = [tuple(pair) for pair in values["pairs"]]
    limits = {"max_length": values["max_length"], "query_max_length": values["query_max_length"]}
    encoder = golden_encoder()
    assert np.abs(encoder.score(pairs, **limits) - values["raw"]).max() < 1e-5
    assert np.abs(encoder.score(pairs, normalize=True, **limits) - values["normalized"]).max() < 1e-5


@VISIBLE
@pytest.mark.parametrize("name", ["b4g1", "b4g2", "b4g4"])
def test_golden_pair_ids_of_training(name):
    """What the peer's data set makes of the same texts and lengths, long queries and passages included."""
    batch = golden.read(golden.VISIBLE_SET.data / "losses.json")["batches"][name]
    arrays = golden.arrays(golden.VISIBLE_SET.data / "inputs.npz")
    ids, mask = (arrays[f"batch/{name}/pair/{key}"] for key in ("input_ids", "attention_mask"))
    expected = [row[keep > 0].tolist() for row, keep in zip(ids, mask, strict=True)]
    lengths = PairLengths.of(
        DataArguments(train_data=[{}], query_max_len=batch["query_max_len"], passage_max_len=batch["passage_max_len"])
    )
    queries = [query for query in batch["queries"] for _ in range(batch["G"])]
    model = golden_encoder().model
    found = model.pair_tokens(queries, batch["passages"], lengths.query, lengths.pair, lengths.passage)
    assert found.ids == expected
    assert found.types is None  # XLM-RoBERTa knows one segment


@pytest.mark.parametrize("name", ["xlmr", "bert"])
def test_sentence_transformers_gives_the_same_scores(name, request, tmp_path):
    from sentence_transformers import CrossEncoder

    ours = Encoder.load(request.getfixturevalue(name), adapter="bge-reranker", device="cpu")
    theirs = CrossEncoder(str(ours.save(tmp_path / "saved")), device="cpu")
    raw = theirs.predict(PAIRS, activation_fn=torch.nn.Identity())
    assert np.ptp(raw) > 0.01
    assert np.abs(ours.score(PAIRS) - raw).max() < 1e-5
    assert (
        np.abs(ours.score(PAIRS, normalize=True) - theirs.predict(PAIRS, activation_fn=torch.nn.Sigmoid())).max() < 1e-5
    )


@pytest.mark.skipif(not os.environ.get("ULTRARAG_PEER_PYTHON"), reason="set ULTRARAG_PEER_PYTHON to the peer's python")
def test_peer_gives_the_same_scores(tiny_m3, tmp_path):
    """FlagEmbedding's FlagReranker, in its own environment (benchmarks/peer/README.md makes it)."""
    model = load_cross_encoder(tiny_m3, LoadOptions(training=True))
    torch.nn.init.normal_(model.backbone.classifier.out_proj.weight)
    encoder = Encoder(registry().adapter("bge-reranker"), model, model.settings, device="cpu")
    script = Path(__file__).parents[2] / "benchmarks" / "peer" / "score_pairs.py"
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    saved, output = encoder.save(tmp_path / "saved"), tmp_path / "out.json"
    command = [os.environ["ULTRARAG_PEER_PYTHON"], script, saved, tmp_path / "pairs.json", output, "--max-length", 40]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run([*map(str, command)], check=True, env=environment, capture_output=True)
    assert np.abs(encoder.score(PAIRS, max_length=40) - json.loads(output.read_text())).max() < 1e-5


def test_segments_are_those_of_the_tokenizer(bert):
    encoder = Encoder.load(bert)
    tokens = encoder.tokenize_pairs(PAIRS)
    expected = encoder.tokenizer(*map(list, zip(*PAIRS, strict=True)))
    assert tokens.ids == expected["input_ids"]
    assert tokens.types == expected["token_type_ids"]
    features = encoder.features(tokens, [0, 1])
    assert features["token_type_ids"].shape == features["input_ids"].shape
    swapped = {**features, "token_type_ids": 1 - features["token_type_ids"]}
    scores = [encoder.adapter.encode(encoder.model, f).scores for f in (features, swapped)]
    assert not torch.allclose(*scores)  # they reach the model


def test_passage_is_cut_and_the_query_at_three_quarters(encoder, caplog):
    long = "bread oven water seals sleep dough steam " * 5
    tokens = encoder.tokenize_pairs([(long, long), ("why bread", long), (long, "bread")], max_length=32)
    separator = encoder.tokenizer.sep_token_id
    assert [len(ids) for ids in tokens.ids] == [32, 32, 4 + 24 + 1]
    assert [ids.index(separator) - 1 for ids in tokens.ids] == [24, 2, 24]
    assert tokens.truncated == 3
    with caplog.at_level(logging.WARNING, "ultrarag"):
        encoder.score([("why", long), ("why", "bread")], max_length=32)
    assert "1 of 2 pairs were longer than 32 tokens and were cut" in caplog.text
    with pytest.raises(UsageError, match="a query of 32 tokens of a pair's 32 leaves nothing for the passage"):
        encoder.score(PAIRS, max_length=32, query_max_length=32)


def test_scores_depend_on_the_pair_alone(encoder):
    together = encoder.score(PAIRS)
    alone = [encoder.score([pair])[0] for pair in PAIRS]
    pieces = encoder.score(PAIRS, chunk_pairs=2, batch_tokens=1)
    assert together == pytest.approx(alone, abs=1e-5)
    assert pieces == pytest.approx(together, abs=1e-5)
    assert encoder.score([]).shape == (0,)


def test_instructions_are_rendered(xlmr, encoder):
    prompted = Encoder.load(xlmr, adapter="bge-reranker", query_instruction="find: ", passage_instruction="text: ")
    expected = encoder.score([(f"find: {query}", f"text: {passage}") for query, passage in PAIRS])
    assert np.array_equal(prompted.score(PAIRS), expected)


def test_a_cross_encoder_gives_no_vectors(encoder, minilm_encoder):
    with pytest.raises(UsageError, match=r"adapter 'bge-reranker' .* reads \(query, passage\) pairs.*encoder.score"):
        encoder.encode(["a text"])
    with pytest.raises(UsageError, match="leave `weights` out"):
        encoder.score(PAIRS, weights={"dense": 1})
    with pytest.raises(UsageError, match="normalize is for cross-encoders"):
        minilm_encoder.score(PAIRS, normalize=True)
    with pytest.raises(UsageError, match=r"pairs\[1\] is no \(query, passage\) pair: 'ab'"):
        encoder.score([("a", "b"), "ab"])
    with pytest.raises(UsageError, match=r"texts\[0\] is NoneType, not a string"):
        encoder.score([("a", None)])
    assert encoder.dim is None


def test_a_model_must_say_how_it_reads_pairs(xlmr, encoder, monkeypatch):
    monkeypatch.delattr(type(encoder.model), "pair_tokens")
    with pytest.raises(PluginError, match=r"declares pair_input, but the model .* has no method pair_tokens"):
        encoder.score(PAIRS)


def test_save_and_load(encoder, tmp_path):
    saved = encoder.save(tmp_path / "saved")
    again = Encoder.load(saved)
    assert again.fingerprint == encoder.fingerprint == again.manifest.fingerprint
    assert np.abs(again.score(PAIRS) - encoder.score(PAIRS)).max() < 1e-6
    card = (saved / "README.md").read_text()
    assert "encoder.score" in card
    assert "pipeline_tag: text-ranking" in card


def test_an_encoder_is_no_reranker_until_it_is_trained(plain_bert, tiny_m3):
    with pytest.raises(CheckpointError, match=r"has no classification head \('classifier.bias'\).*bge_reranker"):
        Encoder.load(plain_bert, adapter="bge-reranker")
    with pytest.raises(CheckpointError, match="has no classification head"):
        Encoder.load(tiny_m3, adapter="bge-reranker")


def test_several_labels_are_refused(xlmr, tmp_path):
    values = json.loads((xlmr / "config.json").read_text())
    labels = {"id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0, "B": 1}}
    (tmp_path / "config.json").write_text(json.dumps({**values, **labels}))
    with pytest.raises(CheckpointError, match="classifies into 2 labels; a reranker has one"):
        load_cross_encoder(str(tmp_path), LoadOptions())


# ---- fine-tuning


def test_a_plain_encoder_becomes_a_reranker(plain_bert, tmp_path):
    options = {"num_train_epochs": 12, "eval_data": ROWS, "eval_strategy": "epoch", "seed": 3}
    result = finetune(plain_bert, ROWS, tmp_path / "out", **{**QUICK, **options})
    assert result.metrics["after"]["nDCG@10"] > result.metrics["before"]["nDCG@10"]
    assert result.metrics["after"]["MRR@10"] > 0.9
    encoder = Encoder.load(result.checkpoint)
    assert encoder.adapter.name == "bge-reranker"
    assert encoder.fingerprint == result.fingerprint
    scores = encoder.score([(row["query"], text) for row in ROWS for text in (*row["pos"], *row["neg"])])
    assert (scores.reshape(-1, 3).argmax(1) == 0).mean() > 0.9
    assert encoder.manifest.training.metrics == result.metrics


def test_golden_lengths_old_and_new():
    rows = {"train_data": [{}]}
    assert PairLengths.of(DataArguments(**rows)) == PairLengths(32 + 32, 128 + 16, 160)
    assert PairLengths.of(DataArguments(**rows, max_len=512)) == PairLengths(384, None, 512)


def test_command_line_of_the_peer(xlmr, tmp_path, capsys):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = f"--model_name_or_path {xlmr} --train_data {data} --cache_path {tmp_path / 'cache'} --train_group_size 3"
    words += f" --output_dir {tmp_path / 'out'} --overwrite_output_dir --learning_rate 1e-3 --num_train_epochs 1"
    words += " --per_device_train_batch_size 4 --dataloader_drop_last True --warmup_ratio 0.1 --weight_decay 0.01"
    words += " --max_len 48 --knowledge_distillation True --gradient_checkpointing --pad_to_multiple_of 8 --max_steps 2"
    words += " --query_instruction_for_rerank why --passage_instruction_for_rerank text --sub_batch_size 5"
    words = [*words.split(), "--query_instruction_format", "{}: {}", "--sep_token", r"\n"]
    assert main(words, adapter="bge-reranker") == 0
    captured = capsys.readouterr()
    assert "max_len 48: pairs of at most so many tokens, queries of 36" in captured.err
    assert "sep_token has no effect" in captured.err
    encoder = Encoder.load(tmp_path / "out")
    assert encoder.settings.query_instruction == "why"
    assert encoder.settings.query_format == "{}: {}"
    assert encoder.settings.separator is None


def weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def test_gradcache_gives_the_same_weights(xlmr, tmp_path):
    options = {**QUICK, "optim": "sgd", "max_steps": 2, "max_grad_norm": 0, "knowledge_distillation": True}
    found = []
    for name, more in {"whole": {}, "pieces": {"sub_batch_size": 5}}.items():
        finetune(xlmr, ROWS, tmp_path / name, **{**options, **more})
        found.append(weights(tmp_path / name))
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], rtol=0, atol=1e-6), name


def test_teacher_changes_what_is_learned(xlmr, tmp_path):
    options = {**QUICK, "max_steps": 1}
    plain = finetune(xlmr, ROWS, tmp_path / "plain", **options)
    taught = finetune(xlmr, ROWS, tmp_path / "taught", knowledge_distillation=True, **options)
    assert plain.fingerprint != taught.fingerprint


def test_a_stopped_run_goes_on_exactly(xlmr, tmp_path):
    options = {**QUICK, "num_train_epochs": 2, "save_steps": 2}
    whole = finetune(xlmr, ROWS, tmp_path / "whole", **options)
    first = tmp_path / "whole" / "checkpoint-2"
    resumed = finetune(xlmr, ROWS, tmp_path / "resumed", resume_from_checkpoint=str(first), **options)
    assert resumed.fingerprint == whole.fingerprint


def test_fixed_encoder_trains_the_head_alone(xlmr, tmp_path):
    result = finetune(xlmr, ROWS, tmp_path / "out", fix_encoder=True, max_steps=1, **QUICK)
    before, after = weights(xlmr), weights(result.checkpoint)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier"}


def test_fresh_head_is_a_function_of_the_seed(plain_bert, tmp_path):
    options = {**QUICK, "max_steps": 1}
    first, again, other = (
        finetune(plain_bert, ROWS, tmp_path / str(n), **options, seed=seed) for n, seed in enumerate((1, 1, 2))
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"negatives_cross_device": True}, UsageError, "--negatives_cross_device does not suit a cross-encoder"),
        ({"sentence_pooling_method": "cls"}, UsageError, "--sentence_pooling_method does not suit"),
        ({"kd_loss_type": "m3_kd_loss"}, UsageError, "--kd_loss_type does not suit a cross-encoder"),
        ({"train_group_size": 1}, DataError, "a cross-encoder compares a query's positive with its own negatives"),
        ({"max_len": 9999}, UsageError, "9999 tokens was asked for, but the model takes at most"),
        ({"eval_data": [{"query": "q", "pos": ["p"]}]}, DataError, "eval_data has no query with 'neg'"),
    ],
)
def test_what_a_cross_encoder_cannot_do(xlmr, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        finetune(xlmr, ROWS, tmp_path / "out", **{**QUICK, "max_steps": 1, **options})


def test_beir_folder_and_embedder_flags_are_refused(xlmr, tiny_m3, tmp_path):
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(UsageError, match="a cross-encoder orders candidates that a search has found"):
        finetune(xlmr, ROWS, tmp_path / "out", eval_data=str(tmp_path), max_steps=1, **QUICK)
    with pytest.raises(UsageError, match="--max_len is for rerankers, and 'bge' encodes"):
        finetune(tiny_m3, ROWS, tmp_path / "out", **{**QUICK, "adapter": "bge"}, max_len=40)


def test_two_processes_give_the_weights_and_metrics_of_one(xlmr, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = f"--model_name_or_path {xlmr} --train_data {data} --eval_data {data} --cache_path {tmp_path / 'cache'}"
    flags += " --train_group_size 3 --query_max_len 16 --passage_max_len 24 --learning_rate 1e-2 --optim sgd"
    flags += " --max_grad_norm 0 --max_steps 2 --json"
    assert main([*flags.split(), *BATCH, "4", "--output_dir", str(tmp_path / "one")], adapter="bge-reranker") == 0
    words = ["-m", "ultrarag.finetune.bge_reranker", *flags.split(), *BATCH, "2"]
    done = forked.torchrun([*words, "--output_dir", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=0, atol=1e-6), name
    found = [read_manifest(tmp_path / name).training.metrics for name in ("one", "two")]
    assert found[0]["after"] == pytest.approx(found[1]["after"])


def test_what_a_cross_encoder_declares_survives(xlmr, tmp_path):
    """sentence-transformers keeps the activation, a default prompt and the length beside the weights."""
    from sentence_transformers import CrossEncoder

    made = CrossEncoder(
        str(xlmr), device="cpu", activation_fn=torch.nn.Tanh(), prompts={"ask": "water: "}, default_prompt_name="ask"
    )
    made.max_seq_length = 20
    made.save_pretrained(str(tmp_path / "declared"))
    file = tmp_path / "declared" / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_seq_length": 20}))
    pairs = [PAIRS[3], PAIRS[4], ("water", "the water in the dough " * 9)]
    encoder = Encoder.load(tmp_path / "declared", adapter="bge-reranker", device="cpu")
    assert encoder.score(pairs) == pytest.approx(made.predict(pairs, activation_fn=torch.nn.Identity()), abs=1e-5)
    result = finetune(tmp_path / "declared", ROWS, tmp_path / "out", max_len=20, max_steps=2, **QUICK)
    trained = Encoder.load(result.checkpoint, device="cpu")
    assert trained.settings.query_instruction == "water: "
    again = CrossEncoder(str(result.checkpoint), device="cpu")
    assert again.predict(pairs) == pytest.approx(np.tanh(trained.score(pairs)), abs=1e-5)


def test_a_pair_of_empty_texts_has_a_score(tmp_path):
    """Also where the tokenizer adds no special tokens, so that nothing is left to read."""
    from ultrarag.testing.tiny_causal import tiny_causal_reranker

    tiny_causal_reranker(tmp_path / "plain", "qwen3-classifier-original")
    encoder = Encoder.load(tmp_path / "plain", adapter="bge-reranker", device="cpu")
    alone = encoder.score([("", "")])
    assert np.isfinite(alone).all()
    assert encoder.score([("", ""), ("why", "water " * 9)])[0] == pytest.approx(alone[0], abs=1e-5)
    assert encoder.tokenize_pairs([("", "")]).ids == [[encoder.tokenizer.eos_token_id]]
