"""LossArguments: what a training loss may depend on besides the embeddings. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ultrarag.errors import UsageError

#: The ways of learning from a teacher's scores that are known to `losses`.
KD_LOSS_TYPES = ("kl_div", "m3_kd_loss")


def flag(default: Any, text: str, **more: Any) -> Any:
    """A field of a group of settings that is a flag of the command line; `text` is what `--help` says about it."""
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class LossArguments:
    """The settings of a loss: the run's, and (the last four) the batch's, set by `dataclasses.replace`.

    Names, defaults and meaning are those of FlagEmbedding 1.4.2's command line; every field with a `help` is a flag.

    Raises:
        UsageError: when a value cannot be used.
    """

    temperature: float = flag(0.02, "Scores are divided by it before the softmax.")
    knowledge_distillation: bool = flag(
        False, "Learn also from a teacher: the rows carry its pos_scores and neg_scores."
    )
    kd_loss_type: str = flag(
        "kl_div",
        "How to learn from the teacher: kl_div compares the distributions over a group and adds the contrastive "
        "loss; m3_kd_loss weighs a cross-entropy per passage with the teacher's probability.",
        choices=KD_LOSS_TYPES,
    )
    unified_finetuning: bool = flag(False, "Train the dense, sparse and ColBERT heads together.")
    use_self_distill: bool = flag(False, "With unified fine-tuning: the ensemble of the heads teaches each of them.")
    self_distill_start_step: int = flag(
        -1, "Self-distillation is on while the step is above this; -1: from the first step."
    )
    use_mrl: bool = flag(False, "Matryoshka: take the loss also on the first mrl_dims dimensions.")
    mrl_dims: tuple[int, ...] = flag(
        (), "The numbers of dimensions for use_mrl, such as 64 128 256 or 64,128,256.", split=True
    )
    #: None: not said, which is True for a loss by itself; a run settles it when it has seen the model
    normalize_embeddings: bool | None = flag(
        None,
        "Give dense vectors unit length.",
        shown_default="True, unless the checkpoint says that its vectors are compared by dot product",
    )
    negatives_cross_device: bool = flag(False, "The passages of all processes are negatives.")
    query_regularizer_weight: float = flag(
        0.0, "How much sparse queries weigh: times their FLOPS, added to the loss, so that fewer tokens have a weight."
    )
    document_regularizer_weight: float = flag(0.0, "The same for sparse passages; SPLADE has 3e-5 to 3e-3 in both.")
    query_regularizer_threshold: int | None = flag(
        None, "Leave queries with no more weights than this out of their FLOPS.", shown_default="none is left out"
    )
    document_regularizer_threshold: int | None = flag(
        None, "Leave passages with no more weights than this out of their FLOPS.", shown_default="none is left out"
    )
    regularizer_warmup_ratio: float = flag(
        1 / 3,
        "The share of the steps in which both regularizer weights grow, by the square of the step; 0: they do not.",
        shown_default="a third",
    )

    #: passages per query in this batch, positive first; None: passages / queries
    group_size: int | None = None
    #: the other queries' passages are negatives in this batch
    in_batch_negatives: bool = True
    #: (queries, passages) bool tensor: True where a passage is no negative of the query; never its positive
    false_negatives: Any = field(default=None, compare=False)
    #: (passages,) float tensor, or None: what is added to each passage's scores, once they are divided by the
    #: temperature: the logarithm of how many passages of the corpus it stands for, where negatives are a sample
    score_offsets: Any = field(default=None, compare=False)

    @property
    def regularized(self) -> str:
        """The first flag that asks for fewer lexical weights; empty where none does."""
        weights = ("query_regularizer_weight", "document_regularizer_weight")
        return next((name for name in weights if getattr(self, name)), "")

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if self.kd_loss_type not in KD_LOSS_TYPES:
            raise UsageError(f"kd_loss_type is '{self.kd_loss_type}'; it must be one of {', '.join(KD_LOSS_TYPES)}")
        if self.self_distill_start_step < -1:
            raise UsageError(f"self_distill_start_step is {self.self_distill_start_step}; it must be -1 or more")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"group_size is {self.group_size}; it must be at least 1")
        _check_regularizers(self)
        object.__setattr__(self, "mrl_dims", tuple(self.mrl_dims))
        _check_mrl(self.use_mrl, self.mrl_dims)


def _check_temperature(temperature: object) -> None:
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not number or not math.isfinite(temperature) or temperature <= 0:  # type: ignore[arg-type,operator]
        raise UsageError(f"temperature is {temperature!r}; it must be a number above 0, such as 0.02")


def _check_mrl(use_mrl: bool, dims: tuple[int, ...]) -> None:
    bad = [dim for dim in dims if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1]
    if bad:
        raise UsageError(f"mrl_dims holds {bad[0]!r}; it must be whole numbers above 0, such as 64 128 256")
    if use_mrl and not dims:
        raise UsageError("use_mrl needs mrl_dims, the numbers of dimensions to train, such as --mrl_dims 64 128 256")


def _check_regularizers(args: LossArguments) -> None:
    for name in ("query_regularizer_weight", "document_regularizer_weight"):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UsageError(f"{name} is {value!r}; it must be 0 or a number above, such as 3e-5")
    for name in ("query_regularizer_threshold", "document_regularizer_threshold"):
        value = getattr(args, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise UsageError(f"{name} is {value!r}; it must be a whole number, 0 or more")
    ratio = args.regularizer_warmup_ratio
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise UsageError(f"regularizer_warmup_ratio is {ratio!r}; it is a share of the steps, from 0 to 1")
