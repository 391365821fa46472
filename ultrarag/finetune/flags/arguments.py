"""FinetuneArguments: every setting of a fine-tuning run, from the command line or from keywords, checked.

Both doors know the same names: our settings (`groups`, `loss_arguments`), transformers' TrainingArguments, and the
older spellings of the peers (`aliases`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from ultrarag.errors import UsageError
from ultrarag.finetune.flags.aliases import old_flags, translated
from ultrarag.finetune.flags.command_line import (
    Given,
    program_name,
    read_command_line,
    refuse_unknown,
    with_defaults,
)
from ultrarag.finetune.flags.groups import (
    AUTO,
    PARENT,
    DataArguments,
    EvaluationArguments,
    FalseNegativeArguments,
    IncrementalArguments,
    LoraArguments,
    ModelArguments,
)
from ultrarag.finetune.flags.sides import SideArguments
from ultrarag.finetune.flags.transformers import (
    build_training_arguments,
    described,
    refuse_unsupported_training,
    training_flags,
)
from ultrarag.finetune.flags.values import Flag, flags_of
from ultrarag.loss_arguments import LossArguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

_OWN = {
    "Model": ModelArguments,
    "Data": DataArguments,
    "Loss and training of embeddings": LossArguments,
    "False negatives": FalseNegativeArguments,
    "Low-rank adapters": LoraArguments,
    "Evaluation": EvaluationArguments,
    "Incremental fine-tuning": IncrementalArguments,
    "One side, or a map": SideArguments,
}

_RUN = {
    flag.name: flag
    for flag in (
        Flag("adapter", "str", None, "The kind of model; default: what its files say.", "Run", metavar="NAME"),
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


#: From the settings given, by the names of flags: an adapter, and its own defaults.
Choose = Callable[[Mapping[str, Any]], tuple[str, Mapping[str, Any]]]


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
    sides: SideArguments = field(default_factory=SideArguments)
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
            "sides": self.sides.to_dict(),
            "training": described(self.training),
        }
        plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return plain


def parse_command_line(
    argv: Sequence[str],
    adapter: str | None,
    defaults: Mapping[str, Any] | None = None,
    choose: Choose | None = None,
) -> FinetuneArguments:
    """Return the settings that `argv` (without the program's name) asks for; `--help` prints and exits with 0.

    Args:
        argv: the words of the command line.
        adapter: the adapter's name where the command fixes it; None: `--adapter` names it.
        defaults: the adapter's own defaults, by the names of flags.
        choose: finds the adapter where none is named.

    Raises:
        UsageError: for a flag that is unknown (names the nearest), given twice, or has an unusable value.
    """
    flags = _settings()
    known = with_defaults(flags, defaults or {})
    old = old_flags(known)
    everything = {**known, **{name: item.flag for name, item in old.items()}}
    given = read_command_line(argv, everything, program_name())
    return _assemble(given, adapter, defaults or {}, flags, choose)


def from_keywords(
    model: str | os.PathLike[str],
    train_data: Any,
    output_dir: str | os.PathLike[str],
    adapter: str | None,
    defaults: Mapping[str, Any] | None = None,
    choose: Choose | None = None,
    **arguments: Any,
) -> FinetuneArguments:
    """Return the settings that the keywords of `finetune()` ask for.

    Args:
        model: a directory, or a name on the Hub.
        train_data: a path, a list of paths, or a list of rows (dicts, kept as they are).
        output_dir: where the finished model goes.
        adapter: the adapter's name; None: `choose` finds it.
        defaults: the adapter's own defaults, by the names of flags.
        choose: finds the adapter where none is named.
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
    return _assemble({item.spelling: item for item in given}, adapter, defaults or {}, flags, choose)


def _settings() -> dict[str, Flag]:
    """Return every flag that is not an older spelling, in the order of the help."""
    own = [flag for group, arguments in _OWN.items() for flag in flags_of(arguments, group).values()]
    # a name that two groups share is one flag, described by the later one
    flags = {**_RUN, **{flag.name: flag for flag in own}}
    return {**flags, **{name: flag for name, flag in training_flags().items() if name not in flags}}


def _assemble(
    given: Mapping[str, Given],
    adapter: str | None,
    defaults: Mapping[str, Any],
    flags: Mapping[str, Flag],
    choose: Choose | None,
) -> FinetuneArguments:
    notes: list[str] = []
    chosen = translated(given, flags, notes)
    if choose and not adapter and not chosen.get("adapter") and chosen.get("model_name_or_path"):
        adapter, defaults = choose(chosen)
    refuse_unknown(defaults, flags, f"the default of adapter '{adapter}' for")
    values = {
        name: flags[name].read(value, f"the default of adapter '{adapter}' for {name}")
        for name, value in defaults.items()
    }
    values.update(chosen)
    return _bundle(values, _the_adapter(adapter, values.pop("adapter", None), values.get("model_name_or_path")), notes)


def _the_adapter(fixed: str | None, named: str | None, model: object) -> str:
    if fixed and named and fixed != named:
        raise UsageError(
            f"this command trains adapter '{fixed}'; for '{named}' use ultrarag.finetune --adapter {named}"
        )
    if not (fixed or named) and model:
        raise UsageError("--adapter is required: the kind of model, such as bgem3")
    return str(fixed or named or "")  # without a model, which is the first thing to name


def _bundle(values: dict[str, Any], adapter: str, notes: list[str]) -> FinetuneArguments:
    own = {kind: _pick(values, kind) for kind in _OWN.values()}
    model, data = ModelArguments(**own[ModelArguments]), DataArguments(**own[DataArguments])
    loss, evaluation = LossArguments(**own[LossArguments]), EvaluationArguments(**own[EvaluationArguments])
    lora = LoraArguments(**own[LoraArguments])
    notes += _without_effect(loss, values)
    run = {name: values.pop(name, False) for name in ("overwrite_output_dir", "skip_data_check", "dry_run")}
    masks = FalseNegativeArguments(**own[FalseNegativeArguments])
    incremental, sides = IncrementalArguments(**own[IncrementalArguments]), SideArguments(**own[SideArguments])
    _check_merge(incremental, evaluation.eval_data, values)
    ours = {name for chosen in own.values() for name in chosen}
    rest = {name: value for name, value in values.items() if name not in ours}
    if rest.get("per_device_train_batch_size") == AUTO:
        run["auto_batch_size"] = bool(rest.pop("per_device_train_batch_size"))
    training = build_training_arguments(rest, evaluation.eval_data is not None, notes)
    return FinetuneArguments(
        adapter, model, data, loss, lora, evaluation, training, masks, incremental, sides, **run, notes=notes
    )


def _check_merge(incremental: IncrementalArguments, eval_data: object, values: Mapping[str, Any]) -> None:
    """Refuse a search for a weight without anything to search by, and merging of weights that no process has whole.

    Args:
        values: the other settings, by the names of flags.
    """
    if incremental.merge_with is None:
        return
    for name in ("fsdp", "deepspeed"):
        if values.get(name):
            raise UsageError(
                f"--merge_with does not work with --{name}, which splits the weights; leave one of them out"
            )
    held_out = {"eval_data": eval_data, "guard_data": incremental.guard_data}
    missing = [name for name, given in held_out.items() if given is None]
    if incremental.fixed_weight is None and missing:
        raise UsageError(f"--merge_weight auto needs --{missing[0]} to choose by; or give a weight, such as 0.5")


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


# ---- what a run refuses before anything is loaded


def refuse_unsupported(arguments: FinetuneArguments, pairs: bool) -> None:
    """Refuse flags that could not do here what they say.

    Args:
        pairs: the adapter is a cross-encoder.

    Raises:
        UsageError: names the first of them.
    """
    if arguments.lora.use_lora:
        _refuse_with_lora(arguments)
    refuse_unsupported_training(arguments.training)
    _refuse_sides(arguments, pairs)
    (_refuse_for_pairs if pairs else _refuse_without_pairs)(arguments)


def _refuse_with_lora(arguments: FinetuneArguments) -> None:
    """Sharded weights cannot be merged with their adapters on the way to a checkpoint."""
    if arguments.model.fix_encoder:
        raise UsageError("--use_lora adapts the backbone that --fix_encoder freezes; leave one of them out")
    if arguments.model.freeze_layers:
        raise UsageError("--use_lora freezes all layers, and adapts each; leave --freeze_layers out")
    if arguments.training.fsdp or arguments.training.deepspeed:
        raise UsageError("--use_lora does not work with --fsdp or --deepspeed; leave them out (plain DDP works)")


def _refuse_sides(arguments: FinetuneArguments, pairs: bool) -> None:
    """Refuse what does not go together with the training of one side, or against a corpus.

    Raises:
        UsageError: names the first of it.
    """
    sides = arguments.sides
    if not sides.used:
        if sides.corpus_negatives is not None:
            raise UsageError("corpus_negatives has no effect without --corpus")
        return
    name = f"--train_side {sides.train_side}" if sides.train_side != "both" else "--corpus"
    if pairs:
        raise UsageError(
            f"{name} is for models that encode query and passage by themselves, and '{arguments.adapter}' reads pairs: "
            "a cross-encoder has no side that could stay, and no vectors are stored for it"
        )
    refused: dict[str, tuple[object, str]] = {
        "fsdp": (arguments.training.fsdp, "the side that stays would be sharded too; plain DDP (torchrun) works"),
        "deepspeed": (arguments.training.deepspeed, "the side that stays would be sharded too; plain DDP works"),
        "no_in_batch_neg": (arguments.data.no_in_batch_neg, "all passages of the corpus are negatives"),
        "false_negative_mask guide": (
            arguments.false_negatives.false_negative_mask == "guide",
            "the guide has no vectors of the corpus; duplicates and known positives are left out anyway",
        ),
    }
    if sides.train_side != "both":
        refused |= _refused_merge(arguments)
    if sides.train_side == "query":
        refused["shuffle_ratio"] = (arguments.data.shuffle_ratio, "the passages are not encoded again")
    if sides.maps_alone:
        refused["use_lora"] = (arguments.lora.use_lora, "no encoder is trained, the map alone")
        refused["unified_finetuning"] = (arguments.loss.unified_finetuning, "a map is of the dense vectors alone")
        refused[arguments.loss.regularized] = (arguments.loss.regularized, "a map is of the dense vectors alone")
        refused["knowledge_distillation"] = (arguments.loss.knowledge_distillation, "a map learns from positives")
    if sides.passage_map and arguments.lora.use_lora:
        refused["use_lora"] = (True, "the adapters' run would not train the map")
    for flag_name, (given, why) in refused.items():
        if given:
            raise UsageError(f"{name} does not go with --{flag_name}: {why}; leave one of them out")


def _refused_merge(arguments: FinetuneArguments) -> dict[str, tuple[object, str]]:
    """A query side is averaged with that of the model that it began from, and with nothing else."""
    sides, merge_with = arguments.sides, arguments.incremental.merge_with
    if sides.train_side != "query":
        return {"merge_with": (merge_with, "two models of different sides have no average")}
    if sides.query_map or sides.passage_map:
        return {"merge_with": (merge_with, "a map has no average with a model that has none")}
    why = "a query side has an average with that of its parent alone"
    return {f"merge_with {merge_with}": (merge_with not in (None, PARENT), why)}


def _refuse_for_pairs(arguments: FinetuneArguments) -> None:
    """Refuse flags that a cross-encoder cannot follow."""
    loss, alone = arguments.loss, "a query is compared with its own candidates only"
    refused = {
        "negatives_cross_device": (loss.negatives_cross_device, alone),
        "use_mrl": (loss.use_mrl, "it gives no vector whose dimensions could be cut"),
        "unified_finetuning": (loss.unified_finetuning, "it has one head"),
        loss.regularized: (loss.regularized, "it has no lexical weights"),
        "sentence_pooling_method": (arguments.model.sentence_pooling_method, "it gives a score and no vector"),
        "false_negative_mask": (arguments.false_negatives.false_negative_mask != "none", alone),
        "kd_loss_type": (loss.kd_loss_type != "kl_div", "its group of candidates is learned with kl_div"),
    }
    for name, (given, why) in refused.items():
        if given:
            raise UsageError(f"--{name} does not suit a cross-encoder: {why}; leave it out")


def _refuse_without_pairs(arguments: FinetuneArguments) -> None:
    """Refuse flags that only a cross-encoder can follow."""
    for name in ("max_len", "sep_token", "prompt"):
        if getattr(arguments.data, name) is not None:
            raise UsageError(
                f"--{name} is for rerankers, and '{arguments.adapter}' encodes query and passage by themselves: "
                "give --query_max_len and --passage_max_len"
            )
