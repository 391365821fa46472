"""Resuming: what shapes the weights must be as it was, or is named, and recorded for the steps that it held for."""

from __future__ import annotations

import json

import pytest

from tests.finetune.test_run import QUICK, ROWS, assert_same_weights
from ultrarag.checkpoint import read_manifest
from ultrarag.errors import UsageError
from ultrarag.finetune import dry_run, finetune
from ultrarag.finetune.flags import from_keywords
from ultrarag.finetune.resume import continued, total_steps

OPTIONS = {**QUICK, "adapter": "bgem3", "train_group_size": 2, "save_steps": 2, "logging_steps": 1, "max_steps": 4}
CONSTANT = {**OPTIONS, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def begun(tiny_m3, tmp_path_factory):
    """The folder of a run of four steps of the five of an epoch."""
    out = tmp_path_factory.mktemp("resume") / "out"
    finetune(tiny_m3, ROWS, out, **CONSTANT)
    return out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-5}, "learning_rate: 0.001 then, 1e-05 now"),
        ({"temperature": 0.5}, r"temperature: 0\.\d+ then, 0.5 now"),
        ({"optim": "sgd"}, "optim: adamw_torch_fused then, sgd now"),
        ({"warmup_steps": 2}, "warmup_steps: 0 then, 2 now"),
        ({"weight_decay": 0.1, "seed": 7}, "weight_decay: 0.0 then, 0.1 now; seed: 42 then, 7 now"),
        ({"use_lora": True}, "use_lora: false then, true now"),
        ({"query_max_len": 12}, "query_max_len: 16 then, 12 now"),
        ({"max_steps": 3}, "has made 4 steps, and --max_steps or --num_train_epochs ask for 3"),
        ({"max_steps": -1, "num_train_epochs": 0.5}, "ask for 3 in all: give more"),
    ],
)
def test_what_shapes_the_weights_is_refused_before_anything_is_written(begun, tiny_m3, changed, message):
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*")}
    options = {**CONSTANT, **changed, "resume_from_checkpoint": True}
    with pytest.raises(UsageError, match=message):
        finetune(tiny_m3, ROWS, begun, **options)
    adapter = options.pop("adapter")
    with pytest.raises(UsageError, match=message):
        dry_run(from_keywords(tiny_m3, ROWS, begun, adapter, **options))
    assert {path: path.stat().st_mtime_ns for path in begun.rglob("*")} == before


def test_another_precision_of_the_launcher_is_refused(begun, tiny_m3, monkeypatch):
    """It comes by the environment, and would be in no argument."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    options = {**CONSTANT, "use_cpu": True, "max_steps": 6, "resume_from_checkpoint": True}
    with pytest.raises(UsageError, match="bf16: false then, true now"):
        finetune(tiny_m3, ROWS, begun, **options)


def test_a_run_that_has_all_its_steps_makes_none_more(begun, tiny_m3, tmp_path):
    free = {"save_steps": 3, "dataloader_num_workers": 0, "skip_data_check": True, "logging_steps": 2}
    checkpoint = begun / "checkpoint-4"
    result = finetune(tiny_m3, ROWS, tmp_path / "out", **{**CONSTANT, **free}, resume_from_checkpoint=checkpoint)
    assert result.steps == 4
    assert not any("then," in note for note in result.notes)
    assert_same_weights(begun, tmp_path / "out")
    assert "earlier" not in read_manifest(tmp_path / "out").training.arguments


def test_a_longer_run_is_named_and_recorded_by_ranges_of_steps(begun, tiny_m3, tmp_path):
    """With a constant rate the weights are those of a run that was as long from the start."""
    longer = {**CONSTANT, "max_steps": 6}
    result = finetune(tiny_m3, ROWS, tmp_path / "6", **longer, resume_from_checkpoint=begun / "checkpoint-2")
    assert "from step 3 on with another max_steps: 4 then, 6 now" in result.notes
    more = {**longer, "max_steps": -1, "num_train_epochs": 2, "sub_batch_size": 100}
    finetune(tiny_m3, ROWS, tmp_path / "10", **more, resume_from_checkpoint=tmp_path / "6" / "checkpoint-6")
    whole = finetune(tiny_m3, ROWS, tmp_path / "whole", **{**more, "sub_batch_size": None})
    assert_same_weights(whole.checkpoint, tmp_path / "10", tolerance=1e-6)
    training = read_manifest(tmp_path / "10").training
    assert (training.steps, training.arguments["training"]["max_steps"]) == (10, -1)
    then = {"model.sub_batch_size": None, "training.num_train_epochs": 3.0}
    assert training.arguments["earlier"] == [
        {"first_step": 1, "last_step": 2, "arguments": {**then, "training.max_steps": 4}},
        {"first_step": 3, "last_step": 6, "arguments": {**then, "training.max_steps": 6}},
    ]


def test_the_rate_follows_the_new_length(tiny_m3, tmp_path):
    """What the manifest says of the steps is what the optimizer did in them."""
    finetune(tiny_m3, ROWS, tmp_path / "4", **OPTIONS)
    finetune(
        tiny_m3, ROWS, tmp_path / "8", **{**OPTIONS, "max_steps": 8}, resume_from_checkpoint=tmp_path / "4/checkpoint-2"
    )
    state = json.loads((tmp_path / "8" / "checkpoint-8" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates == pytest.approx([1e-3 * (1 - n / 4) for n in (0, 1)] + [1e-3 * (1 - n / 8) for n in range(2, 8)])


def test_arguments_that_an_old_checkpoint_does_not_record_are_noted(begun, tmp_path):
    manifest = read_manifest(begun / "checkpoint-4")
    arguments = json.loads(json.dumps(manifest.training.arguments))
    del arguments["loss"]["temperature"], arguments["training"]["logging_steps"]
    (tmp_path / "old").mkdir()
    text = json.loads((begun / "checkpoint-4" / "ultrarag.json").read_text())
    text["training"]["arguments"], text["files"] = arguments, {}
    (tmp_path / "old" / "ultrarag.json").write_text(json.dumps(text))
    notes: list[str] = []
    assert continued(tmp_path / "old", manifest.training, 4, notes.append) == manifest.training
    assert notes == [f"{tmp_path / 'old'} does not record loss.temperature: going on with what is given now"]


def test_an_argument_that_is_in_no_list_is_refused(begun):
    now = read_manifest(begun / "checkpoint-4").training
    now.arguments["training"]["adam_beta1"] = 0.5
    with pytest.raises(UsageError, match=r"adam_beta1: 0\.9 then, 0\.5 now"):
        continued(begun / "checkpoint-4", now, 4, print)


@pytest.mark.parametrize(("limits", "steps"), [((5, 1, 2.0, -1), 10), ((5, 2, 1.5, -1), 5), ((5, 2, 9.0, 4), 4)])
def test_steps_are_counted_as_transformers_does(limits, steps):
    assert total_steps(*limits) == steps
