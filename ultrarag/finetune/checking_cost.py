"""Cost: steps, memory and time of a fine-tune, estimated before it; every number says how it is computed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ultrarag.finetune.checking_lengths import Lengths

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

#: Weights, gradients, and the two moments of AdamW, in float32.
_BYTES_PER_PARAMETER = 16
#: A backward pass costs about two forward passes.
_FORWARDS_PER_STEP = 3
#: Texts of a probe, and how often it is timed (the fastest counts: others were disturbed).
_PROBE_TEXTS, _PROBES = 16, 3


@dataclass
class Cost:
    """What a run will take, per device."""

    steps_per_epoch: int
    steps: int
    #: mean tokens that a step reads, padding not counted
    tokens_per_step: int
    #: bytes; None where the model is not known
    memory: int | None = None
    #: of the training itself, without loading and evaluation; None where no forward was timed
    seconds: float | None = None
    #: what the numbers rest on
    how: str = ""

    def lines(self) -> list[tuple[str, str]]:
        """Return (name, value) of what is known, for people."""
        found = [
            ("steps", f"{self.steps} ({self.steps_per_epoch} per epoch)"),
            ("tokens", f"{self.tokens_per_step} per step"),
        ]
        if self.memory is not None:
            found.append(("memory", f"about {self.memory / 2**30:.1f} GiB per device"))
        if self.seconds is not None:
            found.append(("time", f"about {_duration(self.seconds)}"))
        return found


def steps_of(rows: int, batch_size: int, accumulation: int, epochs: float, max_steps: int = -1) -> tuple[int, int]:
    """Return optimizer steps per epoch and in all: ceil(rows / batch) batches, `accumulation` of them a step."""
    batches = -(-rows // batch_size)
    per_epoch = max(1, -(-batches // accumulation))
    return per_epoch, max_steps if max_steps > 0 else int(-(-per_epoch * epochs // 1))


def estimate(
    steps: tuple[int, int],
    batch_size: int,
    group_size: int,
    lengths: Sequence[Lengths],
    encoder: Encoder | None = None,
    texts: Sequence[str] = (),
    checkpointing: bool = False,
) -> Cost:
    """Estimate a run.

    Args:
        steps: per epoch, and in all.
        batch_size: queries per device and step; with `group_size` passages each.
        encoder: the model: without it neither memory nor time can be estimated.
        texts: passages to time a forward with; none: no time is estimated.
        checkpointing: activations of one layer at a time are kept.
    """
    tokens = _tokens(batch_size, group_size, lengths, lambda item: item.mean_read)
    cost = Cost(
        *steps, round(tokens), how="steps: rows / (batch x devices x accumulation); tokens: means of the sample"
    )
    if encoder is not None:
        padded = _tokens(batch_size, group_size, lengths, lambda item: min(item.longest, item.limit))
        cost.memory = _memory(encoder, padded, checkpointing)
        cost.how += (
            "; memory: 16 bytes per parameter (float32, AdamW), and (8 hidden + 2 intermediate) x 4 bytes per layer "
            "for each token of a step whose texts are all as long as the longest"
        )
    if encoder is not None and texts:
        cost.seconds = cost.steps * tokens * _FORWARDS_PER_STEP * _seconds_per_token(encoder, texts, lengths[-1].limit)
        cost.how += "; time: forwards timed on this machine, three per step (forward and backward)"
    return cost


def _tokens(batch_size: int, group_size: int, lengths: Sequence[Lengths], size: Any) -> float:
    by_kind = {item.kind: float(size(item)) for item in lengths}
    if "pair" in by_kind:
        return batch_size * group_size * by_kind["pair"]
    return batch_size * (by_kind["query"] + group_size * by_kind["passage"])


def _memory(encoder: Encoder, tokens: float, checkpointing: bool) -> int:
    config = encoder.model.config
    parameters = sum(item.numel() for item in encoder.model.parameters())
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    inner = int(getattr(config, "intermediate_size", 4 * hidden) or 4 * hidden)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    per_layer = (8 * hidden + 2 * inner) * 4
    kept = per_layer + layers * hidden * 4 if checkpointing else layers * per_layer
    return int(parameters * _BYTES_PER_PARAMETER + tokens * kept)


def _seconds_per_token(encoder: Encoder, texts: Sequence[str], limit: int) -> float:
    from ultrarag.tokenize import tokenize

    tokens = tokenize(encoder.tokenizer, list(texts[:_PROBE_TEXTS]), min(limit, encoder.limit or limit))
    fastest = float("inf")
    for _ in range(_PROBES):
        began = time.perf_counter()
        encoder.encode_tokens(tokens, encoder.heads)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest / max(1, sum(map(len, tokens.ids)))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
