"""LossArguments: what a training loss may depend on besides the embeddings. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ultrarag.errors import UsageError

#: The ways of learning from a teacher's scores that are known to `losses`.
KD_LOSS_TYPES = ("kl_div", "m3_kd_loss")


@dataclass(frozen=True)
class LossArguments:
    """The settings of a loss: the run's, and (the last two) the batch's, set by `dataclasses.replace`.

    Names, defaults and meaning are those of FlagEmbedding 1.4.2's command line.

    Raises:
        UsageError: when a value cannot be used.
    """

    #: scores are divided by it before the softmax
    temperature: float = 0.02
    #: learn from `pos_scores` and `neg_scores` of the rows
    knowledge_distillation: bool = False
    kd_loss_type: str = "kl_div"
    #: train dense, sparse and ColBERT heads together
    unified_finetuning: bool = False
    #: with unified fine-tuning: the ensemble of the heads teaches each of them
    use_self_distill: bool = False
    #: self-distillation is on while step > this; -1: from the first step
    self_distill_start_step: int = -1
    #: Matryoshka: the loss is taken also on the first `mrl_dims` dimensions
    use_mrl: bool = False
    mrl_dims: tuple[int, ...] = ()
    #: dense vectors have unit length
    normalize_embeddings: bool = True
    #: the passages of all ranks are negatives
    negatives_cross_device: bool = False

    #: passages per query in this batch, positive first; None: passages / queries
    group_size: int | None = None
    #: the other queries' passages are negatives in this batch
    in_batch_negatives: bool = True

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if self.kd_loss_type not in KD_LOSS_TYPES:
            raise UsageError(f"kd_loss_type is '{self.kd_loss_type}'; it must be one of {', '.join(KD_LOSS_TYPES)}")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"group_size is {self.group_size}; it must be at least 1")
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
