"""The command line of the live index, `ultrarag index COMMAND PATH ...`; --help imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ultrarag.encoder.engines import PRECISIONS, add_engine_flag
from ultrarag.errors import UsageError
from ultrarag.io import run_command, underscored

METRICS = "nDCG@10,Recall@10,MRR@10"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 (it failed), 2 (wrong usage), 130 (Ctrl-C)."""
    words = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    return run_command(lambda: _run(words), "every write that was reported is kept")


def _run(words: list[str]) -> int:
    if not words:
        _parser().print_help(sys.stderr)
        return 2
    arguments = _parse(words)
    return int(_command(arguments.command)(arguments) or 0)


def _parse(words: list[str]) -> argparse.Namespace:
    """Read the command line; the flags of `refresh` that are not ours are fine-tuning's."""
    arguments, rest = _parser().parse_known_args(words)
    if arguments.command == "refresh":
        arguments.finetune = finetune_flags(rest)
    elif rest:
        raise UsageError(f"'{rest[0]}' is not understood; see ultrarag index {arguments.command} --help")
    return arguments


def _command(name: str) -> Callable[[argparse.Namespace], Any]:
    """The function that runs a command; imported now, so that --help needs none of it."""
    function: Callable[[argparse.Namespace], Any] = getattr(import_module("ultrarag.retrieve.command.commands"), name)
    return function


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ultrarag index",
        description="Make, fill, search and renew a live index. Flags may be written with dashes or underscores.",
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, (text, add) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        command.add_argument("path", metavar="PATH", help="the index directory")
        add(command)
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="checkpoint folder, or name on the Hub")
    parser.add_argument("--adapter", metavar="NAME", help="the kind of model; default: what the folder says")
    _trust(parser)
    parser.add_argument("--heads", type=_names, metavar="A,B", help="the heads to store; default: all of the model's")
    parser.add_argument(
        "--backend",
        help="the vector engine: qdrant-edge, ivf, numpy, or a server: qdrant://HOST:6333, milvus://HOST:19530",
    )
    parser.add_argument("--uri", help="make an index in a server that many processes share; PATH is a mirror of it")
    _checkpoints(parser)
    parser.add_argument("--no_bm25", action="store_true", help="do not index the words")
    parser.add_argument("--query_max_length", type=int, metavar="N", help="longest query in tokens")
    parser.add_argument("--passage_max_length", type=int, metavar="N", help="longest passage in tokens")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of the forward (default: fp32)")
    _device(parser)


def _mirror(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--uri", required=True, help="the shared index: qdrant://HOST:6333/NAME, milvus://...")
    _checkpoints(parser)
    _trust(parser)
    _device(parser)


def _checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", metavar="DIR", help="a folder that all processes of a shared index see")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="JSONL with _id (or id), text (or contents), title, metadata; a folder in BEIR's layout; or - for stdin",
    )
    parser.add_argument(
        "--layout",
        choices=["plain", "ultrarag_v3"],
        default="plain",
        help="ultrarag_v3: a corpus of UltraRAG, whose rows may repeat an id: they get id#2, id#3 (default: plain)",
    )
    _device(parser)


def _delete(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="ids of passages")
    parser.add_argument("--ids_file", metavar="FILE", help="a file with one id per line, or - for stdin")
    _device(parser)


def _search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("query", nargs="?", metavar="QUERY", help="what to search for")
    parser.add_argument("--queries", metavar="FILE", help="JSONL with _id and text, or lines of id, tab, text")
    parser.add_argument("--k", type=int, default=10, help="hits per query (default: 10)")
    parser.add_argument("--run", metavar="FILE", help="write the hits as a TREC run")
    _search_options(parser)
    _device(parser)


def _status(parser: argparse.ArgumentParser) -> None:
    """Nothing but the path."""


def _build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint to encode the passages with")
    parser.add_argument(
        "--adapter",
        metavar="NAME",
        help="the kind of model; default: what the checkpoint says",
    )
    _trust(parser)
    parser.add_argument("--heads", type=_names, metavar="A,B", help="the heads to store; default: all of the model's")
    parser.add_argument("--backend", help="the vector engine; default: the live one's, ivf for many passages")
    parser.add_argument("--threads", type=int, metavar="N", help="of the builder; default: half of the cores")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the forward; default: the live generation's")
    share_flags(parser)
    parser.add_argument(
        "--bridge",
        metavar="FOLDER",
        help="BEIR folder about this index's passages: serve by the new model from the old vectors while the build "
        "runs, if that is significantly better on its test queries (docs/bridge.md)",
    )
    _device(parser)
    ray = parser.add_argument_group("Ray", "Encode on a Ray cluster and write to a server; see docs/distributed.md.")
    ray.add_argument("--ray", metavar="ADDRESS", help="local, auto (the cluster of this machine), or HOST:PORT")
    ray.add_argument("--workers", type=int, metavar="N", help="default: one for each GPU, or CPU without any")
    ray.add_argument("--gpus_per_worker", type=float, metavar="X", help="such as 1 or 0.5; default: 1 if there are any")
    ray.add_argument("--cpus_per_worker", type=int, metavar="N", help="without GPUs; default: 1")
    ray.add_argument("--batch_tokens", type=int, metavar="N", help="padded tokens per forward of a worker")
    ray.add_argument("--block", type=int, metavar="N", help="passages between two confirmations; default: 2048")


def share_flags(parser: argparse.ArgumentParser) -> None:
    """What a build says of vectors that are there; default: they are used where they are the new model's too."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--share",
        action="store_true",
        default=None,
        help="use the vectors that are there, or stop: encode no stored passage",
    )
    either.add_argument(
        "--no_share",
        dest="share",
        action="store_false",
        help="encode all passages; default: only where the vectors that are there are not the model's",
    )


def _swap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("generation", nargs="?", type=int, metavar="GENERATION", help="default: the one that is ready")
    parser.add_argument("--gate", metavar="FOLDER", help="BEIR folder: refuse a generation that is worse on it")
    parser.add_argument("--split", default="test", help="of the gate's qrels (default: test)")
    parser.add_argument("--metric", default="nDCG@10", help="what the gate compares (default: nDCG@10)")
    parser.add_argument("--force", action="store_true", help="go live although the gate says no; this is recorded")
    _identical(parser)
    _search_options(parser)
    _device(parser)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="BEIR folder with queries.jsonl and qrels/SPLIT.tsv")
    parser.add_argument("--split", default="test", help="(default: test)")
    parser.add_argument("--metrics", type=_names, default=_names(METRICS), metavar="A,B", help=f"(default: {METRICS})")
    parser.add_argument("--k", type=int, help="hits per query; default: the deepest cut-off among the metrics")
    parser.add_argument("--per_query", action="store_true", help="also print the metrics of each query")
    parser.add_argument("--compare", metavar="RUN", help="a TREC run to compare with, by paired bootstrap")
    parser.add_argument("--run", metavar="FILE", help="write the hits as a TREC run")
    _identical(parser)
    _search_options(parser)
    _device(parser)


def _refresh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--train_data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="JSONL files or directories; feedback: the index's own log",
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="where the new checkpoint goes")
    parser.add_argument("--eval_data", metavar="PATH", help="held-out data, also the gate's: JSONL, or a BEIR folder")
    parser.add_argument(
        "--effort",
        default="full",
        choices=("auto", "query-map", "query", "passage-map", "full"),
        help="what learns: all but full encode no passage again; auto takes the first that is enough (default: full)",
    )
    parser.add_argument(
        "--bridge",
        action="store_true",
        help="while a full refresh is built, serve by the new model from the old vectors, if that is significantly "
        "better (docs/bridge.md)",
    )
    parser.add_argument("--no_gate", action="store_true", help="swap without comparing")
    parser.add_argument("--metric", default="nDCG@10", help="what the gate compares (default: nDCG@10)")
    parser.add_argument("--force", action="store_true", help="go live although the gate says no; this is recorded")
    _identical(parser)
    _fusion_options(parser)
    _device(parser)
    parser.epilog = "All other flags are those of fine-tuning: see ultrarag finetune --help."


def _identical(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore_identical_ids",
        action="store_true",
        help="leave out the passage with the query's own id, for queries that are passages (ArguAna, Quora)",
    )


def _search_options(parser: argparse.ArgumentParser) -> None:
    _fusion_options(parser)
    parser.add_argument("--heads", type=_names, metavar="A,B", help="heads to search: dense, sparse, colbert, bm25")
    parser.add_argument(
        "--filter", type=_filter, metavar="JSON", help='condition on the metadata, such as {"lang": "en"}'
    )
    parser.add_argument("--candidates", type=int, metavar="N", help="hits asked of each head before fusion")
    parser.add_argument("--exact", action="store_true", help="compare the dense vector with all passages")


def _fusion_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", type=parse_weights, metavar="HEAD=X,...", help="weight of each head, such as dense=1,bm25=0.3"
    )
    parser.add_argument("--fusion", choices=["weighted", "rrf"], help="weighted sum, or reciprocal rank fusion")
    parser.add_argument("--normalize", choices=["minmax", "raw"], help="of each head's scores before they are weighted")


def _trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="where the encoder runs, such as cuda; default: the best there is")
    add_engine_flag(parser)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_weights(text: str) -> dict[str, float]:
    """Read "dense=1,bm25=0.3"; argparse.ArgumentTypeError for anything else."""
    weights: dict[str, float] = {}
    for part in _names(text):
        head, _, number = part.partition("=")
        try:
            weights[head.strip()] = float(number)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{part}' is not HEAD=NUMBER, such as dense=1,bm25=0.3") from None
    return weights


def _filter(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('a filter is a JSON object, such as {"lang": "en"}')
    return value


def finetune_flags(words: Sequence[str]) -> dict[str, Any]:
    """Read `--name value ...` as keywords of fine-tuning, whose own reader turns texts into numbers.

    A flag alone is True, `--no_name` alone False, and several values make a list.
    """
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if name in found:
                raise UsageError(f"--{name} given twice")
            found[name] = [value] if equals else []
        elif name:
            found[name].append(word)
        else:
            raise UsageError(f"'{word}' follows no flag that it could be a value of")
    return dict(_keyword(name, values) for name, values in found.items())


def _keyword(name: str, values: list[str]) -> tuple[str, Any]:
    if not values:
        return (name[3:], False) if name.startswith("no_") else (name, True)
    return name, values[0] if len(values) == 1 else values


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "create": ("make an empty index for a model", _create),
    "mirror": ("make a mirror of a shared index, for one more process", _mirror),
    "add": ("insert passages, or replace those with the same id", _add),
    "delete": ("delete passages by id", _delete),
    "search": ("search with a query, or a file of queries", _search),
    "status": ("describe an index, also while another process owns it", _status),
    "build": ("encode all passages with another checkpoint, into a new generation", _build),
    "swap": ("make a new generation the live one", _swap),
    "rollback": ("bring the previous generation back", _device),
    "evaluate": ("search judged queries and measure", _evaluate),
    "refresh": ("fine-tune on new data, build, check and swap, in one go", _refresh),
    "retry": ("encode the passages again that could not be encoded", _device),
    "vacuum": ("remove what retired generations and deleted passages left behind", _device),
}
