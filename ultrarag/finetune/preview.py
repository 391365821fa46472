"""RenderedBatch: one training batch exactly as the model will see it, for `--dry_run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ultrarag.encoder import Encoder
from ultrarag.finetune.batches import AnyPlan, Batch, Collator, PairCollator, PairLengths


@dataclass
class RenderedText:
    """One row of a batch's token ids, padding left out."""

    ids: list[int]
    #: the tokens, as the tokenizer writes them
    tokens: list[str]
    #: there was more of the text than is read
    cut: bool
    #: the text before tokenization, without its instruction
    text: str
    #: positive or negative; None for a query
    role: str | None = None
    #: the teacher's score
    teacher: float | None = None

    def lines(self, indent: str) -> Iterator[str]:
        """Yield what people read."""
        score = "" if self.teacher is None else f", teacher {self.teacher:g}"
        mark = ", cut" if self.cut else ""
        yield f"{indent}{self.role or 'query'}: {len(self.ids)} tokens{mark}{score}"
        yield f"{indent}  {' '.join(self.tokens)}"
        yield f"{indent}  {' '.join(map(str, self.ids))}"


@dataclass
class RenderedQuery:
    """A query with its group; for a cross-encoder the group's texts are whole pairs."""

    #: "file:line" of its row
    source: str
    #: the row's own instruction; None: the run's
    prompt: str | None
    query: RenderedText | None
    group: list[RenderedText] = field(default_factory=list)


@dataclass
class RenderedBatch:
    """The first batch of a run on the first rank."""

    dataset: str
    group_size: int
    in_batch_negatives: bool
    steps_per_epoch: int
    #: tokens that a query and a passage (or a pair) are padded to in this batch
    query_width: int | None
    passage_width: int
    queries: list[RenderedQuery] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        negatives = "with" if self.in_batch_negatives else "without"
        widths = f"{self.passage_width}" if self.query_width is None else f"{self.query_width} and {self.passage_width}"
        lines = [
            f"batch 0 of {self.steps_per_epoch} (epoch 0, rank 0): dataset '{self.dataset}', "
            f"{len(self.queries)} queries x {self.group_size} passages, {negatives} in-batch negatives, "
            f"padded to {widths} tokens"
        ]
        for number, item in enumerate(self.queries):
            prompt = "" if item.prompt is None else f", prompt {item.prompt!r}"
            lines += ["", f"{number}. {item.source}{prompt}"]
            for text in [*([item.query] if item.query else []), *item.group]:
                lines += text.lines("  ")
        return "\n".join(lines)


def rendered_batch(encoder: Encoder, plan: AnyPlan, collator: Collator | PairCollator) -> RenderedBatch:
    """Render batch 0 of epoch 0, by the run's own plan and collator."""
    batch = plan.batch(0, 0, 0)
    made = collator([batch])
    passages = _texts(encoder, made["passages"], _uncut(encoder, collator, batch), batch.passages)
    queries: list[RenderedText | None] = [None] * len(batch.queries)
    if made["queries"] is not None:
        queries = list(_texts(encoder, made["queries"], _uncut_queries(encoder, batch), batch.queries))
    width = None if made["queries"] is None else made["queries"]["input_ids"].shape[1]
    found = RenderedBatch(
        batch.dataset, batch.group_size, made["in_batch_negatives"], plan.steps_per_epoch, width,
        made["passages"]["input_ids"].shape[1],
    )  # fmt: skip
    for number, query in enumerate(queries):
        group = passages[number * batch.group_size : (number + 1) * batch.group_size]
        for place, text in enumerate(group):
            text.role = "negative" if place else "positive"
            text.teacher = batch.teacher[number][place] if batch.teacher else None
        found.queries.append(RenderedQuery(batch.sources[number], batch.prompts[number], query, group))
    return found


def _texts(encoder: Encoder, features: Any, uncut: Sequence[int], texts: Sequence[str]) -> list[RenderedText]:
    """Return each row's tokens; `uncut` are the lengths that nothing was cut from."""
    found = []
    for row, mask, full, text in zip(features["input_ids"], features["attention_mask"], uncut, texts, strict=True):
        ids = [int(number) for number in row[mask.bool()]]
        tokens = [str(token) for token in encoder.tokenizer.convert_ids_to_tokens(ids)]
        found.append(RenderedText(ids, tokens, len(ids) < full, text))
    return found


def _uncut_queries(encoder: Encoder, batch: Batch) -> list[int]:
    rendered = [encoder.settings.render(t, "query", p) for t, p in zip(batch.queries, batch.prompts, strict=True)]
    return _lengths(encoder, rendered)


def _uncut(encoder: Encoder, collator: Collator | PairCollator, batch: Batch) -> list[int]:
    """The lengths of the passages, or of the pairs, without a limit."""
    if isinstance(collator, Collator):
        return _lengths(encoder, collator.passages(batch))
    unlimited = PairCollator(encoder, PairLengths(1 << 20, None, 1 << 21))
    return [int(mask.sum()) for mask in unlimited([batch])["passages"]["attention_mask"]]


def _lengths(encoder: Encoder, texts: list[str]) -> list[int]:
    return [len(ids) for ids in encoder.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
