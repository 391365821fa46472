"""Teacher scores for rows: a cross-encoder's, or the weighted heads of an embedding model; `score` for files."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.data.cli import (
    RERANKERS,
    Parser,
    add_embedder,
    add_machine,
    add_switch,
    load_embedder,
    load_reranker,
    say_without_effect,
    template,
    weights,
)
from ultrarag.encoder import Cuts
from ultrarag.errors import DataError, UsageError, did_you_mean
from ultrarag.io import identity, print_result, resumable
from ultrarag.rows import Paths, as_json, checked_row, file_paths, reading

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.rows import Row


#: Rows whose texts are encoded together, each distinct one once.
CHUNK_ROWS = 256


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
    input_file: Paths, output_file: str | Path, scorer: Scorer, *, overwrite: bool = False, chunk_rows: int = CHUNK_ROWS
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
            while batch := list(islice(items, chunk_rows)):
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


def main(argv: Sequence[str]) -> int:
    """Score, and say what the teacher thinks of the rows."""
    arguments = _read(argv)

    report = score(arguments.input_file, arguments.output_file, _scorer(arguments), overwrite=arguments.overwrite)
    print_result(report, arguments.json)
    return 0


def _read(argv: Sequence[str]) -> argparse.Namespace:
    arguments = _parser().read(argv)
    if bool(arguments.reranker_name_or_path) == bool(arguments.model_name_or_path):
        raise UsageError("name one teacher: --reranker_name_or_path, or an embedding model as --model_name_or_path")
    if arguments.reranker_peft_path:
        raise UsageError("--reranker_peft_path is not available: merge the adapter into the model, and name that")
    if arguments.compress_ratio not in (None, 1) or arguments.compress_layers:
        raise UsageError(
            "--compress_ratio and --compress_layers are for lightweight rerankers, which are not available"
        )
    if len(arguments.cutoff_layers or ()) > 1:
        raise UsageError("--cutoff_layers names several layers; a row has one score per text: name one")
    own = "it is chosen for the machine; --batch_tokens sets the padded tokens per forward"
    say_without_effect(arguments, reranker_batch_size=own)
    return arguments


def _scorer(arguments: argparse.Namespace) -> Scorer:

    options: dict[str, Any] = {"batch_tokens": arguments.batch_tokens}
    if arguments.model_name_or_path:
        return Scorer(load_embedder(arguments), arguments.weights, arguments.normalize, **options)
    options |= {"query_max_length": arguments.query_max_length, "max_length": arguments.reranker_max_length}
    settings = {
        "query_instruction": arguments.query_instruction_for_rerank,
        "query_format": arguments.query_instruction_format_for_rerank,
        "passage_instruction": arguments.passage_instruction_for_rerank,
        "passage_format": arguments.passage_instruction_format_for_rerank,
        "prompt": arguments.prompt,
        "cutoff_layer": arguments.cutoff_layers[0] if arguments.cutoff_layers else None,
    }
    return Scorer(load_reranker(arguments, **settings), arguments.weights, arguments.normalize, **options)


def _parser() -> Parser:
    parser = Parser("score", "Write pos_scores and neg_scores of a teacher: a reranker, or an embedding model's heads.")
    add = parser.add_argument_group("files").add_argument
    add("--input_file", required=True, nargs="+", metavar="PATH", help="rows: JSONL files or directories of them")
    add("--output_file", "--output", "-o", required=True, metavar="FILE", help="rows with their scores")
    add("--overwrite", action="store_true", help="replace what is there, finished or begun")
    add("--json", action="store_true", help="print JSON")
    _add_reranker(parser)
    add_embedder(parser, "an embedding model as the teacher", "--reranker_query_max_length")
    parser.add_argument(
        "--weights", type=weights, metavar="HEAD=X,...", help="of its heads, such as dense=1,sparse=0.3"
    )
    add_machine(parser)
    unused = parser.add_argument_group("read, and without effect or not available")
    unused.add_argument("--reranker_batch_size", "--batch_size", type=int, help=argparse.SUPPRESS)
    unused.add_argument("--reranker_peft_path", help=argparse.SUPPRESS)
    unused.add_argument("--compress_ratio", type=int, help=argparse.SUPPRESS)
    unused.add_argument("--compress_layers", type=int, nargs="+", help=argparse.SUPPRESS)
    return parser


def _add_reranker(parser: Parser) -> None:
    group = parser.add_argument_group("a reranker as the teacher")
    add = group.add_argument
    add("--reranker_name_or_path", metavar="MODEL", help="checkpoint folder, or name on the Hub")
    add("--reranker_adapter", metavar="NAME", help="the kind of reranker; default: what the folder says")
    classes = [*RERANKERS, "decoder-only-lightweight"]
    add("--reranker_model_class", choices=classes, help="FlagEmbedding's name for --reranker_adapter")
    add("--reranker_max_length", "--max_length", type=int, metavar="N", help="longest pair in tokens")
    add_switch(group, "--normalize", help="scores from 0 to 1, through the logistic function")
    for kind in ("query", "passage"):
        add(f"--{kind}_instruction_for_rerank", metavar="TEXT", help=f"instruction before a {kind}")
        add(f"--{kind}_instruction_format_for_rerank", type=template, metavar="FORMAT", help="how it is put there")
    add("--prompt", metavar="TEXT", help="of a language model: the question put to it after the pair")
    add("--cutoff_layers", type=int, nargs="+", metavar="N", help="of a layerwise reranker: the layer that scores")
