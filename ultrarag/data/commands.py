"""Commands whose work other rooms do: `ultrarag data encode` and `ultrarag data mine`.

The second is also `python -m ultrarag.retrieve.mine`, with the flags of FlagEmbedding's hn_mine.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ultrarag.data.cli import (
    RERANKERS,
    Parser,
    add_embedder,
    add_machine,
    add_switch,
    device,
    load_embedder,
    load_reranker,
    say_without_effect,
    weights,
)
from ultrarag.encoder.engines import PRECISIONS, add_engine_flag
from ultrarag.errors import UsageError
from ultrarag.io import print_result

if TYPE_CHECKING:
    from ultrarag.encode import EncodedCorpus
    from ultrarag.encoder import Encoder
    from ultrarag.mining import MiningSettings
    from ultrarag.retrieve import LiveIndex

#: What the model flags are called that a live index does not need.
_MODEL_FLAGS = ("model_name_or_path", "query_instruction_for_retrieval", "query_max_length", "passage_max_length")


def run_encode(argv: Sequence[str]) -> int:
    """Encode, and print what was written."""
    arguments = _encode_parser().parse_args(argv)
    from ultrarag.encode import Compression, ModelChoice, encode_corpus

    model = ModelChoice(
        arguments.model_name_or_path,
        arguments.adapter,
        arguments.precision,
        arguments.passage_max_length,
        arguments.batch_tokens,
        arguments.trust_remote_code,
    )
    found = encode_corpus(
        model,
        arguments.input_file,
        arguments.output,
        heads=arguments.heads,
        compression=Compression(arguments.format, arguments.truncate_dim),
        devices=arguments.devices or (None,),
        overwrite=arguments.overwrite,
    )
    print_result(_facts(found), arguments.json, lambda _: _summary(found))
    return 0


def _encode_parser() -> argparse.ArgumentParser:
    from ultrarag.encode import FORMATS

    parser = argparse.ArgumentParser(
        prog="ultrarag data encode", description="Encode a corpus to disk; a killed run goes on where it stopped."
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, metavar="MODEL", help="checkpoint folder, or name on the Hub")
    add("--adapter", metavar="NAME", help="the kind of model; default: what the folder says")
    add_switch(parser, "--trust_remote_code", help="run Python code that comes with the model")
    add("--input_file", "--corpus", required=True, metavar="PATH", help="JSONL of passages, or a BEIR folder")
    add("--output", "-o", "--output_dir", required=True, metavar="DIR", help="the folder of the vectors")
    add("--heads", nargs="+", metavar="HEAD", help="default: all that the model has")
    add("--format", choices=FORMATS, default="float32", help="of the dense vectors' numbers (default: float32)")
    add("--truncate_dim", type=int, metavar="N", help="keep the first N dimensions (Matryoshka models)")
    add("--devices", "--device", nargs="+", metavar="NAME", help="one process for each, such as cuda:0 cuda:1")
    add("--precision", choices=[*PRECISIONS, "auto"], default="fp32", help="of the forward (default: fp32)")
    add_engine_flag(parser)
    add("--passage_max_length", type=int, metavar="N", help="longest passage in tokens")
    add("--batch_tokens", type=int, metavar="N", help="padded tokens per forward")
    add("--overwrite", action="store_true", help="replace what another model, corpus or format made")
    add("--json", action="store_true", help="print JSON")
    return parser


def _facts(found: EncodedCorpus) -> dict[str, object]:
    size = sum(path.stat().st_size for path in found.folder.rglob("*") if path.is_file())
    names = ("heads", "dim", "compression", "fingerprint")
    return {"output": str(found.folder), "passages": len(found), "bytes": size, **{n: found.info[n] for n in names}}


def _summary(found: EncodedCorpus) -> str:
    facts = _facts(found)
    return f"{facts['passages']} passages, {facts['bytes']} bytes, {', '.join(found.info['heads'])}: {facts['output']}"


def run_mine(argv: Sequence[str]) -> int:
    """Mine, and print what was found."""
    arguments = _read_mine(argv)
    from ultrarag.mining import mine_files

    with ExitStack() as stack:
        live, encoder = _search_model(arguments, stack)
        report = mine_files(
            arguments.input_file,
            arguments.output_file,
            encoder,
            settings_of(arguments),
            candidate_pool=arguments.candidate_pool,
            live=live,
            reranker=load_reranker(arguments) if arguments.reranker_name_or_path else None,
            reranker_options={"max_length": arguments.reranker_max_length},
            work_dir=arguments.work_dir,
            overwrite=arguments.overwrite,
            gpu=arguments.use_gpu_for_searching,
            batch_tokens=arguments.batch_tokens,
        )
    print_result(report, arguments.json)
    return 0


def settings_of(arguments: argparse.Namespace) -> MiningSettings:
    """The flags as settings."""
    from ultrarag.mining import MiningSettings

    return MiningSettings(
        weights=arguments.weights,
        fusion=arguments.fusion,
        range=arguments.range_for_sampling,
        negatives=arguments.negative_number,
        sampling=arguments.sampling,
        margin=arguments.margin,
        max_share=arguments.max_share,
        near_duplicate=arguments.near_duplicate or None,
        veto_above=arguments.veto_above,
        veto_margin=arguments.veto_margin,
        fill_random=arguments.fill_random,
        write_scores=arguments.write_scores,
        vectors=arguments.vectors,
        seed=arguments.seed,
    )


def _read_mine(argv: Sequence[str]) -> argparse.Namespace:
    arguments = _mine_parser().read(argv)
    if arguments.examples_for_task or arguments.examples_instruction_format:
        raise UsageError("--examples_for_task is not available: put the examples into the rows' 'prompt'")
    own = "it is chosen for the machine; --batch_tokens sets the padded tokens per forward"
    say_without_effect(arguments, batch_size=own, search_batch_size="vectors are searched in blocks of fixed size")
    return arguments


def _search_model(arguments: argparse.Namespace, stack: ExitStack) -> tuple[LiveIndex | None, Encoder | None]:
    """The live index and its encoder, or the model that was named, or nothing for BM25 alone."""
    if arguments.live_index:
        if arguments.candidate_pool:
            raise UsageError("--live_index and --candidate_pool both name candidates: give one")
        if given := [name for name in _MODEL_FLAGS if getattr(arguments, name) is not None]:
            raise UsageError(f"--{given[0]} does not go with --live_index, which has its own model")
        from ultrarag.retrieve import LiveIndex

        live = stack.enter_context(LiveIndex.open(arguments.live_index, device=device(arguments)))
        return live, live.encoder
    if arguments.model_name_or_path:
        return None, load_embedder(arguments)
    if set(arguments.weights or {}) != {"bm25"}:
        raise UsageError("name the model that finds candidates with --model_name_or_path, or use --weights bm25=1")
    return None, None


def _mine_parser() -> Parser:
    parser = Parser("mine", "Find hard negatives for rows of training data; they replace the rows' own in 'neg'.")
    _add_files(parser)
    add_embedder(parser, "model that finds candidates")
    _add_search(parser)
    _add_filters(parser)
    add_machine(parser)
    unused = parser.add_argument_group("read, and without effect or not available")
    unused.add_argument("--batch_size", type=int, help=argparse.SUPPRESS)
    unused.add_argument("--search_batch_size", type=int, help=argparse.SUPPRESS)
    unused.add_argument("--examples_for_task", help=argparse.SUPPRESS)
    unused.add_argument("--examples_instruction_format", help=argparse.SUPPRESS)
    return parser


def _add_files(parser: Parser) -> None:
    add = parser.add_argument_group("files").add_argument
    add("--input_file", required=True, nargs="+", metavar="PATH", help="rows: JSONL files or directories of them")
    add("--output_file", "--output", "-o", required=True, metavar="FILE", help="rows with their new negatives")
    add("--candidate_pool", metavar="PATH", help="JSONL with 'text', or a BEIR folder (default: the rows' passages)")
    add("--live_index", metavar="DIR", help="a live index: its passages, vectors and model are used")
    add("--work_dir", metavar="DIR", help="keep texts and vectors here for other runs (default: removed at the end)")
    add("--overwrite", action="store_true", help="replace what is there, finished or begun")
    add("--json", action="store_true", help="print JSON")


def _add_search(parser: Parser) -> None:
    group = parser.add_argument_group("candidates")
    add = group.add_argument
    add("--weights", type=weights, metavar="HEAD=X,...", help="dense, sparse, colbert, bm25 (default: dense=1)")
    add("--fusion", choices=["raw", "minmax"], default="raw", help="of several heads (default: raw)")
    add(
        "--range_for_sampling",
        type=_range,
        default=(10, 210),
        metavar="FIRST-LAST",
        help="ranks that negatives come from, from 0; the last is not included (default: 10-210)",
    )
    add("--negative_number", type=int, default=15, metavar="N", help="negatives per row (default: 15)")
    add("--sampling", choices=["random", "hardest"], default="random", help="which of the range (default: random)")
    add_switch(group, "--fill_random", help="give rows with too few negatives random texts of the pool")
    add_switch(group, "--use_gpu_for_searching", help="compare vectors on the GPU")
    add("--vectors", choices=["float32", "float16"], default="float32", help="on the disk (default: float32)")
    add("--seed", type=int, default=42, metavar="N", help="of what is drawn (default: 42)")


def _add_filters(parser: Parser) -> None:
    group = parser.add_argument_group("false negatives")
    add = group.add_argument
    add("--margin", type=float, metavar="X", help="a negative scores at least X less than the positive")
    add(
        "--max_share",
        type=float,
        metavar="X",
        help="a negative scores at most this share of the positive's score (TopK-PercPos), such as 0.95",
    )
    add(
        "--near_duplicate",
        type=float,
        default=0.8,
        metavar="X",
        help="share of common 3-word sequences from which a text counts as the positive; 0: any (default: 0.8)",
    )
    add("--reranker_name_or_path", metavar="MODEL", help="a cross-encoder that reads what was drawn")
    add("--reranker_adapter", metavar="NAME", help="the kind of reranker; default: what the folder says")
    add("--reranker_model_class", choices=[*RERANKERS], help="FlagEmbedding's name for --reranker_adapter")
    add("--reranker_max_length", type=int, metavar="N", help="longest pair in tokens")
    add("--veto_above", type=float, metavar="X", help="no negative has a reranker score (logit) above X")
    add("--veto_margin", type=float, metavar="X", help="its reranker score is at least X less than the positive's")
    add_switch(group, "--write_scores", help="write pos_scores and neg_scores: the reranker's, else the search's")


def _range(text: str) -> Any:
    found = re.fullmatch(r"(\d+)-(\d+)", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not FIRST-LAST, such as 10-210")
    return int(found[1]), int(found[2])
