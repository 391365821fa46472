"""Subject: the adapter under test with a model, and the toy batch that every check works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ultrarag.encoder import Encoder, pad
from ultrarag.finetune.step import Trainable, choose_heads, freeze
from ultrarag.hookspecs import Features, LoadOptions
from ultrarag.loss_arguments import LossArguments
from ultrarag.plugins import Adapter
from ultrarag.scores import head_scores
from ultrarag.testing.tiny import TEXTS
from ultrarag.types import Embeddings, Sparse, Tokens

#: Candidates per query in the toy batch, the positive first.
GROUP = 2
#: One text, or the (query, passage) pair of a cross-encoder.
Row = str | tuple[str, str]


@dataclass
class Subject:
    """An adapter, the model it is tried with, and where."""

    adapter: Adapter
    path: Path
    #: an empty folder that the checks may write into
    scratch: Path
    device: str = "cpu"

    @property
    def pairs(self) -> bool:
        """It reads (query, passage) pairs."""
        return self.adapter.declared.pair_input

    @cached_property
    def encoder(self) -> Encoder:
        """The model as it is in the folder; checks that change a model use a `fresh` one."""
        return self.fresh()

    def fresh(self, path: Path | None = None, options: LoadOptions | None = None) -> Encoder:
        """Load the model anew."""
        return Encoder.load(path or self.path, self.adapter.name, device=self.device, options=options)

    # ---- the toy batch: four queries, each with its passage and that of the next query

    @property
    def rows(self) -> list[Row]:
        """Rows of unlike lengths for the checks on vectors."""
        if self.pairs:
            return [(query, passage) for query, passage in zip(TEXTS[0::2], TEXTS[1::2], strict=True)]
        return [*TEXTS, "a", " ".join(TEXTS[:4])]

    def sides(self, encoder: Encoder) -> list[Features]:
        """The features of [queries, passages], or of [pairs], in the layout of training."""
        queries, positives = TEXTS[0::2], TEXTS[1::2]
        passages = [positives[(i + j) % len(positives)] for i in range(len(queries)) for j in range(GROUP)]
        if self.pairs:
            pairs = [(queries[i // GROUP], passage) for i, passage in enumerate(passages)]
            return [self.features(encoder, pairs)]
        return [
            self._on_device(encoder.features(encoder.tokenize(queries, "query"))),
            self._on_device(encoder.features(encoder.tokenize(passages, "passage"))),
        ]

    # ---- encoding

    def tokens(self, encoder: Encoder, rows: Sequence[Row]) -> Tokens:
        """Tokenize texts as passages, or pairs as the model reads them."""
        if self.pairs:
            return encoder.tokenize_pairs(cast("Sequence[tuple[str, str]]", rows))
        return encoder.tokenize(cast("Sequence[str]", rows), "passage")

    def features(
        self, encoder: Encoder, rows: Sequence[Row], side: str | None = None, multiple_of: int | None = None
    ) -> Features:
        """Tokenize and pad, at the tokenizer's own side or at another."""
        tokens = self.tokens(encoder, rows)
        side = side or encoder.tokenizer.padding_side
        pad_id = encoder.tokenizer.pad_token_id
        return self._on_device(pad(tokens.ids, pad_id, side, multiple_of, tokens.types, tokens.kind))

    def _on_device(self, features: Features) -> Features:
        moved = {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in features.items()}
        return cast(Features, moved)

    @torch.no_grad()
    def embed(self, encoder: Encoder, features: Features, heads: tuple[str, ...] | None = None) -> Embeddings:
        """The hook's answer in evaluation mode, as torch tensors."""
        training = encoder.model.training
        encoder.model.eval()
        try:
            return encoder.adapter.encode(encoder.model, {**features, "heads": heads or encoder.heads})
        finally:
            encoder.model.training = training

    # ---- training

    def trainable(self, encoder: Encoder, unified: bool) -> Trainable:
        """The module that the trainer would wrap, frozen as it would be.

        The model itself is in training mode (a layerwise reranker then scores at every layer); its layers are in
        evaluation mode, since dropout would hide what the checks compare.
        """
        heads = choose_heads(encoder, unified)
        freeze(encoder, heads, fix_encoder=False, fix_positions=False)
        module = Trainable(encoder, heads)
        module.eval()
        encoder.model.training = True
        return module

    def modes(self) -> list[bool]:
        """How it can be trained: with --unified_finetuning, and without where that is another set of heads."""
        if self.adapter.declared.finetune_defaults.get("unified_finetuning"):
            return [True]
        encoder = self.encoder
        return [True] if choose_heads(encoder, True) == choose_heads(encoder, False) else [True, False]

    def loss(self, encoder: Encoder, embeddings: Sequence[Embeddings], arguments: LossArguments) -> Tensor:
        """The adapter's loss of the toy batch."""
        query, passage = (None, embeddings[0]) if self.pairs else embeddings
        return encoder.adapter.loss(encoder.model, query, passage, None, 0, arguments)

    def arguments(self, encoder: Encoder, unified: bool) -> LossArguments:
        """Loss settings whose temperature spreads the toy batch's scores over about four units.

        With a fixed one, the scores of unnormalised heads saturate the softmax, and its gradient is exactly zero.
        """
        arguments = LossArguments(temperature=1.0, group_size=GROUP, unified_finetuning=unified)
        if self.pairs:
            return arguments
        query, passage = (self.embed(encoder, side, choose_heads(encoder, unified)) for side in self.sides(encoder))
        spread = max(float(scores.max() - scores.min()) for scores in head_scores(query, passage).values())
        return replace(arguments, temperature=max(spread / 4, 1e-6) if np.isfinite(spread) else 1.0)


def difference(left: Embeddings, right: Embeddings) -> tuple[float, str]:
    """The largest difference of any component, and its head; relative where values are above 1.

    How far a row is padded makes no difference. Infinite where heads or numbers of vectors differ.
    """
    if left.heads != right.heads or len(left) != len(right):
        return float("inf"), "/".join(left.heads)
    return max(((_head_difference(left, right, head), head) for head in left.heads), default=(0.0, ""))


def _head_difference(left: Embeddings, right: Embeddings, head: str) -> float:
    rows = [_vectors(side.numpy(), head) for side in (left, right)]
    if head == "sparse":
        ids = [sorted({*a, *b}) for a, b in zip(*rows, strict=True)]
        rows = [[np.array([row.get(i, 0.0) for i in known]) for row, known in zip(s, ids, strict=True)] for s in rows]
    return max(_gap(a, b) for a, b in zip(*rows, strict=True))


def _vectors(embeddings: Embeddings, head: str) -> list[Any]:
    """One array per row, without padding; for the sparse head one dict."""
    if head == "sparse":
        sparse = embeddings.sparse
        assert sparse is not None
        return Sparse(sparse.ids, sparse.weights).to_dicts()
    array = np.asarray(getattr(embeddings, head))
    if head == "colbert":
        return [row[mask > 0] for row, mask in zip(array, embeddings.mask, strict=True)]
    return list(array)


def _gap(left: np.ndarray, right: np.ndarray) -> float:
    if left.shape != right.shape:
        return float("inf")
    if not left.size:
        return 0.0
    gap = float(np.abs(left - right).max()) / max(1.0, float(np.abs(left).max()))
    return gap if np.isfinite(gap) else float("inf")


Status = Literal["ok", "failed", "not applicable"]


class Failed(Exception):
    """A check did not hold: what was found, with its number, and what to do about it."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.found = found
        self.remedy = remedy


class NotApplicable(Exception):
    """A check has no meaning for this adapter or this machine; the message says why."""


@dataclass(frozen=True)
class Result:
    """The outcome of one check."""

    check: str
    status: Status
    #: what was measured, what failed, or why the check does not apply
    detail: str
    #: what to do; empty unless it failed
    remedy: str = ""


@dataclass
class Report:
    """All results of one adapter."""

    adapter: str
    #: "adapter 'NAME' of package 'PACKAGE' VERSION"
    label: str
    model: str
    results: list[Result] = field(default_factory=list)

    @property
    def failed(self) -> list[Result]:
        """The checks that did not hold."""
        return [result for result in self.results if result.status == "failed"]

    @property
    def ok(self) -> bool:
        """No check failed."""
        return not self.failed

    def __getitem__(self, check: str) -> Result:
        """The result of the named check."""
        return next(result for result in self.results if result.check == check)

    def __str__(self) -> str:
        wide = max((len(result.check) for result in self.results), default=0)
        lines = [f"{self.label}, model {self.model}"]
        for result in self.results:
            mark = "-" if result.status == "not applicable" else result.status
            reason = "not applicable: " if result.status == "not applicable" else ""
            lines.append(f"{mark:<6}  {result.check:<{wide}}  {reason}{result.detail}")
            if result.remedy:
                lines.append(f"{'':<6}  {'':<{wide}}  -> {result.remedy}")
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        count = {status: sum(result.status == status for result in self.results) for status in _STATUSES}
        return ", ".join(f"{number} {status}" for status, number in count.items())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "ok": self.ok}


_STATUSES: Sequence[Status] = ("ok", "failed", "not applicable")
