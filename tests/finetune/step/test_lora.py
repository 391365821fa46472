"""LoRA: the backbone stays, the merged model and the adapters are written, resume is exact, errors say what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.finetune.test_run import QUICK, ROWS
from ultrarag import Encoder
from ultrarag.errors import UsageError
from ultrarag.finetune import finetune
from ultrarag.finetune.__main__ import main
from ultrarag.finetune.flags.groups import LoraArguments
from ultrarag.finetune.step.lora import add_lora
from ultrarag.testing import tiny
from ultrarag.testing.layouts import LAYOUTS, write_layout

LORA = {**QUICK, "use_lora": True, "lora_rank": 4, "lora_alpha": 8, "train_group_size": 2}


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_unified_m3_trains_adapters_and_heads_and_writes_a_merged_model(tiny_m3, tmp_path):
    result = finetune(tiny_m3, ROWS, tmp_path / "out", adapter="bgem3", unified_finetuning=True, max_steps=4, **LORA)
    encoder = Encoder.load(result.checkpoint)  # by nothing but its manifest
    assert encoder.fingerprint == result.fingerprint
    before, after = weights(tiny_m3), weights(result.checkpoint)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if name.startswith("encoder.") and before[name].ndim == 2}
    assert changed == linear
    for name in sorted(changed)[:3]:  # of rank 4, out of 32
        assert torch.linalg.matrix_rank(after[name] - before[name], tol=1e-6) <= 4
    start = Encoder.load(tiny_m3, adapter="bgem3")
    assert not torch.equal(start.model.sparse_linear.weight, encoder.model.sparse_linear.weight)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft still asks for it
def test_adapter_folder_loads_in_peft(tiny_m3, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel

    result = finetune(tiny_m3, ROWS, tmp_path / "out", adapter="bge", max_steps=4, **LORA)
    merged = AutoModel.from_pretrained(result.checkpoint, add_pooling_layer=False).eval()
    base = AutoModel.from_pretrained(tiny_m3, add_pooling_layer=False)
    adapted = PeftModel.from_pretrained(base, f"{result.checkpoint}/adapter").eval()
    ids = torch.tensor([[0, 40, 50, 60, 2]])
    with torch.no_grad():
        expected, found = (model(input_ids=ids).last_hidden_state for model in (merged, adapted))
        plain = AutoModel.from_pretrained(tiny_m3, add_pooling_layer=False).eval()(input_ids=ids).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_resumed_run_ends_with_the_weights_of_the_undisturbed_one(tiny_m3, tmp_path):
    options = {**LORA, "adapter": "bgem3", "unified_finetuning": True, "num_train_epochs": 2, "save_steps": 4}
    whole = finetune(tiny_m3, ROWS, tmp_path / "whole", **options)
    first = str(tmp_path / "whole" / "checkpoint-4")
    assert Encoder.load(first).heads == ("dense", "sparse", "colbert")  # each checkpoint is a merged model
    resumed = finetune(tiny_m3, ROWS, tmp_path / "resumed", resume_from_checkpoint=first, **options)
    assert resumed.fingerprint == whole.fingerprint
    with pytest.raises(UsageError, match=r"cannot be resumed .* \(lora_rank: 4 then, 2 now\)"):
        finetune(tiny_m3, ROWS, tmp_path / "x", resume_from_checkpoint=first, **{**options, "lora_rank": 2})


def test_gradient_checkpointing_trains_the_same(tiny_m3, tmp_path):
    options = {**LORA, "adapter": "bge", "lora_dropout": 0.0, "max_steps": 2}
    plain = finetune(tiny_m3, ROWS, tmp_path / "plain", **options)
    again = finetune(tiny_m3, ROWS, tmp_path / "again", gradient_checkpointing=True, **options)
    mine, theirs = weights(plain.checkpoint), weights(again.checkpoint)
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-5), name


def test_best_checkpoint_is_loaded_back(tiny_m3, tmp_path):
    held_out = [{"query": row["query"], "pos": row["pos"]} for row in ROWS[:8]]
    options = {**LORA, "adapter": "bge", "eval_data": held_out, "eval_steps": 2, "num_train_epochs": 1}
    result = finetune(tiny_m3, ROWS, tmp_path / "out", **options)
    state = json.loads(max((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    scores = [entry["eval_ndcg@10"] for entry in state["log_history"] if "eval_ndcg@10" in entry]
    assert result.metrics["after"]["nDCG@10"] == pytest.approx(max(scores))


def test_rerankers_head_is_trained_whole(tmp_path):
    tiny.tiny_cross_encoder(tmp_path / "model")
    options = {**LORA, "adapter": "bge-reranker", "target_modules": ["query", "value"], "max_steps": 2}
    result = finetune(tmp_path / "model", ROWS, tmp_path / "out", **options, sub_batch_size=3)
    before, after = weights(tmp_path / "model"), weights(result.checkpoint)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"classifier", "roberta"}
    backbone = {name.split("self.")[1] for name in changed if name.startswith("roberta")}
    assert backbone == {"query.weight", "value.weight"}
    adapters = load_file(Path(result.checkpoint) / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 8  # two layers, two targets, two matrices
    assert not any("classifier" in name for name in adapters)


def test_merging_for_a_while_leaves_no_trace(tiny_m3):
    encoder = Encoder.load(tiny_m3, adapter="bge", device="cpu")
    plain = encoder.encode(["seals sleep"]).dense
    lora = add_lora(encoder, LoraArguments(use_lora=True, lora_rank=2, lora_dropout=0.0))
    assert np.array_equal(encoder.encode(["seals sleep"]).dense, plain)  # a fresh adapter changes nothing
    with torch.no_grad():
        for name, parameter in encoder.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    apart = encoder.encode(["seals sleep"]).dense
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    with lora.merged():
        assert np.abs(encoder.encode(["seals sleep"]).dense - apart).max() < 1e-5
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert np.array_equal(encoder.encode(["seals sleep"]).dense, apart)
    lora.remove()
    assert not any("lora" in name or "base_layer" in name for name in encoder.model.state_dict())
    assert np.abs(encoder.encode(["seals sleep"]).dense - apart).max() < 1e-5
    assert np.abs(plain - apart).max() > 1e-3


def test_missing_peft_is_named(tiny_m3, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"--use_lora needs the package peft: pip install peft==\d"):
        finetune(tiny_m3, ROWS, tmp_path / "out", adapter="bge", max_steps=1, **LORA)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--target_modules q_proj", "--target_modules q_proj: the model has no such linear layer; it has dense, key"),
        ("--fix_encoder", "--use_lora adapts the backbone that --fix_encoder freezes"),
        ("--lora_rank 0", "lora_rank is 0; it must be at least 1"),
        ("--lora_dropout 1", "lora_dropout is 1.0; it must be at least 0 and below 1"),
        ("--save_merged_lora_model False", "save_merged_lora_model False is not available"),
    ],
)
def test_wrong_flags(tiny_m3, tmp_path, capsys, words, message):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    paths = f"--model_name_or_path {tiny_m3} --train_data {data} --cache_path {tmp_path} --output_dir {tmp_path / 'o'}"
    flags = "--use_lora --query_max_len 16 --passage_max_len 24 --train_group_size 2"
    assert main([*paths.split(), *flags.split(), *words.split()], adapter="bge") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["MiniLM", "gte-multilingual", "Qwen3-Embedding"])
def test_models_of_sentence_transformers_are_trained_and_their_adapters_are_a_model(name, tmp_path):
    from sentence_transformers import SentenceTransformer

    write_layout(tmp_path / "m", LAYOUTS[name])
    run = {**LORA, "adapter": "sentence-transformers", "max_steps": 2, "save_steps": 1}
    result = finetune(str(tmp_path / "m"), ROWS, tmp_path / "out", **run)
    encoder = Encoder.load(result.checkpoint)
    assert encoder.fingerprint == result.fingerprint
    found = encoder.encode(["a", "seals sleep"]).dense
    theirs = SentenceTransformer(result.checkpoint, device="cpu").encode_document(["a", "seals sleep"])
    assert np.abs(found - theirs).max() < 1e-5
    apart = Encoder.load(f"{result.checkpoint}/adapter", adapter="bge").encode(["a", "seals sleep"]).dense
    assert np.abs(found - apart).max() < 1e-5
    assert np.abs(found - Encoder.load(tmp_path / "m", "bge").encode(["a", "seals sleep"]).dense).max() > 1e-4
