"""The command `ultrarag data score`: a teacher's scores for rows; knows FlagEmbedding's add_reranker_score flags."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ultrarag.data.flags import Parser
from ultrarag.data.models import (
    RERANKERS,
    add_embedder,
    add_machine,
    add_switch,
    load_embedder,
    load_reranker,
    say_without_effect,
    template,
    weights,
)
from ultrarag.errors import UsageError

if TYPE_CHECKING:
    from ultrarag.data.scoring import Scorer


def main(argv: Sequence[str]) -> int:
    """Score, and say what the teacher thinks of the rows."""
    arguments = _read(argv)
    from ultrarag.data.scoring import score

    report = score(arguments.input_file, arguments.output_file, _scorer(arguments), overwrite=arguments.overwrite)
    print(json.dumps(report.to_dict(), ensure_ascii=False) if arguments.json else report)
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
    from ultrarag.data.scoring import Scorer

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
    add("--reranker_adapter", metavar="NAME", help="the kind of reranker; not needed for a checkpoint of ours")
    classes = [*RERANKERS, "decoder-only-lightweight"]
    add("--reranker_model_class", choices=classes, help="FlagEmbedding's name for --reranker_adapter")
    add("--reranker_max_length", "--max_length", type=int, metavar="N", help="longest pair in tokens")
    add_switch(group, "--normalize", help="scores from 0 to 1, through the logistic function")
    for kind in ("query", "passage"):
        add(f"--{kind}_instruction_for_rerank", metavar="TEXT", help=f"instruction before a {kind}")
        add(f"--{kind}_instruction_format_for_rerank", type=template, metavar="FORMAT", help="how it is put there")
    add("--prompt", metavar="TEXT", help="of a language model: the question put to it after the pair")
    add("--cutoff_layers", type=int, nargs="+", metavar="N", help="of a layerwise reranker: the layer that scores")
