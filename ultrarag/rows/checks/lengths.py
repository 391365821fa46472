"""Lengths in tokens, of a sample of the rows: how long texts are, and how many will be cut."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.rows.checks.rows import Finding, guessed_tokens
from ultrarag.tokenizer_limits import keep_limits

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.types import Kind


#: (texts, "query" or "passage") -> tokens of each, special ones included
TokenCounter = Callable[[Sequence[str], Any], list[int]]

#: Shares of cut texts from which it is worth a warning.
_MANY_CUT = {"query": 0.05, "passage": 0.25, "pair": 0.25}


class Sample:
    """Some rows, each as likely as any other, of a stream of unknown length (reservoir sampling; deterministic)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[tuple[str, list[str]]] = []
        self._seen = 0
        self._random = random.Random(0)

    def add(self, query: str, passages: Sequence[str]) -> None:
        """Offer a row."""
        self._seen += 1
        if len(self.rows) < self.size:
            self.rows.append((query, list(passages)))
        elif (place := self._random.randrange(self._seen)) < self.size:
            self.rows[place] = (query, list(passages))

    def within(self, characters: int) -> list[tuple[str, list[str]]]:
        """Return rows of the sample until they hold so many characters, at least one."""
        order = self._random.sample(self.rows, len(self.rows))
        kept = []
        for query, passages in order:
            kept.append((query, passages))
            characters -= len(query) + sum(map(len, passages))
            if characters < 0:
                break
        return kept


@dataclass
class Lengths:
    """The lengths of one kind of text."""

    #: query, passage, or pair (for a cross-encoder)
    kind: str
    texts: int
    median: int
    #: 95 of 100 texts are at most this long
    p95: int
    longest: int
    #: mean after cutting
    mean_read: float
    #: tokens that are read
    limit: int
    #: share of the texts that are cut
    cut: float
    #: (up to so many tokens, texts), in powers of two
    histogram: list[tuple[int, int]] = field(default_factory=list)
    #: counted by the model's tokenizer; else guessed from characters
    counted: bool = True

    @classmethod
    def of(cls, kind: str, tokens: Sequence[int], limit: int, counted: bool) -> Lengths:
        """Summarise the lengths of some texts."""
        found = np.array(tokens or [0])
        median, p95 = (int(np.percentile(found, share)) for share in (50, 95))
        read = float(np.minimum(found, limit).mean())
        cut = float((found > limit).mean())
        bars = _histogram(found)
        return cls(kind, len(tokens), median, p95, int(found.max()), read, limit, cut, bars, counted)

    def findings(self) -> list[Finding]:
        """Return a warning where many are cut."""
        if self.cut < _MANY_CUT[self.kind] or not self.texts:
            return []
        name = {"query": "query_max_len", "passage": "passage_max_len", "pair": "max_len"}[self.kind]
        text = (
            f"{self.cut:.0%} of the {_PLURAL[self.kind]} are longer than {name} {self.limit} and are cut; 95 % have at "
            f"most {self.p95} tokens{'' if self.counted else ' (guessed; --model counts them)'}"
        )
        return [Finding("warning", f"{self.kind}_cut", round(self.cut * self.texts), f"{text} (of the sample)")]


_PLURAL = {"query": "queries", "passage": "passages", "pair": "pairs"}


def _histogram(tokens: np.ndarray) -> list[tuple[int, int]]:
    """Count the lengths up to 8, 16, 32, ..."""
    top = max(3, int(np.ceil(np.log2(max(int(tokens.max()), 1)))))
    edges = [0, *(2**power for power in range(3, top + 1))]
    # bins of numpy are half open to the right: shifted, so that 8 tokens are "up to 8"
    counts, _ = np.histogram(tokens - 0.5, bins=edges)
    return [(edge, int(count)) for edge, count in zip(edges[1:], counts, strict=True)]


def measure(
    rows: Sequence[tuple[str, list[str]]], count: TokenCounter | None, limits: dict[str, int], pairs: bool = False
) -> list[Lengths]:
    """Return the lengths of queries and passages, or of queries and pairs.

    Args:
        count: the model's tokenizer (see `token_counter`); None: lengths are guessed.
        limits: tokens read of a "query", and of a "passage" or a "pair".
    """
    known = count or (lambda texts, kind: [guessed_tokens(text) for text in texts])
    queries = known([query for query, _ in rows], "query")
    passages = known([text for _, texts in rows for text in texts], "passage")
    found = [Lengths.of("query", queries, limits["query"], count is not None)]
    if not pairs:
        return [*found, Lengths.of("passage", passages, limits["passage"], count is not None)]
    asked = [tokens for tokens, (_, texts) in zip(queries, rows, strict=True) for _ in texts]
    both = [min(query, limits["query"]) + passage for query, passage in zip(asked, passages, strict=True)]
    return [*found, Lengths.of("pair", both, limits["pair"], count is not None)]


def token_counter(encoder: Encoder) -> TokenCounter:
    """Return what counts tokens as the encoder reads texts, instruction included."""

    def count(texts: Sequence[str], kind: Kind) -> list[int]:
        rendered = [encoder.settings.render(text, kind) for text in texts]
        if not rendered:
            return []
        more = {"return_attention_mask": False, "return_token_type_ids": False}
        with keep_limits(encoder.tokenizer):
            found = encoder.tokenizer(rendered, truncation=False, verbose=False, **more)["input_ids"]
        return [len(ids) for ids in found]

    return count


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
    from ultrarag.encoder import tokenize

    tokens = tokenize(encoder.tokenizer, list(texts[:_PROBE_TEXTS]), min(limit, encoder.limit or limit), "passage")
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
