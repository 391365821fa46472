"""transformers' TrainingArguments, as flags and as the object: our defaults, this machine's precision, DeepSpeed."""

from __future__ import annotations

import importlib.util
import os
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.evaluation import DEFAULT_METRICS, MAIN_METRIC
from ultrarag.finetune.flags.values import Flag, flags_of
from ultrarag.packages import install, quiet_deepspeed

if TYPE_CHECKING:
    from transformers import TrainingArguments


GROUP = "transformers' TrainingArguments"

#: Where our default is not transformers'.
DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    # a share of all steps: fifty points of the report's loss curve, however long the run
    "logging_steps": 0.02,
    # every head that is trained gets a gradient at every step
    "ddp_find_unused_parameters": False,
    # our rows are no columns of the model's forward
    "remove_unused_columns": False,
}

_LOW_PRECISION = ("fp16", "bf16", "tf32", "fp16_full_eval", "bf16_full_eval")
#: How `accelerate launch --mixed_precision` tells its processes.
_LAUNCHERS_PRECISION = "ACCELERATE_MIXED_PRECISION"


def training_flags() -> dict[str, Flag]:
    """Return a flag for every field of the TrainingArguments installed."""
    from transformers import TrainingArguments

    flags = flags_of(TrainingArguments, GROUP)
    for name, default in DEFAULTS.items():
        flags[name] = replace(flags[name], default=default)
    flags["report_to"] = replace(flags["report_to"], split=True)
    size = flags["per_device_train_batch_size"]
    flags[size.name] = replace(size, kind="int_or_auto", help=f"{size.help} auto: as many as fit into memory.")
    flags["disable_tqdm"] = replace(flags["disable_tqdm"], shown_default="True where stderr is no terminal")
    for name, engine in (("deepspeed", "deepspeed"), ("fsdp_config", "fsdp")):
        flags[name] = _with_files(flags[name], engine_files(engine))
    flags["fsdp"] = replace(flags["fsdp"], kind="str_or_bool", bare=True)
    flags["resume_from_checkpoint"] = replace(
        flags["resume_from_checkpoint"],
        kind="str_or_bool",
        bare=True,
        help="Go on from this checkpoint; without a value: from the last one in the output directory.",
    )
    return flags


def _with_files(flag: Flag, files: Mapping[str, str]) -> Flag:
    return replace(flag, files=files, help=f"{flag.help.rstrip('.')}. Ours: {', '.join(files)}.")


def build_training_arguments(settings: Mapping[str, Any], has_eval_data: bool, notes: list[str]) -> TrainingArguments:
    """Return TrainingArguments for the settings that were given; `notes` get a line for each that is changed.

    Raises:
        UsageError: when transformers refuses them, or they do not fit together or this installation.
    """
    from transformers import TrainingArguments

    values = {**DEFAULTS, "disable_tqdm": not sys.stderr.isatty(), **settings}
    _check_numbers(values)
    check_reporters(values["report_to"])
    check_best_metric(values)
    _keep_columns(values, notes)
    _move_logging_dir(values)
    _fit_precision(values, notes)
    _plan_evaluation(values, has_eval_data, notes)
    prepare_deepspeed(trains=bool(values.get("deepspeed")))
    try:
        with _launcher_unheard():
            return TrainingArguments(**values)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"transformers refuses these arguments: {error}") from error


def _check_numbers(values: Mapping[str, Any]) -> None:
    if not values.get("output_dir"):
        raise UsageError("--output_dir is required: the directory for the finished model and its checkpoints")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if values.get(name, 1) < 1:
            raise UsageError(f"{name} is {values[name]}; it must be at least 1")
    if values.get("num_train_epochs", 1) <= 0 and values.get("max_steps", -1) <= 0:
        raise UsageError(f"num_train_epochs is {values['num_train_epochs']}; it must be above 0")
    if values.get("learning_rate", 1) < 0:
        raise UsageError(f"learning_rate is {values['learning_rate']}; it must not be negative")


def _keep_columns(values: dict[str, Any], notes: list[str]) -> None:
    if values["remove_unused_columns"]:
        notes.append("remove_unused_columns has no effect: the rows hold no columns of the model")
        values["remove_unused_columns"] = False


def _move_logging_dir(values: dict[str, Any]) -> None:
    directory = values.pop("logging_dir", None)
    if directory:
        os.environ["TENSORBOARD_LOGGING_DIR"] = directory  # transformers 5 reads it from nowhere else


def _fit_precision(values: dict[str, Any], notes: list[str]) -> None:
    """Train in bf16 where the device is made for it and no precision was chosen; without what needs a GPU on a CPU."""
    _hear_launcher(values)
    asked = [name for name in _LOW_PRECISION if values.get(name)]
    accelerated = _has_accelerator(values)
    made_for_bf16 = _made_for_bf16(accelerated)
    if not accelerated:
        _stay_on_cpu(values, asked, made_for_bf16, notes)
    if not _precision_chosen(values) and not values.get("deepspeed") and made_for_bf16:
        values["bf16"] = True
        which = "GPU" if accelerated else "CPU"
        notes.append(
            f"training in bf16, which this {which} is made for (float32 weights and optimizer; --bf16 False: fp32)"
        )


def _precision_chosen(values: Mapping[str, Any]) -> bool:
    return any(values.get(name) is not None for name in ("bf16", "fp16"))


def _hear_launcher(values: dict[str, Any]) -> None:
    """Make flags of what the launcher chose: no record of a run shows its environment, which a resume may lack."""
    chosen = os.environ.get(_LAUNCHERS_PRECISION)
    if chosen is None or _precision_chosen(values):
        return
    if chosen not in ("no", "fp16", "bf16"):
        raise UsageError(
            f"the environment variable {_LAUNCHERS_PRECISION} is '{chosen}'; a fine-tune knows no, fp16 and bf16"
        )
    values.update(fp16=chosen == "fp16", bf16=chosen == "bf16")


@contextmanager
def _launcher_unheard() -> Iterator[None]:
    """Without the launcher's precision, which transformers would prefer to a flag that says False."""
    chosen = os.environ.pop(_LAUNCHERS_PRECISION, None)
    try:
        yield
    finally:
        if chosen is not None:
            os.environ[_LAUNCHERS_PRECISION] = chosen


def _stay_on_cpu(values: dict[str, Any], asked: list[str], made_for_bf16: bool, notes: list[str]) -> None:
    """Switch off the precisions that need an accelerator; bf16 only where it is slow, and the CPU was not asked for."""
    on_cpu = bool(values.get("use_cpu"))
    values["use_cpu"] = True  # without it several processes on a CPU would not know of each other
    if on_cpu or made_for_bf16:
        asked = [name for name in asked if not name.startswith("bf16")]
    for name in asked:
        values[name] = False if name != "tf32" else None
    if asked:
        hint = "" if on_cpu else "; bf16 on a CPU: give --use_cpu --bf16"
        notes.append(f"{', '.join(asked)} needs a GPU and none is used here: training in fp32{hint}")


def _made_for_bf16(accelerated: bool) -> bool:
    """Whether the device multiplies bf16 in hardware: GPUs since Ampere, CPUs with AMX or AVX512-BF16."""
    import torch

    from ultrarag.encoder import fastest_precision

    if accelerated and not torch.cuda.is_available():
        return False
    return fastest_precision(torch.device("cuda" if accelerated else "cpu")) == "bf16"


def _has_accelerator(values: Mapping[str, Any]) -> bool:
    import torch

    return not values.get("use_cpu") and torch.accelerator.is_available()


def _plan_evaluation(values: dict[str, Any], has_eval_data: bool, notes: list[str]) -> None:
    """Fill in when to evaluate and save, so that the best checkpoint is kept."""
    if not has_eval_data:
        _refuse_without_eval_data(values)
        return
    strategy = values.setdefault("eval_strategy", _eval_strategy(values))
    if strategy == "no":
        return
    values.setdefault("save_strategy", strategy)
    if strategy == "steps":
        every = values.setdefault("eval_steps", values.get("save_steps", 500))
        values.setdefault("save_steps", every)
    values.setdefault("metric_for_best_model", BEST_METRIC)
    if values["save_strategy"] == "no":
        notes.append("save_strategy no: checkpoints are not saved, so that the best one cannot be kept")
    values.setdefault("load_best_model_at_end", values["save_strategy"] != "no")


def _eval_strategy(values: Mapping[str, Any]) -> str:
    if values.get("eval_steps") or values.get("save_strategy") == "steps":
        return "steps"
    by_steps = "save_steps" in values and "save_strategy" not in values
    return "steps" if by_steps else "epoch"


def _refuse_without_eval_data(values: Mapping[str, Any]) -> None:
    asked = [name for name in ("load_best_model_at_end", "eval_on_start") if values.get(name)]
    if values.get("eval_strategy", "no") != "no":
        asked.append("eval_strategy")
    if asked:
        raise UsageError(f"{asked[0]} needs --eval_data, the held-out data to evaluate on")


def refuse_unsupported_training(training: TrainingArguments) -> None:
    """Refuse flags of transformers that could not do here what they say.

    Raises:
        UsageError: names the first of them.
    """
    refused = {
        "auto_find_batch_size": "use --sub_batch_size, which changes memory but not the loss",
        "label_smoothing_factor": "the contrastive loss has no smoothed labels",
        "include_num_input_tokens_seen": "token counts are not kept",
        "neftune_noise_alpha": "noise on embeddings would change the loss that is compared with the peers'",
    }
    for name, why in refused.items():
        if getattr(training, name, None) not in (None, False, 0, 0.0, "no"):
            raise UsageError(f"--{name} is not supported by this trainer: {why}")
    if training.train_sampling_strategy not in ("random", "group_by_length"):
        raise UsageError(
            f"--train_sampling_strategy {training.train_sampling_strategy} is not supported: rows come in random "
            "order, or group_by_length"
        )
    if training.fsdp:
        _check_fsdp(training)


def _check_fsdp(training: TrainingArguments) -> None:
    config = training.fsdp_config
    if isinstance(config, dict) and int(config.get("version", 2)) != 2:
        raise UsageError('--fsdp: version 1 in fsdp_config is not supported; give {"version": 2}, or leave it out')
    if training.world_size == 1:
        raise UsageError("--fsdp shards the weights over processes and there is one: start with torchrun")


def described(training: TrainingArguments) -> dict[str, Any]:
    """Return the arguments as plain values, without secrets."""
    values = typing.cast(dict[str, Any], training.to_dict())
    return {name: value for name, value in values.items() if not name.endswith("token")}


_RESOURCES = Path(__file__).parents[2] / "resources"


def engine_files(engine: str) -> dict[str, str]:
    """Return our configurations of an engine by their short names: stage1 is ds_stage1.json of "deepspeed"."""
    files = sorted((_RESOURCES / engine).glob("*.json"))
    return {file.stem.removeprefix("ds_"): str(file) for file in files}


def prepare_deepspeed(trains: bool) -> None:
    """Keep DeepSpeed from printing and compiling where there is no GPU; call it before anything imports it.

    Args:
        trains: whether it was asked for; accelerate imports it in every run, if it is installed.

    Raises:
        UsageError: it was asked for and is not installed.
    """
    if trains and importlib.util.find_spec("deepspeed") is None:
        raise UsageError(f"--deepspeed needs the package deepspeed: {install('deepspeed')}")
    quiet_deepspeed()
    if trains and os.environ.get("DS_ACCELERATOR") == "cpu":
        _reduce_over_gloo()


def _reduce_over_gloo() -> None:
    """Leave out the reduction through shared memory: it is compiled when first used, in a minute and with g++."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


#: where --report_to may report, and the package that it takes; None: nothing to install, the surroundings give it
_REPORTERS = {
    "azure_ml": "azureml-sdk",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": None,
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
#: where transformers asks for a reporter by another name than its own
_ASKED_AS = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
#: the default, as the log names it
BEST_METRIC = f"eval_{MAIN_METRIC.lower()}"


def logged_metric(name: str) -> str:
    """Return the name under which an evaluation between steps logs a metric, in place of any spelling of it.

    Raises:
        UsageError: it is none of those that are measured.

    Example:
        >>> logged_metric("nDCG@10")
        'eval_ndcg@10'
    """
    known = {metric.lower(): metric for metric in DEFAULT_METRICS}
    plain = name.lower().removeprefix("eval_")
    if plain in known:
        return f"eval_{plain}"
    why = "no loss is computed on the held-out data" if plain == "loss" else "it is not measured"
    raise UsageError(
        f"--metric_for_best_model {name}: {why}; measured are {', '.join(DEFAULT_METRICS)}{did_you_mean(plain, known)}"
    )


def check_best_metric(values: dict[str, Any]) -> None:
    """Put the metric's name as the log has it; refuse one that is not measured, or less of which would be better.

    Raises:
        UsageError: see there.
    """
    if values.get("metric_for_best_model") is not None:
        values["metric_for_best_model"] = logged_metric(values["metric_for_best_model"])
    if values.get("greater_is_better") is False:
        raise UsageError(
            f"--greater_is_better False would keep the worst checkpoint: more is better of {', '.join(DEFAULT_METRICS)}"
            "; leave it out"
        )


def check_reporters(asked: str | Iterable[str] | None) -> None:
    """Refuse a place to report to that is unknown or not installed.

    Raises:
        UsageError: names the package.
    """
    for name in [asked] if isinstance(asked, str) else asked or []:
        if name in ("all", "none"):
            continue
        if name not in _REPORTERS:
            known = ", ".join([*_REPORTERS, "all", "none"])
            raise UsageError(f"--report_to {name} is unknown{did_you_mean(name, _REPORTERS)}; known are {known}")
        if not _available(name):
            raise UsageError(f"--report_to {name} {_needs(name)}, or leave it out")


def _available(name: str) -> bool:
    from transformers.integrations import integration_utils

    return bool(getattr(integration_utils, f"is_{_ASKED_AS.get(name, name)}_available")())


def _needs(name: str) -> str:
    package = _REPORTERS[name]
    if package is None:
        return "works only inside of a job of Kubeflow's (KUBEFLOW_TRAINER_SERVER_URL is not set): start it there"
    return f"needs the package {package.replace(' ', ' and ')}: pip install {package}"
