"""The older and the peers' spellings of our flags, each with its translation.

Two kinds: plain renames, and flags whose value must be rewritten. Those that can no longer be had raise an error
which says what to use. They come from FlagEmbedding before 1.3, UltraRAG, RAG-Retrieval, Tevatron, and transformers 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ultrarag.errors import UsageError
from ultrarag.finetune.flags.command_line import Given
from ultrarag.finetune.flags.groups import EVERY_DATASET
from ultrarag.finetune.flags.values import Flag

GROUP = "Older spellings"

#: old name -> our name, with the same values
RENAMED = {
    # FlagEmbedding before 1.3
    "normlized": "normalize_embeddings",
    "same_task_within_batch": "same_dataset_within_batch",
    "query_instruction_for_rerank": "query_instruction_for_retrieval",
    "passage_instruction_for_rerank": "passage_instruction_for_retrieval",
    "query_instruction_format_for_rerank": "query_instruction_format",
    "passage_instruction_format_for_rerank": "passage_instruction_format",
    # RAG-Retrieval
    "dataset": "train_data",
    "train_dataset": "train_data",
    "val_dataset": "eval_data",
    "all_gather": "negatives_cross_device",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "log_with": "report_to",
    "num_max_checkpoints": "save_total_limit",
    # Tevatron
    "train_dir": "train_data",
    "q_max_len": "query_max_len",
    "p_max_len": "passage_max_len",
    "train_n_passages": "train_group_size",
    "negatives_x_device": "negatives_cross_device",
    "gc_p_chunk_size": "sub_batch_size",
    # transformers 4
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "torchdynamo": "torch_compile_backend",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "xpu_backend": "ddp_backend",
}

#: transformers' own current documentation still uses these: translating them is not worth a line on the screen
QUIET = ("gradient_checkpointing", "gradient_checkpointing_kwargs", "warmup_ratio")

Translation = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class OldFlag:
    """A flag of a peer: how its value reads, and which of our settings it becomes (none: nothing to do)."""

    flag: Flag
    translate: Translation


def own_name(name: str) -> str:
    """Our name of a flag, which may be given under an older one."""
    return RENAMED.get(name, name)


def old_flags(known: Mapping[str, Flag]) -> dict[str, OldFlag]:
    """Return every older spelling, given our flags by name."""
    renamed = {old: _rename(old, known[new]) for old, new in RENAMED.items()}
    return {**renamed, **{old.flag.name: old for old in REWRITTEN}}


def translated(given: Mapping[str, Given], flags: Mapping[str, Flag], notes: list[str]) -> dict[str, Any]:
    """Return the given settings under our names, read; `notes` get a line for each older spelling.

    Raises:
        UsageError: a value cannot be used, or two spellings set the same thing.
    """
    old = old_flags(flags)
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, item in given.items():
        # a name that transformers still has is translated all the same where it warns about it
        targets = _from_old(old[name], item, notes) if name in old else {name: item.value}
        for target, value in targets.items():
            if target in spelled:
                raise UsageError(f"{spelled[target]} and {item.spelling} set the same thing, {target}: give one")
            spelled[target] = item.spelling
            values[target] = flags[target].read(value, item.spelling)
    return values


def _from_old(old: OldFlag, item: Given, notes: list[str]) -> dict[str, Any]:
    settings = old.translate(old.flag.read(item.value, item.spelling))
    if old.flag.name not in QUIET:
        notes.append(_note(old.flag, item.spelling, settings))
    return settings


def _note(flag: Flag, spelling: str, settings: Mapping[str, Any]) -> str:
    if not settings:
        return f"{spelling} changes nothing here: {flag.help}"
    dashes = "--" if spelling.startswith("--") else ""
    became = [f"{dashes}{name} {'***' if flag.secret else _plain(value)}" for name, value in settings.items()]
    return f"{spelling} is read as {', '.join(became)}"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({len(value)} rows)" if value and isinstance(value[0], Mapping) else " ".join(map(str, value))
    return str(value)


def _rename(old: str, target: Flag) -> OldFlag:
    flag = replace(target, name=old, help=f"The same as --{target.name}.", group=GROUP)
    return OldFlag(flag, lambda value: {target.name: value})


def _old(name: str, kind: str, text: str, translate: Translation, **more: Any) -> OldFlag:
    flag = Flag(name, kind, None, text, GROUP, optional=kind != "bool", shown_default="", **more)
    return OldFlag(flag, translate)


def _when(wanted: Any, settings: Mapping[str, Any]) -> Translation:
    """Return a translation to `settings` for the value `wanted`, and to nothing for others."""
    return lambda value: dict(settings) if value == wanted else {}


def _only(harmless: tuple[Any, ...], name: str, advice: str) -> Translation:
    """Return a translation that accepts values which change nothing, and refuses others with an advice."""

    def translate(value: Any) -> dict[str, Any]:
        if value not in harmless:
            raise UsageError(f"{name} {value} is not available: {advice}")
        return {}

    return translate


def _share_of_steps(value: float) -> dict[str, Any]:
    """Return a share of the run as transformers 5 takes it: `warmup_steps` below 1."""
    if not 0 <= value < 1:
        raise UsageError(
            f"warmup_ratio is {value}; it must be at least 0 and below 1 (a number of steps: warmup_steps)"
        )
    return {"warmup_steps": value}


def _negatives(value: int) -> dict[str, Any]:
    if value < 0:
        raise UsageError(f"neg_nums is {value}; it must be at least 0")
    return {"train_group_size": value + 1}


def _mixed_precision(value: str) -> dict[str, Any]:
    return {} if value == "no" else {value: True}


_AMP = _only(("auto", "amp", "cuda_amp", "cpu_amp"), "this backend", "mixed precision comes from torch; leave it out")
_FSDP = 'give it in --fsdp_config, such as \'{"transformer_layer_cls_to_wrap": ["BertLayer"]}\''
_MERGED = "the merged model is always written, and the adapters by themselves beside it, into adapter/; leave it out"
_ACCELERATOR = "give it in --accelerator_config, such as '{\"split_batches\": false}'"

#: The flags whose values are rewritten.
REWRITTEN = (
    _old(
        "use_inbatch_neg",
        "bool",
        "False: the same as --no_in_batch_neg for all datasets.",
        _when(False, {"no_in_batch_neg": (EVERY_DATASET,)}),
    ),
    _old(
        "enable_sub_batch",
        "bool",
        "Has no effect: give --sub_batch_size its number instead.",
        lambda value: {},
    ),
    _old(
        "grad_cache",
        "bool",
        "Has no effect: --sub_batch_size (Tevatron's --gc_p_chunk_size) asks for it.",
        lambda value: {},
    ),
    _old(
        "gc_q_chunk_size",
        "int",
        "Has no effect: queries are cut as passages are, by --sub_batch_size.",
        lambda value: {},
    ),
    _old("neg_nums", "int", "Negatives per query: --train_group_size less one.", _negatives),
    _old("warmup_proportion", "float", "A share of the run: the same as --warmup_ratio.", _share_of_steps),
    _old("warmup_ratio", "float", "A share of the run, below 1: goes to --warmup_steps.", _share_of_steps),
    _old(
        "save_on_epoch_end",
        "bool",
        "The same as --save_strategy epoch.",
        _when(True, {"save_strategy": "epoch"}),
    ),
    _old(
        "mixed_precision",
        "str",
        "The same as --fp16 or --bf16.",
        _mixed_precision,
        choices=("no", "fp16", "bf16"),
    ),
    _old(
        "save_merged_lora_model",
        "bool",
        "True only: with --use_lora the merged model is always written.",
        _only((True,), "save_merged_lora_model", _MERGED),
    ),
    _old("log_interval", "int", "The same as --logging_steps.", lambda value: {"logging_steps": value}),
    _old(
        "group_by_length",
        "bool",
        "The same as --train_sampling_strategy group_by_length.",
        _when(True, {"train_sampling_strategy": "group_by_length"}),
    ),
    _old("adafactor", "bool", "The same as --optim adafactor.", _when(True, {"optim": "adafactor"})),
    _old(
        "save_safetensors",
        "bool",
        "True only: weights are always saved as safetensors.",
        _only((True,), "save_safetensors", "weights are always saved as safetensors; leave it out"),
    ),
    _old("use_mps_device", "bool", "Has no effect: an Apple GPU is used where there is one.", lambda value: {}),
    _old(
        "include_inputs_for_metrics",
        "bool",
        "The same as --include_for_metrics inputs.",
        _when(True, {"include_for_metrics": ["inputs"]}),
    ),
    _old(
        "include_tokens_per_second",
        "bool",
        "The same as --include_num_input_tokens_seen all.",
        _when(True, {"include_num_input_tokens_seen": "all"}),
    ),
    _old(
        "tpu_metrics_debug",
        "bool",
        "The same as --debug tpu_metrics_debug.",
        _when(True, {"debug": "tpu_metrics_debug"}),
    ),
    _old("half_precision_backend", "str", "Has no effect: torch does mixed precision; Apex is gone.", _AMP),
    _old("fp16_backend", "str", "Has no effect: torch does mixed precision; Apex is gone.", _AMP),
    _old("fp16_opt_level", "str", "Has no effect: it was for Apex, which is gone.", lambda value: {}),
    _old(
        "jit_mode_eval",
        "bool",
        "False only.",
        _only((False,), "jit_mode_eval", "use --torch_compile"),
    ),
    _old(
        "use_ipex",
        "bool",
        "False only.",
        _only((False,), "use_ipex", "torch itself has Intel's kernels; leave it out"),
    ),
    _old(
        "use_legacy_prediction_loop",
        "bool",
        "False only.",
        _only((False,), "use_legacy_prediction_loop", "transformers has one loop; leave it out"),
    ),
    _old(
        "past_index",
        "int",
        "-1 only.",
        _only((-1, None), "past_index", "an encoder has no past state; leave it out"),
    ),
    _old(
        "tpu_num_cores",
        "int",
        "None only.",
        _only((None,), "tpu_num_cores", "the launcher sets the number of cores; leave it out"),
    ),
    _old(
        "mp_parameters",
        "str",
        "Empty only.",
        _only(("", None), "mp_parameters", "use --fsdp or --deepspeed"),
    ),
    _old("ray_scope", "str", "Has no effect: it was for hyperparameter search with Ray.", lambda value: {}),
    _old("sharded_ddp", "str", "Empty only.", _only(("", None), "sharded_ddp", "use --fsdp or --deepspeed")),
    _old(
        "fsdp_min_num_params",
        "int",
        "0 only: goes into --fsdp_config.",
        _only((0, None), "fsdp_min_num_params", "give it in --fsdp_config, such as '{\"min_num_params\": 1000000}'"),
    ),
    _old(
        "fsdp_transformer_layer_cls_to_wrap",
        "str",
        "Goes into --fsdp_config.",
        _only((None,), "fsdp_transformer_layer_cls_to_wrap", _FSDP),
    ),
    _old(
        "split_batches",
        "bool",
        "False only: goes into --accelerator_config.",
        _only((False,), "split_batches", _ACCELERATOR),
    ),
    _old(
        "dispatch_batches",
        "str_or_bool",
        "None only: goes into --accelerator_config.",
        _only((None,), "dispatch_batches", _ACCELERATOR),
    ),
    _old(
        "push_to_hub_organization",
        "str",
        "None only: goes into --hub_model_id.",
        _only((None,), "push_to_hub_organization", "give --hub_model_id ORGANIZATION/NAME"),
    ),
)
