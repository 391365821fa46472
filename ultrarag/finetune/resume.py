"""Going on from a checkpoint: the arguments of the run that wrote it, compared with those that are given now.

Whatever shapes the weights is refused when it differs, unless it is named here: free is what changes no weight, taken
over is what means the same in the middle of a run as at its start. An argument that nobody has thought of is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import Training, read_manifest
from ultrarag.errors import UsageError

#: Not in an argument's place but found in it: which steps an earlier part of the run made, and with which values.
EARLIER = "earlier"
#: Changes no weight of the steps that follow. The data and the parent are compared by their digests, not their names.
_FREE = {
    *("overwrite_output_dir", "model.model_name_or_path", "model.cache_dir", "model.trust_remote_code"),
    *("model.peak_tflops", "data.train_data", "data.cache_path", "evaluation.shared_eval_data"),
    # these come after the last step
    *("incremental.allow_seen_data", "incremental.guard_data", "incremental.max_forgetting"),
    *("incremental.merge_weight", "incremental.merge_with", "incremental.replay_data"),
    *(
        f"training.{name}"
        for name in (
            *("output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "run_name", "project"),
            *("report_to", "debug", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node"),
            *("logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy"),
            *("save_on_each_node", "save_only_model", "save_steps", "save_strategy", "save_total_limit"),
            *("enable_jit_checkpoint", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision"),
            *("hub_strategy", "push_to_hub", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"),
            *("dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers"),
            *("dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
            *("ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters"),
            *("ddp_static_graph", "ddp_timeout", "local_rank", "skip_memory_metrics", "torch_empty_cache_steps"),
            *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches"),
            *("eval_use_gather_object", "batch_eval_metrics", "include_for_metrics", "prediction_loss_only"),
            *("label_names", "length_column_name", "remove_unused_columns", "use_cache"),
        )
    ),
}
#: May change in the middle: how long the run is, how it fits into memory, where it computes, and when it is measured.
_TAKEN_OVER = {
    "model.sub_batch_size",
    "model.sub_batch_tokens",
    *(
        f"training.{name}"
        for name in (
            *("num_train_epochs", "max_steps", "use_cpu"),
            *("activation_checkpointing", "activation_checkpointing_kwargs"),
            *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
            *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
        )
    ),
}


def total_steps(steps_per_epoch: int, accumulation: int, epochs: float, max_steps: int) -> int:
    """How many steps a run has, as transformers counts them.

    Args:
        steps_per_epoch: batches.
        accumulation: batches of a step.
        max_steps: not above 0: the epochs decide.

    Example:
        >>> total_steps(5, 2, 3.0, -1)
        9
    """
    return max_steps if max_steps > 0 else math.ceil(epochs * max(1, math.ceil(steps_per_epoch / accumulation)))


def continued(resume: Path, record: Training, steps: int, note: Callable[[str], None]) -> Training:
    """Return the record of a run that goes on, with what its earlier parts had otherwise.

    Args:
        resume: the checkpoint.
        record: what is given now.
        steps: how many the whole run shall have.
        note: gets a line for what is taken over in the middle of the run.

    Raises:
        UsageError: something that shapes the weights is another (names it), the run would end before the checkpoint,
            or the checkpoint holds no record of its run.
    """
    earlier = _earlier(resume)
    then, now = _flat(earlier), _flat(record)
    different = {name: then[name] for name in now if name in then and then[name] != now[name]}
    refused = [name for name in different if name not in _FREE | _TAKEN_OVER]
    if refused:
        raise UsageError(
            f"the run in {resume} cannot be resumed with other data or arguments "
            f"({'; '.join(_change(name, then, now) for name in refused)}); "
            "give the same values, or start anew in another output_dir"
        )
    if steps < earlier.steps:
        raise UsageError(
            f"the run in {resume} has made {earlier.steps} steps, and --max_steps or --num_train_epochs ask for "
            f"{steps} in all: give more, resume from an earlier checkpoint, or start anew in another output_dir"
        )
    unknown = sorted(name for name in now.keys() - then.keys() if name not in _FREE)
    if unknown:
        note(f"{resume} does not record {', '.join(unknown)}: going on with what is given now")
    taken = {name: value for name, value in different.items() if name in _TAKEN_OVER}
    for name in taken:
        note(f"from step {earlier.steps + 1} on with another {_change(name, then, now)}")
    return _with_earlier(record, earlier, taken)


def _earlier(resume: Path) -> Training:
    manifest = read_manifest(resume)
    if manifest is None or manifest.training is None:
        raise UsageError(f"{resume} holds no record of its run (ultrarag.json), so it cannot be resumed")
    return manifest.training


def _flat(record: Training) -> dict[str, Any]:
    """Every argument under GROUP.NAME, and what stands for the data and the model that the run began with."""
    data = sorted({(item["sha256"][:12], bool(item.get("replay"))) for item in record.data})
    digests = [f"{digest} (replay)" if replay else digest for digest, replay in data]
    return {**dict(_arguments(record.arguments)), "parent": record.parent[:12], "data": digests}


def _arguments(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for group, value in arguments.items():
        if isinstance(value, Mapping):
            yield from ((f"{group}.{name}", item) for name, item in value.items())
        elif group != EARLIER:
            yield group, value


def _change(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    values = [value if isinstance(value, str) else json.dumps(value) for value in (then[name], now[name])]
    return f"{name.split('.')[-1]}: {values[0]} then, {values[1]} now"


def _with_earlier(record: Training, earlier: Training, taken: Mapping[str, Any]) -> Training:
    """Add the values that held until here to the record; each range of steps tells how it differs from the last one."""
    ranges: list[dict[str, Any]] = list(earlier.arguments.get(EARLIER, ()))
    if taken:
        first = ranges[-1]["last_step"] + 1 if ranges else 1
        ranges = [{**item, "arguments": {**taken, **item["arguments"]}} for item in ranges]
        ranges.append({"first_step": first, "last_step": earlier.steps, "arguments": dict(taken)})
    return replace(record, arguments={**record.arguments, EARLIER: ranges}) if ranges else record
