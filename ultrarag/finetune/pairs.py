"""Fine-tuning of cross-encoders, where it differs from that of embedders: lengths, batches, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ultrarag.encoder import Encoder
from ultrarag.errors import DataError, UsageError
from ultrarag.finetune.batches import PairCollator, Plan
from ultrarag.finetune.flags import DataArguments, FinetuneArguments


@dataclass(frozen=True)
class PairLengths:
    """How many tokens of a query, of a passage and of the whole pair are read."""

    query: int
    #: None: what the pair leaves
    passage: int | None
    pair: int

    @classmethod
    def of(cls, data: DataArguments) -> PairLengths:
        """Return what the flags say, as FlagEmbedding means them: `max_len`, or the sum of both sides' lengths.

        In the sum, a short passage leaves some of its room to the query and the other way round.
        """
        if data.max_len is not None:
            return cls(data.max_len * 3 // 4, None, data.max_len)
        query, passage = data.query_max_len, data.passage_max_len
        return cls(query + passage // 4, passage + query // 2, query + passage)


def refuse_for_pairs(arguments: FinetuneArguments) -> None:
    """Refuse flags that a cross-encoder cannot follow."""
    loss, model = arguments.loss, arguments.model
    refused = {
        "negatives_cross_device": (loss.negatives_cross_device, "a query is compared with its own candidates only"),
        "use_mrl": (loss.use_mrl, "it gives no vector whose dimensions could be cut"),
        "unified_finetuning": (loss.unified_finetuning, "it has one head"),
        "sentence_pooling_method": (model.sentence_pooling_method is not None, "it gives a score and no vector"),
        "false_negative_mask": (
            arguments.false_negatives.false_negative_mask != "none",
            "a query is compared with its own candidates only",
        ),
        "kd_loss_type": (loss.kd_loss_type != "kl_div", "its group of candidates is learned with kl_div"),
    }
    for name, (given, why) in refused.items():
        if given:
            raise UsageError(f"--{name} does not suit a cross-encoder: {why}; leave it out")


def refuse_without_pairs(arguments: FinetuneArguments) -> None:
    """Refuse flags that only a cross-encoder can follow."""
    for name in ("max_len", "sep_token"):
        if getattr(arguments.data, name) is not None:
            raise UsageError(
                f"--{name} is for rerankers, and '{arguments.adapter}' encodes query and passage by themselves: "
                "give --query_max_len and --passage_max_len"
            )


def check_groups(plan: Plan) -> None:
    """Refuse data in which a query has no negative: the loss of a group of one is 0.

    Raises:
        DataError: names the datasets.
    """
    single = [pool.name for pool in plan.pools if pool.group_size == 1]
    if single:
        raise DataError(
            f"'{single[0]}': a cross-encoder compares a query's positive with its own negatives, and there are none; "
            "give rows 'neg', and --train_group_size 2 or more"
        )


def set_up_pairs(encoder: Encoder, data: DataArguments, note: Callable[[str], None]) -> PairLengths:
    """Return the lengths to train with, and set the separator.

    Raises:
        UsageError: the model has fewer positions.
    """
    lengths = PairLengths.of(data)
    encoder.max_length("passage", lengths.pair)
    if data.max_len is not None:
        note(
            f"max_len {data.max_len}: pairs of at most so many tokens, queries of {lengths.query}; query_max_len and "
            "passage_max_len have no effect"
        )
    if data.sep_token is not None:
        if encoder.settings.separator is None:
            note("sep_token has no effect: the tokenizer of this model has a separator of its own")
        else:
            encoder.settings.separator = data.sep_token
    return lengths


def pair_collator(encoder: Encoder, data: DataArguments) -> PairCollator:
    """The collator of a run."""
    lengths = PairLengths.of(data)
    return PairCollator(encoder, lengths.query, lengths.passage, lengths.pair, data.pad_to_multiple_of)
