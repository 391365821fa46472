"""Teacher scores for rows: a cross-encoder's, or the weighted heads of an embedding model; `score` for files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.cuts import Cuts
from ultrarag.data.output import identity, resumable
from ultrarag.data.reading import Paths, as_json, checked_row, file_paths, reading
from ultrarag.errors import DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.finetune.row import Row

#: Rows whose texts are encoded together, each distinct one once.
WINDOW = 256


@dataclass
class ScoringReport:
    """What was scored, and what the teacher thinks of the rows."""

    rows: int = 0
    positives: int = 0
    negatives: int = 0
    #: rows in which the best negative is at or above the lowest positive
    inverted: int = 0
    positive_sum: float = 0.0
    negative_sum: float = 0.0

    def add(self, positives: Sequence[float], negatives: Sequence[float]) -> None:
        """Count one row."""
        self.rows += 1
        self.positives, self.negatives = self.positives + len(positives), self.negatives + len(negatives)
        self.positive_sum += sum(positives)
        self.negative_sum += sum(negatives)
        self.inverted += bool(negatives) and max(negatives) >= min(positives)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))

    def __str__(self) -> str:
        means = [f"{self.positives} positives (mean score {self.positive_sum / max(1, self.positives):.4f})"]
        means += [f"{self.negatives} negatives (mean {self.negative_sum / max(1, self.negatives):.4f})"]
        return (
            f"{self.rows} rows scored: {' and '.join(means)}; in {self.inverted} rows a negative scores at least as "
            "much as a positive (ultrarag data clean can leave them out)"
        )


class Scorer:
    """A teacher for rows.

    Args:
        teacher: a cross-encoder, or an embedding model.
        weights: weight per head of an embedding model; required when it has several.
        normalize: a cross-encoder's scores from 0 to 1, through the logistic function.
        options: of `Encoder.score`: batch_tokens, and for a cross-encoder query_max_length and max_length.

    Raises:
        UsageError: weights for a cross-encoder, none for a model with several heads, or `normalize` without a
            cross-encoder.
    """

    def __init__(
        self, teacher: Encoder, weights: Mapping[str, float] | None = None, normalize: bool = False, **options: Any
    ) -> None:
        self.teacher, self.normalize, self.options = teacher, normalize, options
        self.reads_pairs = teacher.adapter.declared.pair_input
        if self.reads_pairs and weights is not None:
            raise UsageError("weights are for the heads of an embedding model; a cross-encoder gives one score")
        if not self.reads_pairs and normalize:
            raise UsageError("normalize is for a cross-encoder's scores")
        self.weights: dict[str, float] = {} if self.reads_pairs else _weights(teacher, weights)
        self.cuts = Cuts()

    def score(self, rows: Sequence[Row]) -> list[tuple[list[float], list[float]]]:
        """Return the scores of each row's positives and negatives."""
        scores = self._pairs(rows) if self.reads_pairs else self._vectors(rows)
        parts = []
        for row, values in zip(rows, scores, strict=True):
            parts.append((values[: len(row.pos)], values[len(row.pos) :]))
        return parts

    def _pairs(self, rows: Sequence[Row]) -> list[list[float]]:
        """Scores by a model that reads query and passage together: each distinct pair once."""
        found: dict[tuple[str | None, str, str], float] = {}
        wanted: dict[str | None, dict[tuple[str, str], None]] = {}
        for row in rows:
            wanted.setdefault(row.prompt, {}).update(dict.fromkeys((row.query, text) for text in _texts(row)))
        for prompt, pairs in wanted.items():
            options = {**self.options, "normalize": self.normalize, "instruction": prompt, "progress": False}
            for pair, score in zip(pairs, self.teacher.score(list(pairs), **options), strict=True):
                found[prompt, *pair] = float(score)
        return [[found[row.prompt, row.query, text] for text in _texts(row)] for row in rows]

    def _vectors(self, rows: Sequence[Row]) -> list[list[float]]:
        """Scores by a model that encodes texts one by one: each distinct text once."""
        place = _numbered(text for row in rows for text in _texts(row))
        passages = self._encoded(list(place), "passage")
        by_prompt = {
            prompt: _numbered(r.query for r in rows if r.prompt == prompt) for prompt in {r.prompt for r in rows}
        }
        queries = {prompt: self._encoded(list(texts), "query", prompt) for prompt, texts in by_prompt.items()}
        scores = []
        for row in rows:
            number = by_prompt[row.prompt][row.query]
            columns = np.array([place[text] for text in _texts(row)])
            one = queries[row.prompt][number : number + 1]
            scores.append(self.teacher.similarity(one, passages[columns], self.weights)[0].tolist())
        return scores

    def _encoded(self, texts: list[str], kind: Any, instruction: str | None = None) -> Any:
        more: dict[str, Any] = {"heads": tuple(self.weights), "instruction": instruction, "cuts": self.cuts}
        return self.teacher.encode(texts, kind, progress=False, **more, **self.options)


def score(
    input_file: Paths, output_file: str | Path, scorer: Scorer, *, overwrite: bool = False, window: int = WINDOW
) -> ScoringReport:
    """Write rows with `pos_scores` and `neg_scores`, in place of those that they had.

    A killed call goes on where it was, when it is made again with the same arguments.

    Raises:
        DataError: a row cannot be used, a score is not a number, or the output exists.
    """
    paths = file_paths(input_file)
    teacher = scorer.teacher
    made_by = {
        "input": [identity(path) for path in paths],
        "model": [teacher.fingerprint, teacher.precision],
        "settings": [
            scorer.weights,
            scorer.normalize,
            {k: v for k, v in scorer.options.items() if k != "batch_tokens"},
        ],
    }
    with resumable(output_file, made_by, overwrite) as out:
        report = ScoringReport(**out.state)
        with reading(paths, "score", skip=out.done) as items:
            while batch := list(islice(items, window)):
                rows = [checked_row(place, raw) for place, raw in batch]
                for values in _scored(scorer, rows, [place for place, _ in batch], report):
                    out.write(values)
                out.state = report.to_dict()
                out.advance(len(rows))
    scorer.cuts.tell()
    return report


def _scored(scorer: Scorer, rows: list[Row], places: list[str], report: ScoringReport) -> Iterable[dict[str, Any]]:
    for row, place, (positives, negatives) in zip(rows, places, scorer.score(rows), strict=True):
        if not all(math.isfinite(score) for score in (*positives, *negatives)):
            raise DataError(f"{place}: the teacher's score is not a finite number; try --precision fp32")
        report.add(positives, negatives)
        yield {**as_json(row), "pos_scores": positives, "neg_scores": negatives}


def _texts(row: Row) -> list[str]:
    return [*row.pos, *(row.neg or ())]


def _numbered(texts: Iterable[str]) -> dict[str, int]:
    """Distinct texts with their places."""
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}


def _weights(teacher: Encoder, weights: Mapping[str, float] | None) -> dict[str, float]:
    if weights is None and len(teacher.heads) > 1:
        example = ",".join(f"{head}=1" for head in teacher.heads)
        raise UsageError(f"the model has several heads: say how they weigh, such as {example}")
    found = {teacher.heads[0]: 1.0} if weights is None else {head: w for head, w in weights.items() if w}
    for head in found:
        if head not in teacher.heads:
            known = ", ".join(teacher.heads)
            raise UsageError(
                f"weights: the model has no head '{head}'{did_you_mean(head, teacher.heads)}; it has {known}"
            )
    if not found:
        raise UsageError("weights: all are 0; at least one head must count")
    return found
