"""Fine-tuning whole: the command line, the function, resume after kill -9, Ctrl-C, and what must stop a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import forked
from ultrarag import Encoder
from ultrarag.checkpoint.manifest import read_manifest
from ultrarag.errors import DataError, TrainingError, UltraragError, UsageError
from ultrarag.finetune import finetune

#: words that the tiny tokenizer knows
WORDS = ["bread", "oven", "water", "seals", "sleep", "dough", "steam"]
WORDS += ["crust", "hot", "long", "under", "rises", "sets", "once"]
ROWS = [
    {
        "query": f"why does {WORDS[i % 14]} {WORDS[(i * 5 + 3) % 14]}",
        "pos": [f"the {WORDS[i % 14]} {WORDS[(i * 3 + 1) % 14]} before {WORDS[(i * 5 + 3) % 14]}"],
        "neg": [f"{WORDS[(i + 5) % 14]} in the {WORDS[(i + 7) % 14]}", f"how {WORDS[(i * 3) % 14]} turns"],
    }
    for i in range(20)
]
QUICK = {"query_max_len": 16, "passage_max_len": 24, "learning_rate": 1e-3, "per_device_train_batch_size": 4}


@pytest.fixture
def train_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def command(tiny_m3, train_file, tmp_path):
    """The words of a bgem3 run that takes a second, without the program."""
    flags = {
        "model_name_or_path": tiny_m3,
        "train_data": train_file,
        "cache_path": tmp_path / "cache",
        "train_group_size": 2,
        "query_max_len": 16,
        "passage_max_len": 24,
        "learning_rate": "1e-3",
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "unified_finetuning": True,
        "num_train_epochs": 3,
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def launch(words):
    return forked.Popen(["-m", *words])


def run(words, processes=1):
    done = forked.torchrun(["-m", *words], processes)
    return done.returncode, done.stdout, done.stderr


def run_anew(words, processes=1):
    """The same in interpreters of their own, several under torchrun."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *map(str, [*launcher, *words])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def weights(folder):
    from safetensors.torch import load_file

    found = load_file(Path(folder) / "model.safetensors")
    for head in ("colbert_linear.pt", "sparse_linear.pt"):
        extra = torch.load(Path(folder) / head, weights_only=True)
        found.update({f"{head}/{name}": tensor for name, tensor in extra.items()})
    return found


def assert_same_weights(left, right, tolerance=0.0):
    mine, theirs = weights(left), weights(right)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=tolerance), name


def test_function_trains_and_the_checkpoint_loads_without_an_adapter(tiny_m3, tmp_path):
    result = finetune(tiny_m3, ROWS, tmp_path / "out", adapter="bgem3", train_group_size=2, **QUICK)
    encoder = Encoder.load(result.checkpoint)
    assert encoder.fingerprint == result.fingerprint
    assert result.steps == 15
    record = encoder.manifest.training
    assert record.parent == Encoder.load(tiny_m3, adapter="bgem3").fingerprint
    assert record.data[0]["rows"] == 20
    assert record.arguments["data"]["query_max_len"] == 16
    # dense-only training keeps the other heads as they were
    before = Encoder.load(tiny_m3, adapter="bgem3")
    assert torch.equal(before.model.sparse_linear.weight, encoder.model.sparse_linear.weight)
    assert "why does" not in (tmp_path / "out" / "README.md").read_text()


def test_training_goes_on_from_a_checkpoint_of_ours(tiny_m3, tmp_path):
    first = finetune(tiny_m3, ROWS, tmp_path / "1", adapter="bgem3", train_group_size=1, max_steps=2, **QUICK)
    second = finetune(first.checkpoint, ROWS, tmp_path / "2", train_group_size=1, max_steps=2, **QUICK)
    assert read_manifest(Path(second.checkpoint)).training.parent == first.fingerprint


def test_result_is_on_stdout_and_everything_else_on_stderr(command, tmp_path):
    status, out, err = run_anew(
        ["ultrarag.finetune.bgem3", *command, "--output_dir", tmp_path / "out", "--max_steps", 2, "--json"]
    )
    assert status == 0, err
    result = json.loads(out)
    assert result["checkpoint"] == str(tmp_path / "out")
    assert result["steps"] == 2
    assert "step 2/2" in err


ULTRARAG_PAGE = """
    --train_group_size 1 --query_max_len 16 --passage_max_len 24 --pad_to_multiple_of 8
    --knowledge_distillation False --same_dataset_within_batch True --small_threshold 0 --drop_threshold 0
    --overwrite_output_dir --learning_rate 1e-5 --fp16 --num_train_epochs 2 --per_device_train_batch_size 4
    --dataloader_drop_last True --warmup_ratio 0.1 --gradient_checkpointing --logging_steps 1 --save_steps 3
    --negatives_cross_device --temperature 0.02 --sentence_pooling_method cls --normalize_embeddings True
    --kd_loss_type m3_kd_loss --unified_finetuning True --use_self_distill False --fix_encoder False
    --self_distill_start_step 0
"""


def test_whole_flag_list_of_the_ultrarag_page_on_two_processes(tiny_m3, train_file, tmp_path):
    """DeepSpeed included, as `make` has set it up."""
    paths = ["--model_name_or_path", tiny_m3, "--cache_dir", tmp_path / "m", "--cache_path", tmp_path / "d"]
    paths += ["--train_data", train_file, "--output_dir", tmp_path / "out"]
    paths += ["--deepspeed", Path(__file__).parents[2] / "resources" / "deepspeed" / "ds_stage0.json"]
    status, out, err = run_anew(["ultrarag.finetune.bgem3", *paths, *ULTRARAG_PAGE.split()], processes=2)
    assert status == 0, err[-3000:]
    assert "fp16 needs a GPU and none is used here: training in fp32" in err
    assert err.count("step 4/4") == 1  # one rank speaks
    assert "accelerator" not in err
    assert f"checkpoint  {tmp_path / 'out'}" in out
    assert Encoder.load(tmp_path / "out").heads == ("dense", "sparse", "colbert")


def test_two_processes_with_gradcache_give_the_weights_of_one(command, tmp_path):
    """Cross-device negatives: two ranks of 4 queries are one batch of 8, whatever the chunks."""
    shared = [*command, "--negatives_cross_device", "--max_grad_norm", 0]
    shared += ["--optim", "sgd", "--max_steps", 2]
    one = [*shared]
    one[one.index("--per_device_train_batch_size") + 1] = "8"
    for name, words, processes in (
        ("one", one, 1),
        ("two", shared, 2),
        ("chunks", [*shared, "--sub_batch_size", 3], 2),
        ("tokens", [*shared, "--sub_batch_tokens", 40], 2),
    ):
        words = ["ultrarag.finetune.bgem3", *words, "--output_dir", tmp_path / name]
        status, _, err = run(words, processes)
        assert status == 0, err[-3000:]
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-6)
    assert_same_weights(tmp_path / "two", tmp_path / "chunks", 1e-6)
    assert_same_weights(tmp_path / "two", tmp_path / "tokens", 1e-6)


def kill_at(words, step):
    process = launch(words)
    for line in process.stderr:
        if line.startswith(f"step {step}/"):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_killed_and_resumed_run_ends_with_the_weights_of_the_undisturbed_one(command, tmp_path):
    words = ["ultrarag.finetune.bgem3", *command, "--save_steps", 4, "--resume_from_checkpoint", "True"]
    words += ["--use_self_distill", "True", "--self_distill_start_step", 6]
    status, _, err = run([*words, "--output_dir", tmp_path / "whole"])
    assert status == 0, err
    broken = [*words, "--output_dir", tmp_path / "broken"]
    kill_at(broken, 2)  # before there is a checkpoint
    kill_at(broken, 9)
    status, _, err = run(broken)
    assert status == 0, err
    assert "resuming from" in err
    assert "step 9/15" in err
    assert "step 8/15" not in err
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")


def test_half_written_checkpoint_is_not_resumed(command, tmp_path):
    out = tmp_path / "out"
    (out / ".checkpoint-4.tmp").mkdir(parents=True)
    words = ["ultrarag.finetune.bgem3", *command, "--output_dir", out, "--max_steps", 2]
    status, _, err = run([*words, "--resume_from_checkpoint", "True"])
    assert status == 0, err
    assert "no checkpoint to resume from yet" in err


def test_resume_with_other_batches_is_refused(tiny_m3, tmp_path):
    options = {**QUICK, "adapter": "bgem3", "train_group_size": 1, "max_steps": 2}
    finetune(tiny_m3, ROWS, tmp_path / "out", **options)
    with pytest.raises(UsageError, match=r"cannot be resumed with other data or arguments \(seed: 42 then, 7 now\)"):
        finetune(tiny_m3, ROWS, tmp_path / "out", resume_from_checkpoint=True, seed=7, **options)
    with pytest.raises(UsageError, match="data: "):
        finetune(tiny_m3, ROWS[:-1], tmp_path / "out", resume_from_checkpoint=True, **options)


def test_ctrl_c_saves_and_stops_and_the_run_goes_on_exactly(command, tmp_path):
    words = ["ultrarag.finetune.bgem3", *command]
    process = launch([*words, "--output_dir", tmp_path / "out"])
    for line in process.stderr:
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped after step" in err
    assert "--resume_from_checkpoint True" in err
    assert out == ""
    assert not (tmp_path / "out" / "ultrarag.json").exists()
    assert run([*words, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "True"])[0] == 0
    assert run([*words, "--output_dir", tmp_path / "whole"])[0] == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


def test_run_that_changes_nothing_is_an_error_not_a_checkpoint(tiny_m3, tmp_path):
    options = {**QUICK, "learning_rate": 0.0, "max_steps": 1}
    with pytest.raises(TrainingError, match="training changed no weight, so no checkpoint is written"):
        finetune(tiny_m3, ROWS, tmp_path / "out", adapter="bge", train_group_size=1, **options)
    assert not (tmp_path / "out" / "config.json").exists()


def test_loss_that_is_not_finite_names_step_dataset_and_rows(tiny_m3, tmp_path):
    broken = Encoder.load(tiny_m3, adapter="bge")
    with torch.no_grad():
        next(p for n, p in broken.model.named_parameters() if n.endswith("embeddings.weight"))[:] = float("nan")
    from ultrarag.adapters.embedder_files import save_embedder

    save_embedder(broken.model, str(tmp_path / "nan"), broken.model.state_dict())
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0, dataset '<rows>', rows <rows>:\d+"):
        finetune(tmp_path / "nan", ROWS, tmp_path / "out", adapter="bge", train_group_size=1, **QUICK)


def test_bad_rows_stop_before_training(tiny_m3, tmp_path):
    rows = [*ROWS, {"query": "", "pos": ["x"]}, {"query": "fine", "pos": []}]
    with pytest.raises(DataError, match=r"<rows>:21: .*query[\s\S]*<rows>:22: .*pos"):
        finetune(tiny_m3, rows, tmp_path / "out", adapter="bge", **QUICK)
    result = finetune(
        tiny_m3, rows, tmp_path / "out", adapter="bge", train_group_size=1, on_bad_rows="drop", max_steps=1, **QUICK
    )
    assert any("2 " in note and "<rows>" in note for note in result.notes)


def test_one_candidate_per_query_is_refused(tiny_m3, tmp_path):
    options = {**QUICK, "per_device_train_batch_size": 1}
    with pytest.raises((DataError, UsageError), match="loss"):
        finetune(tiny_m3, ROWS, tmp_path / "out", adapter="bge", train_group_size=1, **options)


def test_output_directory_is_not_overwritten_unasked(tiny_m3, tmp_path):
    options = {**QUICK, "adapter": "bge", "train_group_size": 1, "max_steps": 1}
    first = finetune(tiny_m3, ROWS, tmp_path / "out", **options)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds a finished model of an earlier run.*--overwrite_output_dir"):
        finetune(tiny_m3, ROWS, tmp_path / "out", **options)
    second = finetune(tiny_m3, ROWS, tmp_path / "out", overwrite_output_dir=True, seed=3, **options)
    assert second.fingerprint != first.fingerprint
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a model that ultrarag did not write"):
        finetune(tiny_m3, ROWS, tmp_path / "theirs", overwrite_output_dir=True, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "did you mean '--learning_rate'"),
        (["--query_max_len", "9999"], "9999 tokens was asked for, but the model takes at most"),
        (["--fix_encoder", "True", "--unified_finetuning", "False"], "nothing is left to train"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor is not supported"),
    ],
)
def test_wrong_flags_exit_with_2_and_one_line(command, tmp_path, words, message, capsys):
    from ultrarag.finetune.__main__ import main

    for flag in words[::2]:
        if flag in command:
            at = command.index(flag)
            del command[at : at + 2]
    assert main([*command, "--output_dir", str(tmp_path / "out"), *words], adapter="bgem3") == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert captured.out == ""


def test_evaluation_before_during_and_after_keeps_the_best(tiny_m3, tmp_path):
    held_out = [{"query": row["query"], "pos": row["pos"]} for row in ROWS[:8]]
    result = finetune(
        tiny_m3,
        ROWS,
        tmp_path / "out",
        adapter="bge",
        train_group_size=2,
        eval_data=held_out,
        eval_steps=3,
        num_train_epochs=2,
        early_stopping_patience=3,
        **QUICK,
    )
    assert set(result.metrics["before"]) == {"nDCG@10", "Recall@10", "MRR@10"}
    state = json.loads(max((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    scores = [entry["eval_ndcg@10"] for entry in state["log_history"] if "eval_ndcg@10" in entry]
    assert result.metrics["after"]["nDCG@10"] == pytest.approx(max(scores))
    manifest = read_manifest(Path(result.checkpoint))
    assert manifest.training.metrics == result.metrics
    assert f"{result.metrics['after']['nDCG@10']:.4f}" in (tmp_path / "out" / "README.md").read_text()


def test_evaluation_reads_a_beir_folder(tiny_m3, tmp_path):
    from ultrarag.types import Passage

    folder = tmp_path / "beir"
    from ultrarag.evaluation import write_beir

    corpus = [Passage(str(i), row["pos"][0], title="t") for i, row in enumerate(ROWS)]
    queries = {str(i): row["query"] for i, row in enumerate(ROWS)}
    write_beir(folder, corpus, queries, {"test": {str(i): {str(i): 1} for i in range(10)}})
    result = finetune(
        tiny_m3, ROWS, tmp_path / "out", adapter="bge", train_group_size=1, eval_data=str(folder), max_steps=2, **QUICK
    )
    assert 0 < result.metrics["after"]["nDCG@10"] <= 1


def test_no_query_ever_holds_the_word_none(tiny_m3, tmp_path, monkeypatch):
    """The seed command of FlagEmbedding, same-dataset mode and no instruction, trains on 'None...' queries."""
    from ultrarag.finetune.batches import loader

    seen = []
    original = loader.tokenize
    monkeypatch.setattr(loader, "tokenize", lambda t, texts, n: seen.extend(texts) or original(t, texts, n))
    rows = [{**row, "prompt": None} for row in ROWS]
    finetune(
        tiny_m3,
        rows,
        tmp_path / "out",
        adapter="bge",
        train_group_size=2,
        same_dataset_within_batch=True,
        max_steps=3,
        **QUICK,
    )
    assert seen
    assert not any("None" in text for text in seen)


def test_instructions_and_prompts_reach_the_model_and_the_checkpoint(tiny_m3, tmp_path, monkeypatch):
    from ultrarag.finetune.batches import loader

    seen = []
    original = loader.tokenize
    monkeypatch.setattr(loader, "tokenize", lambda t, texts, n: seen.extend(texts) or original(t, texts, n))
    rows = [{**ROWS[0], "prompt": "own: "}, *ROWS[1:]]
    result = finetune(
        tiny_m3,
        rows,
        tmp_path / "out",
        adapter="bge",
        train_group_size=1,
        query_instruction_for_retrieval="find: ",
        num_train_epochs=1,
        **QUICK,
    )
    assert f"own: {ROWS[0]['query']}" in seen
    assert f"find: {ROWS[1]['query']}" in seen
    assert ROWS[1]["pos"][0] in seen
    encoder, plain = Encoder.load(result.checkpoint), Encoder.load(result.checkpoint, query_instruction="")
    ours = encoder.encode("seals", "query").dense
    assert np.abs(ours - plain.encode("find: seals", "query").dense).max() < 1e-6


def test_gradient_accumulation_sees_the_same_rows(tiny_m3, tmp_path):
    """No in-batch negatives: two micro-batches of 2 are one batch of 4."""
    options = {**QUICK, "train_group_size": 3, "no_in_batch_neg": ("*",), "max_steps": 1, "optim": "sgd"}
    options["adapter"] = "bgem3"
    options["max_grad_norm"] = 0
    options["seed"] = 1
    finetune(tiny_m3, ROWS[:4], tmp_path / "one", **options)
    options["per_device_train_batch_size"] = 2
    finetune(tiny_m3, ROWS[:4], tmp_path / "two", gradient_accumulation_steps=2, **options)
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-6)


def test_threads_of_training_leave_no_environment_behind(tiny_m3, tmp_path):
    before = dict(os.environ)
    finetune(tiny_m3, ROWS, tmp_path / "out", adapter="bge", train_group_size=1, max_steps=1, **QUICK)
    assert {k: v for k, v in os.environ.items() if k not in before} == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor is not supported"),
        ({"adapter": "bge-reranker", "use_mrl": True, "mrl_dims": (8,)}, "--use_mrl does not suit a cross-encoder"),
        ({"adapter": "bge-reranker", "train_group_size": 1}, "a cross-encoder compares a query's positive"),
        ({"no_in_batch_neg": ("*",), "train_group_size": 1}, "the loss would be 0"),
        ({"eval_data": [{"query": "q", "pos": [""]}]}, "pos"),
        ({"adapter": "bge-reranker", "eval_data": [{"query": "q", "pos": ["p"]}]}, "no query with 'neg'"),
        ({"merge_with": "nowhere/at/all", "merge_weight": 0.5}, "cannot be loaded"),
        ({"output_dir": "finished"}, "holds a finished model of an earlier run"),
        ({"output_dir": "finished", "resume_from_checkpoint": "no/checkpoint-1"}, "no such checkpoint"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses_and_neither_writes(tiny_m3, tmp_path, monkeypatch, options, message):
    from ultrarag.finetune import adapter_defaults
    from ultrarag.finetune.flags import from_keywords
    from ultrarag.finetune.run import dry_run
    from ultrarag.finetune.run import run as whole_run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "ultrarag.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    given = {**QUICK, "output_dir": "out", "adapter": "bge", **options}
    adapter, output_dir = given.pop("adapter"), given.pop("output_dir")
    said = []
    for start in (dry_run, whole_run):
        arguments = from_keywords(tiny_m3, ROWS, output_dir, adapter, adapter_defaults(adapter), **given)
        with pytest.raises(UltraragError, match=message) as refused:
            start(arguments)
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_refuses_to_resume_with_other_batches(tiny_m3, tmp_path):
    from ultrarag.finetune import dry_run
    from ultrarag.finetune.flags import from_keywords

    options = {**QUICK, "train_group_size": 1, "max_steps": 2}
    finetune(tiny_m3, ROWS, tmp_path / "out", adapter="bgem3", **options)
    resumed = {**options, "resume_from_checkpoint": True}
    assert dry_run(from_keywords(tiny_m3, ROWS, tmp_path / "out", "bgem3", **resumed)).steps_per_epoch == 5
    with pytest.raises(UsageError, match="cannot be resumed with other data or arguments"):
        dry_run(from_keywords(tiny_m3, ROWS, tmp_path / "out", "bgem3", **resumed, seed=7))


def test_checkpoints_to_overwrite_outlive_a_refusal(tiny_m3, tmp_path):
    options = {**QUICK, "adapter": "bge", "train_group_size": 1, "max_steps": 1, "overwrite_output_dir": True}
    finetune(tiny_m3, ROWS, tmp_path / "out", **options)
    held = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert held
    with pytest.raises(DataError):
        finetune(tiny_m3, [{"query": "", "pos": ["p"]}], tmp_path / "out", **options)
    assert sorted((tmp_path / "out").glob("checkpoint-*")) == held


def test_a_directory_that_cannot_be_written_to_is_refused_first(tmp_path, monkeypatch):
    from ultrarag.finetune import output

    monkeypatch.setattr(output.os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match=f"'{tmp_path}' cannot be written to"):
        output.check_output_dir(tmp_path / "a" / "b", overwrite=False)
