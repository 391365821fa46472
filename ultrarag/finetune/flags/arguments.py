"""FinetuneArguments: everything a fine-tuning run was told, from the command line or from keywords.

Both doors know the same names: our settings (`flags`, `loss_arguments`), transformers' TrainingArguments, and the
older spellings of the peers (`aliases`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from ultrarag.errors import UsageError
from ultrarag.finetune.flags.aliases import QUIET, OldFlag, old_flags
from ultrarag.finetune.flags.command_line import (
    Given,
    named_adapter,
    program_name,
    read_command_line,
    refuse_unknown,
    with_defaults,
)
from ultrarag.finetune.flags.learning import FalseNegativeArguments, IncrementalArguments, check_merge
from ultrarag.finetune.flags.own import DataArguments, EvaluationArguments, LoraArguments, ModelArguments
from ultrarag.finetune.flags.transformers import build_training_arguments, described, training_flags
from ultrarag.finetune.flags.values import Flag, flags_of
from ultrarag.loss_arguments import LossArguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = [
    "DataArguments",
    "EvaluationArguments",
    "FalseNegativeArguments",
    "FinetuneArguments",
    "IncrementalArguments",
    "LoraArguments",
    "LossArguments",
    "ModelArguments",
    "from_keywords",
    "named_adapter",
    "parse_command_line",
]

_OWN = {
    "Model": ModelArguments,
    "Data": DataArguments,
    "Loss and training of embeddings": LossArguments,
    "False negatives": FalseNegativeArguments,
    "Low-rank adapters": LoraArguments,
    "Evaluation": EvaluationArguments,
    "Incremental fine-tuning": IncrementalArguments,
}

_RUN = {
    flag.name: flag
    for flag in (
        Flag("adapter", "str", None, "The kind of model, such as bgem3.", "Run", metavar="NAME"),
        Flag(
            "output_dir",
            "str",
            None,
            "Where the finished model and the checkpoints go.",
            "Run",
            metavar="DIR",
            shown_default="required",
        ),
        Flag(
            "overwrite_output_dir",
            "bool",
            False,
            "Write into an output directory that already holds a model or checkpoints.",
            "Run",
        ),
        Flag("skip_data_check", "bool", False, "Do not look for faults in the rows before training.", "Run"),
        Flag(
            "dry_run",
            "bool",
            False,
            "Print the first batch exactly as the model will see it, and stop: nothing is trained or written.",
            "Run",
        ),
        Flag("logging_dir", "str", None, "TensorBoard's directory.", "Run", optional=True, metavar="DIR"),
    )
}


@dataclass
class FinetuneArguments:
    """The settings of one fine-tuning run, checked."""

    adapter: str
    model: ModelArguments
    data: DataArguments
    loss: LossArguments
    lora: LoraArguments
    evaluation: EvaluationArguments
    training: TrainingArguments
    false_negatives: FalseNegativeArguments = field(default_factory=FalseNegativeArguments)
    incremental: IncrementalArguments = field(default_factory=IncrementalArguments)
    #: write into an output directory that holds a model or checkpoints
    overwrite_output_dir: bool = False
    #: do not look for faults in the rows before training
    skip_data_check: bool = False
    #: find out how many queries fit into memory
    auto_batch_size: bool = False
    #: render the first batch, and stop
    dry_run: bool = False
    #: what was translated or changed, one line each; for the first process to print
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON values, without secrets; rows given in memory are only counted."""
        values = {
            "adapter": self.adapter,
            "overwrite_output_dir": self.overwrite_output_dir,
            "model": _without_secrets(self.model),
            "data": _without_secrets(self.data, "train_data"),
            "loss": asdict(self.loss),
            "lora": asdict(self.lora),
            "evaluation": _without_secrets(self.evaluation, "eval_data"),
            "false_negatives": asdict(self.false_negatives),
            "incremental": _without_secrets(self.incremental, "replay_data", "guard_data"),
            "training": described(self.training),
        }
        plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return plain


def parse_command_line(
    argv: Sequence[str], adapter: str | None, defaults: Mapping[str, Any] | None = None
) -> FinetuneArguments:
    """Return the settings that `argv` (without the program's name) asks for; `--help` prints and exits with 0.

    Args:
        argv: the words of the command line.
        adapter: the adapter's name where the command fixes it; None: `--adapter` names it.
        defaults: the adapter's own defaults, by the names of flags.

    Raises:
        UsageError: for a flag that is unknown (names the nearest), given twice, or has an unusable value.
    """
    flags = _settings()
    known = with_defaults(flags, defaults or {})
    old = old_flags(known)
    everything = {**known, **{name: item.flag for name, item in old.items()}}
    given = read_command_line(argv, everything, program_name(adapter))
    return _assemble(given, adapter, defaults or {}, flags)


def from_keywords(
    model: str | os.PathLike[str],
    train_data: Any,
    output_dir: str | os.PathLike[str],
    adapter: str,
    defaults: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> FinetuneArguments:
    """Return the settings that the keywords of `finetune()` ask for.

    Args:
        model: a directory, or a name on the Hub.
        train_data: a path, a list of paths, or a list of rows (dicts, kept as they are).
        output_dir: where the finished model goes.
        adapter: the adapter's name.
        defaults: the adapter's own defaults, by the names of flags.
        arguments: anything that the command line has, under the same names.

    Raises:
        UsageError: for a name that is unknown (names the nearest), or a value that cannot be used.
    """
    flags = _settings()
    everything = {**flags, **{name: item.flag for name, item in old_flags(flags).items()}}
    refuse_unknown(arguments, everything, "argument")
    named = {"model_name_or_path": model, "train_data": train_data, "output_dir": output_dir}
    given = [Given(name, value) for name, value in [*named.items(), *arguments.items()]]
    twice = [item.spelling for item in given if item.spelling in named and item.spelling in arguments]
    if twice:
        raise UsageError(f"{twice[0]} is given twice")
    return _assemble({item.spelling: item for item in given}, adapter, defaults or {}, flags)


def _settings() -> dict[str, Flag]:
    """Return every flag that is not an older spelling, in the order of the help."""
    own = [flag for group, arguments in _OWN.items() for flag in flags_of(arguments, group).values()]
    # a name that two groups share is one flag, described by the later one
    flags = {**_RUN, **{flag.name: flag for flag in own}}
    return {**flags, **{name: flag for name, flag in training_flags().items() if name not in flags}}


def _assemble(
    given: Mapping[str, Given], adapter: str | None, defaults: Mapping[str, Any], flags: Mapping[str, Flag]
) -> FinetuneArguments:
    refuse_unknown(defaults, flags, f"the default of adapter '{adapter}' for")
    notes: list[str] = []
    chosen = _translated(given, flags, notes)
    values = {
        name: flags[name].read(value, f"the default of adapter '{adapter}' for {name}")
        for name, value in defaults.items()
    }
    values.update(chosen)
    return _bundle(values, _the_adapter(adapter, values.pop("adapter", None)), notes)


def _translated(given: Mapping[str, Given], flags: Mapping[str, Flag], notes: list[str]) -> dict[str, Any]:
    """Return the given settings under our names, read; older spellings are told in `notes`."""
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


def _the_adapter(fixed: str | None, named: str | None) -> str:
    if fixed and named and fixed != named:
        raise UsageError(
            f"this command trains adapter '{fixed}'; for '{named}' use ultrarag.finetune --adapter {named}"
        )
    if not (fixed or named):
        raise UsageError("--adapter is required: the kind of model, such as bgem3")
    return str(fixed or named)


def _bundle(values: dict[str, Any], adapter: str, notes: list[str]) -> FinetuneArguments:
    own = {kind: _pick(values, kind) for kind in _OWN.values()}
    model, data = ModelArguments(**own[ModelArguments]), DataArguments(**own[DataArguments])
    loss, evaluation = LossArguments(**own[LossArguments]), EvaluationArguments(**own[EvaluationArguments])
    lora = LoraArguments(**own[LoraArguments])
    notes += _without_effect(loss, values)
    run = {name: values.pop(name, False) for name in ("overwrite_output_dir", "skip_data_check", "dry_run")}
    masks = FalseNegativeArguments(**own[FalseNegativeArguments])
    incremental = IncrementalArguments(**own[IncrementalArguments])
    check_merge(incremental, evaluation.eval_data, values)
    ours = {name for chosen in own.values() for name in chosen}
    rest = {name: value for name, value in values.items() if name not in ours}
    if rest.get("per_device_train_batch_size") == "auto":
        run["auto_batch_size"] = bool(rest.pop("per_device_train_batch_size"))
    training = build_training_arguments(rest, evaluation.eval_data is not None, notes)
    return FinetuneArguments(
        adapter, model, data, loss, lora, evaluation, training, masks, incremental, **run, notes=notes
    )


def _pick(values: Mapping[str, Any], arguments: type) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(arguments) if item.name in values}


def _without_effect(loss: LossArguments, values: Mapping[str, Any]) -> list[str]:
    notes = []
    if loss.use_self_distill and not loss.unified_finetuning:
        notes.append("use_self_distill has no effect without unified_finetuning")
    if loss.mrl_dims and not loss.use_mrl:
        notes.append("mrl_dims has no effect without use_mrl")
    return notes


def _without_secrets(arguments: Any, *data: str) -> dict[str, Any]:
    """Return a dataclass as a dict without its token, and with rows in the fields `data` counted."""
    counted = {}
    for name in data:
        held = getattr(arguments, name)
        if held and not isinstance(held, str) and isinstance(held[0], Mapping):
            counted[name] = ({"rows": len(held)},)
    plain = asdict(replace(arguments, **counted) if counted else arguments)
    return {name: value for name, value in plain.items() if not name.endswith("token")}
