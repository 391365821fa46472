"""`ultrarag evaluate MODEL --mteb TASK ...`: a model, alone or searching, on MTEB's tasks and on one's own folders."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.encoder.engines import PRECISIONS, add_engine_flag
from ultrarag.errors import DataError, UsageError
from ultrarag.io import print_result, run_command, table, underscored

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status: 0, 1 (it failed), 2 (wrong usage), 130 (Ctrl-C)."""
    words = [underscored(word) for word in argv]
    return run_command(lambda: _run(_parser().parse_args(words)), "results of finished tasks are in --output")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ultrarag evaluate",
        description="Evaluate a model with MTEB: on its tasks, or on folders in BEIR's layout (docs/doors.md). A live "
        "index is evaluated by ultrarag index evaluate.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or name on the Hub")
    parser.add_argument(
        "--mteb",
        nargs="*",
        required=True,
        metavar="TASK",
        help="names of MTEB's tasks, such as SciFact; may be none with --data",
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="FOLDER", help="BEIR folders, as tasks of their names")
    parser.add_argument("--split", default="test", help="of the folders' qrels (default: test)")
    parser.add_argument("--output", metavar="DIR", help="keep results in MTEB's form; finished tasks are not run again")
    parser.add_argument("--name", help="in MTEB's results, such as me/model; default: the Hub's, or local/FOLDER")
    parser.add_argument(
        "--task_prompts", action="store_true", help="give a model that follows instructions each task's own"
    )
    _model_flags(parser)
    _search_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="NAME", help="the kind of model; default: what the folder says")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--precision", default="fp32", choices=[*PRECISIONS, "auto"])
    parser.add_argument("--device", help="where the models run, such as cuda; default: the best there is")
    add_engine_flag(parser)


def _search_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search", "Retrieval by a live index that is made for the run: any of these.")
    group.add_argument("--weights", type=_weights, metavar="HEAD=X,...", help="heads and weights: dense=1,bm25=0.3")
    group.add_argument("--fusion", choices=["weighted", "rrf"], help="weighted sum, or reciprocal rank fusion")
    group.add_argument("--normalize", choices=["minmax", "raw"], help="of each head's scores before they are weighted")
    group.add_argument("--candidates", type=int, metavar="N", help="hits asked of each head before fusion")
    group.add_argument("--backend", help="the vector engine of the index, such as numpy (exact)")
    group.add_argument("--reranker", metavar="MODEL", help="a cross-encoder that orders the best hits")
    group.add_argument("--depth", type=int, default=100, metavar="N", help="hits that are reranked (default: 100)")
    group.add_argument("--rerank_weight", type=float, metavar="X", help="of its scores beside the hits' own")


def _weights(text: str) -> dict[str, float]:
    try:
        return {head.strip(): float(number) for head, _, number in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not HEAD=NUMBER,..., such as dense=1,bm25=0.3") from None


def _run(arguments: argparse.Namespace) -> None:
    if not arguments.mteb and not arguments.data:
        raise UsageError("say what to evaluate: --mteb TASK ..., or --mteb --data FOLDER ...")
    from ultrarag.doors.mteb.framework import mteb

    tasks = [*map(_task, arguments.mteb), *(_folder(folder, arguments.split) for folder in arguments.data)]
    logging.getLogger("mteb").setLevel(logging.ERROR)  # failures are told below, by their task
    results = mteb.evaluate(
        _model(arguments),
        tasks,
        cache=mteb.ResultCache(arguments.output) if arguments.output else None,
        raise_error=False,
        co2_tracker=False,
    )
    print_result(_plain(results, tasks), arguments.json, _text)
    if results.exceptions:
        failed = "; ".join(f"{error.task_name}: {_reason(error.exception)}" for error in results.exceptions)
        raise DataError(f"{len(results.exceptions)} of {len(tasks)} tasks failed: {failed}")


def _task(name: str) -> Any:
    from ultrarag.doors.mteb.framework import mteb

    try:
        return mteb.get_task(name)
    except KeyError as error:
        why = str(error.args[0]).removeprefix("KeyError: ")
        raise UsageError(f"MTEB has no such task: {why} A folder of your own: --data") from error


def _folder(folder: str, split: str) -> Any:
    from ultrarag.doors.mteb.tasks import beir_task

    return beir_task(folder, split)


def _model(arguments: argparse.Namespace) -> Any:
    """What MTEB is given: a search, where one is described, else a reranker or an encoder."""
    from ultrarag.doors.mteb.encoder import MtebEncoder
    from ultrarag.doors.mteb.reranker import MtebReranker
    from ultrarag.doors.mteb.search import MtebSearch

    encoder = _loaded(arguments, arguments.model, arguments.adapter)
    name = arguments.name or _name(arguments.model)
    search = {key: getattr(arguments, key) for key in ("weights", "fusion", "normalize", "candidates", "backend")}
    search = {key: value for key, value in search.items() if value is not None}
    if search or arguments.reranker or "dense" not in (*encoder.heads, *_pairs(encoder)):
        if arguments.task_prompts:
            raise UsageError("--task_prompts is for models that MTEB encodes with: an index has one instruction")
        if arguments.reranker:
            search["reranker"] = _loaded(arguments, arguments.reranker, None)
        return MtebSearch(encoder, name=name, depth=arguments.depth, rerank_weight=arguments.rerank_weight, **search)
    kind = MtebReranker if "scores" in encoder.heads else MtebEncoder
    return kind(encoder, name=name, task_prompts=arguments.task_prompts)


def _pairs(encoder: Encoder) -> tuple[str, ...]:
    """A model that scores pairs has no vectors to search by, and is given as it is."""
    return ("dense",) if "scores" in encoder.heads else ()


def _loaded(arguments: argparse.Namespace, path: str, adapter: str | None) -> Encoder:
    from ultrarag.encoder import Encoder

    return Encoder.load(
        path,
        adapter,
        device=arguments.device,
        precision=arguments.precision,
        engine=arguments.engine,
        trust_remote_code=arguments.trust_remote_code,
    )


def _name(model: str) -> str:
    return f"local/{Path(model).resolve().name}" if Path(model).is_dir() else model


def _plain(results: Any, tasks: Sequence[Any]) -> dict[str, Any]:
    """Plain JSON values: the model, and each task's scores by split and subset."""
    metrics = {task.metadata.name: task.metadata.main_score for task in tasks}
    rows = [
        {
            "task": task.task_name,
            "split": split,
            "subset": scores["hf_subset"],
            "metric": metrics[task.task_name],
            "main_score": scores["main_score"],
            "scores": {key: value for key, value in scores.items() if isinstance(value, int | float)},
        }
        for task in results.task_results
        for split, found in task.scores.items()
        for scores in found
    ]
    return {"model": results.model_name, "revision": results.model_revision, "results": rows}


def _text(found: dict[str, Any]) -> str:
    rows = [(r["task"], r["split"], r["subset"], r["metric"], f"{r['main_score']:.5f}") for r in found["results"]]
    lines = f"{found['model']} {found['revision'][:12]}"
    return f"{lines}\n{table(('task', 'split', 'subset', 'metric', 'score'), rows)}" if rows else lines


def _reason(exception: str) -> str:
    """The last line of what MTEB kept of an error."""
    lines = [line.strip() for line in exception.strip().splitlines() if line.strip()]
    return lines[-1] if lines else exception
