"""The command line and the keywords of fine-tuning: names, defaults, translations, errors, help."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from ultrarag.errors import UsageError
from ultrarag.finetune.flags.arguments import FinetuneArguments, from_keywords, parse_command_line
from ultrarag.finetune.flags.command_line import named_adapter
from ultrarag.finetune.flags.transformers import _REPORTERS, training_flags
from ultrarag.loss_arguments import LossArguments

#: what transformers 4.57.6 had in TrainingArguments and 5.23 has not
DROPPED = [
    "overwrite_output_dir",
    "per_gpu_train_batch_size",
    "per_gpu_eval_batch_size",
    "warmup_ratio",
    "logging_dir",
    "save_safetensors",
    "no_cuda",
    "use_mps_device",
    "jit_mode_eval",
    "fp16_opt_level",
    "half_precision_backend",
    "tpu_num_cores",
    "tpu_metrics_debug",
    "past_index",
    "fsdp_min_num_params",
    "fsdp_transformer_layer_cls_to_wrap",
    "adafactor",
    "group_by_length",
    "use_legacy_prediction_loop",
    "include_inputs_for_metrics",
    "fp16_backend",
    "push_to_hub_model_id",
    "push_to_hub_organization",
    "push_to_hub_token",
    "mp_parameters",
    "torchdynamo",
    "ray_scope",
    "include_tokens_per_second",
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q", "pos": ["p"], "neg": ["n"]}\n')
    return path


@pytest.fixture
def parse(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parse flags after the three that are always needed, on a machine without an accelerator."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    needed = ["--model_name_or_path", "m", "--train_data", str(rows), "--output_dir", str(tmp_path / "out")]

    def run(line: str = "", *words: str, defaults: Any = None) -> FinetuneArguments:
        return parse_command_line([*needed, *line.split(), *words], "bgem3", defaults)

    return run


@pytest.fixture
def keywords(rows: Path, tmp_path: Path) -> Any:
    def run(**arguments: Any) -> FinetuneArguments:
        data = arguments.pop("rows", rows)
        return from_keywords("m", data, tmp_path / "out", "bgem3", **arguments)

    return run


def test_defaults_are_the_peers(parse: Any) -> None:
    arguments = parse()
    assert arguments.adapter == "bgem3"
    assert (arguments.data.train_group_size, arguments.data.query_max_len, arguments.data.passage_max_len) == (
        8,
        32,
        128,
    )
    assert arguments.loss == LossArguments(temperature=0.02, kd_loss_type="kl_div", normalize_embeddings=None)
    assert (arguments.training.learning_rate, arguments.training.seed) == (5e-5, 42)
    assert arguments.training.remove_unused_columns is False
    assert arguments.training.ddp_find_unused_parameters is False
    assert arguments.training.report_to == []
    assert arguments.training.disable_tqdm is True  # stderr is no terminal here
    assert arguments.notes == []


def test_ultrarags_whole_command_line(parse: Any) -> None:
    arguments = parse(
        "--cache_dir c --cache_path p --train_group_size 1 --query_max_len 512 --passage_max_len 512 "
        "--pad_to_multiple_of 8 --knowledge_distillation False --same_dataset_within_batch True "
        "--small_threshold 0 --drop_threshold 0 --overwrite_output_dir --learning_rate 1e-5 --fp16 "
        "--num_train_epochs 5 --per_device_train_batch_size 2 --dataloader_drop_last True --warmup_ratio 0.1 "
        "--gradient_checkpointing --logging_steps 1 --save_steps 1000 --negatives_cross_device "
        "--temperature 0.02 --sentence_pooling_method cls --normalize_embeddings True --kd_loss_type m3_kd_loss "
        "--unified_finetuning True --use_self_distill False --fix_encoder False --self_distill_start_step 0"
    )
    assert arguments.overwrite_output_dir
    assert arguments.loss == LossArguments(
        kd_loss_type="m3_kd_loss",
        unified_finetuning=True,
        negatives_cross_device=True,
        self_distill_start_step=0,
        normalize_embeddings=True,
    )
    assert arguments.data.same_dataset_within_batch
    assert arguments.data.pad_to_multiple_of == 8
    training = arguments.training
    assert (training.warmup_steps, training.get_warmup_steps(200)) == (0.1, 20)
    assert training.gradient_checkpointing is training.dataloader_drop_last is True
    assert training.fp16 is False
    assert len(arguments.notes) == 1
    assert "training in fp32" in arguments.notes[0]


def test_every_field_of_training_arguments_is_a_setting() -> None:
    names = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    assert names == set(training_flags())
    kinds = {name: flag.kind for name, flag in training_flags().items()}
    assert [name for name, kind in kinds.items() if kind == "object"] == ["parallelism_config"]
    assert {kinds[name] for name in ("fsdp_config", "accelerator_config", "deepspeed", "lr_scheduler_kwargs")} == {
        "json"
    }


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--lr 3e-5", "learning_rate", 3e-5),
        ("--epochs 2", "num_train_epochs", 2),
        ("--batch_size 32", "per_device_train_batch_size", 32),
        ("--per_gpu_train_batch_size 4", "per_device_train_batch_size", 4),
        ("--warmup_proportion 0.05", "warmup_steps", 0.05),
        ("--warmup_ratio 0.2", "warmup_steps", 0.2),
        ("--save_on_epoch_end 1", "save_strategy", "epoch"),
        ("--log_interval 10", "logging_steps", 10),
        ("--num_max_checkpoints 5", "save_total_limit", 5),
        ("--no_cuda", "use_cpu", True),
        ("--adafactor", "optim", "adafactor"),
        ("--group_by_length True", "train_sampling_strategy", "group_by_length"),
        ("--push_to_hub_model_id a/b", "hub_model_id", "a/b"),
        ("--gradient_checkpointing_kwargs {\"use_reentrant\":false}", "gradient_checkpointing_kwargs",
         {"use_reentrant": False}),
        ("--include_tokens_per_second", "include_num_input_tokens_seen", "all"),
    ],
)  # fmt: skip
def test_older_spellings_of_training_arguments(parse: Any, words: str, name: str, value: Any) -> None:
    found = getattr(parse(words).training, name)
    assert getattr(found, "value", found) == value


def test_older_spellings_of_ours(parse: Any) -> None:
    arguments = parse("--normlized False --use_inbatch_neg False --neg_nums 15 --same_task_within_batch True")
    assert arguments.loss.normalize_embeddings is False
    assert arguments.data.no_in_batch_neg == ("*",)
    assert arguments.data.train_group_size == 16
    assert arguments.data.same_dataset_within_batch
    assert arguments.notes == [
        "--normlized is read as --normalize_embeddings False",
        "--use_inbatch_neg is read as --no_in_batch_neg *",
        "--neg_nums is read as --train_group_size 16",
        "--same_task_within_batch is read as --same_dataset_within_batch True",
    ]


def test_dataset_is_train_data(rows: Path) -> None:
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--dataset", str(rows)]
    assert parse_command_line(words, "bgem3").data.train_data == (str(rows),)


def test_every_dropped_flag_is_known(keywords: Any) -> None:
    for name in DROPPED:
        with pytest.raises(UsageError) as caught:
            keywords(**{name: object()})
        assert "not known" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("--save_safetensors False", "always saved as safetensors"),
        ("--fsdp_transformer_layer_cls_to_wrap BertLayer", "--fsdp_config"),
        ("--jit_mode_eval", "--torch_compile"),
        ("--half_precision_backend apex", "leave it out"),
        ("--push_to_hub_organization o", "--hub_model_id"),
        ("--warmup_ratio 1.5", "below 1"),
    ],
)
def test_what_cannot_be_had_says_what_to_use(parse: Any, words: str, advice: str) -> None:
    with pytest.raises(UsageError, match=advice):
        parse(words)


@pytest.mark.parametrize("words", ["--fix_encoder", "--fix-encoder", "--fix_encoder true", "--fix_encoder=1",
                                   "--fix_encoder yes", "--no_fix_encoder False"])  # fmt: skip
def test_booleans_that_are_on(parse: Any, words: str) -> None:
    assert parse(words).model.fix_encoder is True


@pytest.mark.parametrize("words", ["--no_normalize_embeddings", "--no-normalize-embeddings",
                                   "--normalize_embeddings no", "--normalize-embeddings=0"])  # fmt: skip
def test_booleans_that_are_off(parse: Any, words: str) -> None:
    assert parse(words).loss.normalize_embeddings is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rat 3", "did you mean '--learning_rate'"),
        ("--train_group_siz 3", "'--train_group_siz' is not known; did you mean '--train_group_size'"),
        ("--learning-rat=3", "did you mean '--learning_rate'"),
        ("stray", "'stray' follows no flag"),
        ("--seed 1 --seed 2", "--seed given twice"),
        ("--lr 1 --learning_rate 1", "--lr and --learning_rate set the same thing"),
        ("--warmup_ratio 0.1 --warmup_steps 5", "--warmup_ratio and --warmup_steps set the same thing"),
        ("--fp16 --no_fp16", "--fp16 and --no_fp16 set the same thing"),
        ("--fix_encoder maybe", "--fix_encoder is 'maybe'; it must be True or False"),
        ("--seed 1.5", "--seed is '1.5'; it must be a whole number"),
        ("--learning_rate fast", "--learning_rate is 'fast'; it must be a number"),
        ("--learning_rate nan", "must be a number"),
        ("--seed", "--seed: expected one argument"),
        ("--optim adamw_torhc", "did you mean 'adamw_torch'"),
        ("--sentence_pooling_method max", "one of cls, mean, last_token, weighted_mean"),
        ("--heads dense,spars", "did you mean 'sparse'"),
        ("--temperature 0", "temperature is 0.0; it must be a number above 0"),
        ("--train_group_size 0", "train_group_size is 0; it must be at least 1"),
        ("--query_max_len -3", "query_max_len is -3; it must be at least 1"),
        ("--sub_batch_size 0", "sub_batch_size is 0"),
        ("--sub_batch_tokens 0", "sub_batch_tokens is 0"),
        ("--sub_batch_size 8 --sub_batch_tokens 64", "both say how a batch is cut"),
        ("--query_instruction_format {}", "exactly two {}"),
        ("--passage_instruction_format {}{}{}", "exactly two {}"),
        ("--passage_instruction_format {", "exactly two {}"),
        ("--use_mrl", "needs mrl_dims"),
        ("--mrl_dims 64,0", "mrl_dims holds 0"),
        ("--shuffle_ratio 2", "between 0 and 1"),
        ("--eval_strategy epoch", "needs --eval_data"),
        ("--early_stopping_patience 2", "needs --eval_data"),
        ("--ignore_identical_ids", "needs --eval_data"),
        ("--load_best_model_at_end", "needs --eval_data"),
        ("--eval_data nowhere.jsonl", "'nowhere.jsonl' does not exist"),
        ("--per_device_train_batch_size 0", "at least 1"),
        ("--fsdp_config {\"a\":", "must be a JSON object"),
        ("--fsdp_config nowhere.json", "there is no such file"),
        ("--dataloader_prefetch_factor 2", "transformers refuses these arguments: --dataloader_prefetch_factor"),
        ("--adapter other", "this command trains adapter 'bgem3'"),
    ],
)  # fmt: skip
def test_errors_name_the_flag_and_what_to_do(parse: Any, words: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_required_flags_are_named(rows: Path) -> None:
    words = ["--model_name_or_path", "m", "--train_data", str(rows), "--output_dir", "o"]
    for flag in (0, 2, 4):
        with pytest.raises(UsageError, match=f"{words[flag]} is required"):
            parse_command_line(words[:flag] + words[flag + 2 :], "bgem3")
    with pytest.raises(UsageError, match="--adapter is required"):
        parse_command_line(words, None)
    with pytest.raises(UsageError, match=r"train_data 'gone.jsonl' does not exist"):
        parse_command_line([*words[:2], "--train_data", "gone.jsonl", *words[4:]], "bgem3")


def test_lists_take_spaces_and_commas(parse: Any) -> None:
    assert parse("--mrl_dims 64 128 --use_mrl").loss.mrl_dims == (64, 128)
    assert parse("", "--mrl_dims", "64, 128", "--use_mrl").loss.mrl_dims == (64, 128)
    assert parse("--heads sparse,dense").model.heads == ("dense", "sparse")
    assert parse("--no_in_batch_neg stsb cls").data.no_in_batch_neg == ("stsb", "cls")
    assert parse("--optim_target_modules all-linear").training.optim_target_modules == "all-linear"


def test_datasets_without_in_batch_negatives(parse: Any) -> None:
    assert parse("--no_in_batch_neg stsb").data.no_in_batch_neg == ("stsb",)
    assert parse("--no_in_batch_neg").data.no_in_batch_neg == ("*",)


def test_formats_read_a_typed_line_break(parse: Any) -> None:
    assert parse("", "--query_instruction_format", r"{}\n{}").data.query_instruction_format == "{}\n{}"
    assert parse("", "--query_instruction_format", "--- {} -x- {}").data.query_instruction_format == "--- {} -x- {}"


def test_none_is_no_instruction(parse: Any) -> None:
    assert parse("--query_instruction_for_retrieval None").data.query_instruction_for_retrieval is None
    assert parse("--sub_batch_size -1").model.sub_batch_size is None


def test_adapter_defaults_come_before_ours_and_after_the_users(parse: Any) -> None:
    defaults = {"query_max_len": 512, "unified_finetuning": True, "warmup_steps": 0.1, "mrl_dims": [64]}
    arguments = parse("--query_max_len 64", defaults=defaults)
    assert (arguments.data.query_max_len, arguments.loss.unified_finetuning) == (64, True)
    assert arguments.training.warmup_steps == 0.1
    with pytest.raises(UsageError, match=r"default of adapter 'bgem3' for 'query_max_length' is not known"):
        parse(defaults={"query_max_length": 1})


def test_json_on_the_command_line(parse: Any, tmp_path: Path) -> None:
    file = tmp_path / "kwargs.json"
    file.write_text('{"num_cycles": 2}')
    training = parse("--lr_scheduler_type cosine --lr_scheduler_kwargs", str(file)).training
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert parse('--accelerator_config {"split_batches":true}').training.accelerator_config.split_batches


@pytest.mark.parametrize("flag", ["fp16", "bf16", "tf32", "bf16_full_eval"])
def test_precision_without_an_accelerator(parse: Any, flag: str, cpu_of) -> None:
    cpu_of(bf16=False)
    arguments = parse(f"--{flag}")
    assert not getattr(arguments.training, flag)
    assert [note for note in arguments.notes if flag in note and "fp32" in note] == arguments.notes != []


@pytest.fixture
def cpu_of(monkeypatch):
    """A machine without a GPU whose CPU has bf16 products, or has not."""
    from ultrarag.encoder import load
    from ultrarag.finetune.flags import transformers as transformers_arguments

    def make(bf16: bool) -> None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        monkeypatch.setattr(transformers_arguments, "_has_accelerator", lambda values: False)
        monkeypatch.setattr(load, "_cpu_has_bf16", lambda: bf16)

    return make


@pytest.mark.parametrize(
    ("words", "bf16"),
    [("", True), ("--bf16", True), ("--bf16 False", False), ("--fp16", False), ("--bf16 --use_cpu", True)],
)
def test_cpus_that_have_bf16_train_in_it(parse: Any, cpu_of, words: str, bf16: bool) -> None:
    cpu_of(bf16=True)
    arguments = parse(words)
    assert bool(arguments.training.bf16) is bf16
    said = any("this CPU is made for" in note for note in arguments.notes)
    assert said is (words == "")


def test_other_cpus_train_in_fp32_and_what_accelerate_chose_counts(parse: Any, cpu_of, monkeypatch) -> None:
    cpu_of(bf16=False)
    assert not parse("").training.bf16
    cpu_of(bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch --mixed_precision no` sets it
    assert not parse("").training.bf16


@pytest.mark.parametrize(
    ("launcher", "words", "trained"),
    [
        ("bf16", "", "bf16"),
        ("fp16", "", "fp16"),
        ("no", "", "no"),
        ("bf16", "--bf16 False", "no"),
        ("no", "--bf16", "bf16"),
        ("fp16", "--bf16", "bf16"),
    ],
)
def test_what_the_launcher_chose_is_a_setting_like_any(parse: Any, monkeypatch, launcher, words, trained) -> None:
    """So that the record of a run has it; a flag counts more, also where it says False."""
    from ultrarag.finetune.flags import transformers as transformers_arguments

    monkeypatch.setattr(transformers_arguments, "_has_accelerator", lambda values: True)
    monkeypatch.setattr(transformers_arguments, "_made_for_bf16", lambda accelerated: True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    training = parse(f"--use_cpu {words}").training  # no GPU is here that transformers would want for bf16
    assert training.mixed_precision == trained
    assert (training.bf16, training.fp16) == (trained == "bf16", trained == "fp16")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == launcher


def test_a_precision_of_the_launcher_that_is_not_known_is_named(parse: Any, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UsageError, match=r"ACCELERATE_MIXED_PRECISION is 'fp8'.* no, fp16 and bf16"):
        parse("")


def test_bf16_on_the_cpu_where_it_is_asked_for(parse: Any) -> None:
    arguments = parse("--bf16 --use_cpu")
    assert arguments.training.bf16
    assert arguments.notes == []


def test_deepspeed_that_is_not_installed_is_named_and_its_file_is_checked(
    parse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ours = sorted((Path(__file__).parents[3] / "resources/deepspeed").glob("ds_stage*.json"))
    assert [json.loads(path.read_text())["fp16"]["enabled"] for path in ours] == ["auto"] * 4
    with pytest.raises(UsageError, match=r"pip install deepspeed==\d"):
        parse("--deepspeed", str(ours[0]))
    with pytest.raises(UsageError, match="no such file"):
        parse("--deepspeed nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match="must be a JSON object"):
        parse("--deepspeed", str(tmp_path / "broken.json"))


def test_the_engines_configurations_that_come_with_the_package_have_short_names(parse: Any) -> None:
    for stage in range(4):
        training = parse(f"--deepspeed stage{stage}").training
        assert training.hf_deepspeed_config.config["zero_optimization"]["stage"] == stage
    assert parse("--fsdp --fsdp_config fsdp2").training.fsdp_config["version"] == 2
    with pytest.raises(UsageError, match="ours are called stage0, stage1, stage2, stage3"):
        parse("--deepspeed stage4")
    with pytest.raises(UsageError, match="ours are called fsdp2"):
        parse("--fsdp --fsdp_config fsdp1")


@pytest.mark.parametrize(
    ("words", "strategy", "eval_steps", "save_strategy", "save_steps"),
    [
        ("", "epoch", None, "epoch", 500),
        ("--eval_steps 20", "steps", 20, "steps", 20),
        ("--save_steps 50", "steps", 50, "steps", 50),
        ("--eval_steps 10 --save_steps 20", "steps", 10, "steps", 20),
        ("--evaluation_strategy steps --eval_steps 7", "steps", 7, "steps", 7),
    ],
)
def test_evaluation_keeps_the_best(
    parse: Any, rows: Path, words: str, strategy: str, eval_steps: int, save_strategy: str, save_steps: int
) -> None:
    training = parse(f"--eval_data {rows} --early_stopping_patience 3 {words}").training
    assert (training.eval_strategy, training.eval_steps) == (strategy, eval_steps)
    assert (training.save_strategy, training.save_steps) == (save_strategy, save_steps)
    assert (training.metric_for_best_model, training.greater_is_better) == ("eval_ndcg@10", True)
    assert training.load_best_model_at_end


@pytest.mark.parametrize("name", ["ndcg@10", "eval_nDCG@10", "Recall@10", "eval_mrr@10"])
def test_the_best_is_chosen_by_any_metric_that_is_measured(parse: Any, rows: Path, name: str) -> None:
    training = parse(f"--eval_data {rows} --metric_for_best_model {name}").training
    assert training.metric_for_best_model == f"eval_{name.lower().removeprefix('eval_')}"
    assert training.greater_is_better


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--metric_for_best_model eval_loss", r"eval_loss: no loss is computed .*; measured are nDCG@10, Recall@10, M"),
        ("--metric_for_best_model loss --dry_run", "model loss: no loss is computed"),
        ("--metric_for_best_model nDCG@100", r"nDCG@100: it is not measured; measured are .*did you mean 'ndcg@10'"),
        ("--greater_is_better False", "would keep the worst checkpoint"),
        ("--report_to wandb", r"--report_to wandb needs the package wandb: pip install wandb, or leave it out"),
        ("--report_to none,tensorboard --dry_run", "needs the package tensorboard: pip install tensorboard"),
        ("--log_with mlflow", "--report_to mlflow needs the package mlflow"),
        ("--report_to comet_ml", "needs the package comet-ml: pip install comet-ml"),
        ("--report_to flyte", "pip install flytekit"),
        ("--report_to azure_ml", "pip install azureml-sdk"),
        ("--report_to kubeflow", "only inside of a job of Kubeflow's"),
        ("--report_to tensorbord", "--report_to tensorbord is unknown; did you mean 'tensorboard'"),
    ],
)
def test_what_would_fail_at_the_first_evaluation_or_log_is_refused_at_the_start(
    parse: Any, rows: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)  # whatever this machine has
    with pytest.raises(UsageError, match=message):
        parse(f"--eval_data {rows} {words}")


def test_every_place_that_transformers_reports_to_is_known() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(_REPORTERS) == set(INTEGRATION_TO_CALLBACK)


def test_evaluation_without_checkpoints_says_what_is_lost(parse: Any, rows: Path) -> None:
    arguments = parse(f"--eval_data {rows} --save_strategy no")
    assert not arguments.training.load_best_model_at_end
    assert "best one cannot be kept" in arguments.notes[0]


def test_settings_without_effect_are_noted(parse: Any) -> None:
    notes = parse("--use_self_distill --mrl_dims 64 --remove_unused_columns True").notes
    assert [note.split()[0] for note in notes] == ["use_self_distill", "mrl_dims", "remove_unused_columns"]


def test_resume_takes_a_path_or_nothing(parse: Any) -> None:
    assert parse("--resume_from_checkpoint").training.resume_from_checkpoint is True
    assert parse("--resume_from_checkpoint True").training.resume_from_checkpoint is True
    assert parse("--resume_from_checkpoint o/checkpoint-5").training.resume_from_checkpoint == "o/checkpoint-5"


def test_logging_dir_goes_where_transformers_reads_it(parse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    parse("--logging_dir runs")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "runs"


def test_keywords_are_the_same_names(keywords: Any, rows: Path) -> None:
    arguments = keywords(lr=1e-5, train_group_size=4, mrl_dims=[8, 16], use_mrl=True, gradient_checkpointing=True)
    assert arguments.training.learning_rate == 1e-5
    assert arguments.loss.mrl_dims == (8, 16)
    assert arguments.data.train_data == (str(rows),)
    assert arguments.notes == ["lr is read as learning_rate 1e-05"]


def test_keywords_take_rows_as_they_are(keywords: Any) -> None:
    rows = [{"query": "q", "pos": ["p"]}]
    arguments = keywords(rows=rows, eval_data=rows)
    assert arguments.data.train_data == rows
    assert arguments.evaluation.eval_data == rows
    assert arguments.to_dict()["data"]["train_data"] == [{"rows": 1}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rat": 1}, "argument 'learning_rat' is not known; did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
        ({"train_group_size": True}, "train_group_size is True; it must be a whole number"),
        ({"query_max_len": None}, "query_max_len needs a value"),
        ({"fp16": "maybe"}, "fp16 is 'maybe'"),
        ({"adapter_name": "x"}, "'adapter_name' is not known"),
        ({"rows": []}, "train_data is required"),
        ({"rows": 3}, "train_data is 3; it must be a path, or rows"),
        ({"rows": [{"query": "q"}, "path"]}, "give paths only, or rows"),
        ({"dataset": "other.jsonl"}, "train_data and dataset set the same thing"),
        ({"lr": 1, "learning_rate": 1}, "lr and learning_rate set the same thing"),
    ],
)
def test_errors_in_keywords(keywords: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        keywords(**arguments)
    assert message in str(caught.value)


def test_to_dict_is_json_without_secrets(parse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    assert parse().model.token == "hf_environment"
    arguments = parse("--push_to_hub_token hf_pushing --heads dense --optim adafactor")
    text = json.dumps(arguments.to_dict())
    everything = text + repr(arguments) + str(arguments.notes)
    assert "hf_environment" not in everything
    assert "hf_pushing" not in everything
    assert arguments.training.hub_token == "hf_pushing"
    plain = json.loads(text)
    assert plain == arguments.to_dict()
    assert (plain["model"]["heads"], plain["training"]["optim"]) == (["dense"], "adafactor")


def test_help_lists_every_flag_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(SystemExit) as exited:
        parse_command_line(["--help"], "bgem3", {"query_max_len": 777})
    out, err = capsys.readouterr()
    assert (exited.value.code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    names = {*DROPPED, *training_flags(), "normlized", "heads", "eval_data", "lr"} - {"parallelism_config"}
    assert [name for name in sorted(names) if f"\n  --{name} " not in out] == []
    groups = [line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups[1:] == ["Run", "Model", "Data", "Loss and training of embeddings", "False negatives",
                          "Low-rank adapters", "Evaluation", "Incremental fine-tuning", "One side, or a map",
                          "transformers' TrainingArguments", "Older spellings"]  # fmt: skip
    assert "(default: 777)" in out
    assert "hf_secret" not in out


def test_the_adapter_can_be_read_first() -> None:
    assert named_adapter(["--lr", "1", "--adapter", "bgem3"]) == "bgem3"
    assert named_adapter(["--adapter=bge"]) == "bge"
    assert named_adapter(["--adapter"]) is None


def test_importing_the_settings_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, ultrarag.finetune.flags.arguments; print({'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("flags", "capability", "bf16"),
    [("", 8, True), ("", 7, False), ("--bf16 False", 9, False), ("--fp16 True", 9, False)],
)
def test_gpus_that_have_bf16_train_in_it(monkeypatch, flags, capability, bf16):
    import torch

    from ultrarag.finetune.flags import transformers as transformers_arguments

    monkeypatch.setattr(transformers_arguments, "_has_accelerator", lambda values: True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (capability, 0))
    values, notes = {"output_dir": "x", **({flags.split()[0][2:]: flags.split()[1] == "True"} if flags else {})}, []
    transformers_arguments._fit_precision(values, notes)
    assert bool(values.get("bf16")) is bf16
    assert ("bf16" in " ".join(notes)) is bf16
