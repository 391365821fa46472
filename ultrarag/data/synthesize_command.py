"""The command `ultrarag data synthesize`: queries for passages, by a language model or without one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ultrarag.data.cli import Parser, add_embedder, add_machine, load_embedder, weights
from ultrarag.errors import UsageError
from ultrarag.io import print_result

if TYPE_CHECKING:
    from ultrarag.data.synthesize_client import Endpoint
    from ultrarag.encoder import Encoder

#: What only an endpoint needs.
_ASKING = ("base_url", "llm")


def main(argv: Sequence[str]) -> int:
    """Make queries, and say how many there are and what they cost."""
    arguments = _read(argv)
    from ultrarag.data.synthesizing import SynthesisSettings, synthesize

    settings = SynthesisSettings(
        queries=arguments.queries,
        language=arguments.language,
        prompt_file=arguments.prompt_file,
        attempts=arguments.attempts,
        limit=arguments.limit,
        round_trip_k=arguments.round_trip_k,
        weights=arguments.weights,
    )
    report = synthesize(
        arguments.input_file,
        arguments.output_file,
        arguments.baseline or _endpoint(arguments),
        settings,
        encoder=_encoder(arguments),
        concurrency=arguments.concurrency,
        overwrite=arguments.overwrite,
    )
    cost = report.cost(arguments.price_in, arguments.price_out)
    found = {**report.to_dict(), "cost": cost}
    print_result(found, arguments.json, lambda _: f"{report}; cost {cost:.4f}" if cost else report)
    return 0


def _read(argv: Sequence[str]) -> argparse.Namespace:
    arguments = _parser().read(argv)
    given = [name for name in _ASKING if getattr(arguments, name)]
    if arguments.baseline and given:
        raise UsageError(f"--baseline asks no model: leave out --{given[0]}")
    if not arguments.baseline and len(given) < len(_ASKING):
        raise UsageError("name the endpoint with --base_url and --llm, or use --baseline title or first_sentence")
    if arguments.concurrency < 1:
        raise UsageError(f"--concurrency is {arguments.concurrency}; it must be at least 1")
    searches = arguments.model_name_or_path or set(arguments.weights or {}) == {"bm25"}
    if arguments.round_trip_k and not searches:
        raise UsageError("--round_trip_k needs --model_name_or_path, or --weights bm25=1")
    return arguments


def _endpoint(arguments: argparse.Namespace) -> Endpoint:
    from ultrarag.data.synthesize_client import Endpoint, key_from

    body: dict[str, Any] = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens or None}
    body |= {"seed": arguments.seed, "response_format": {"type": "json_object"} if arguments.json_mode else None}
    return Endpoint(
        arguments.base_url,
        arguments.llm,
        key_from(arguments.api_key_env),
        {name: value for name, value in body.items() if value is not None},
        timeout=arguments.timeout,
        retries=arguments.max_retries,
    )


def _encoder(arguments: argparse.Namespace) -> Encoder | None:
    if not arguments.round_trip_k or not arguments.model_name_or_path:
        return None
    return load_embedder(arguments)


def _parser() -> Parser:
    parser = Parser("synthesize", "Write queries for passages, as rows of training data.")
    add = parser.add_argument_group("files").add_argument
    add("--input_file", required=True, metavar="PATH", help="passages: JSONL with 'text', or a BEIR folder")
    add("--output_file", "--output", "-o", required=True, metavar="FILE", help="rows of a query and its passage")
    add("--limit", type=int, metavar="N", help="the first N passages only")
    add("--overwrite", action="store_true", help="replace the output; answers to the same questions stay")
    add("--json", action="store_true", help="print JSON")
    _add_asking(parser)
    _add_endpoint(parser)
    group = parser.add_argument_group("round trip: keep a query that finds its passage")
    group.add_argument("--round_trip_k", type=int, metavar="K", help="among the first K hits, of all passages")
    group.add_argument("--weights", type=weights, metavar="HEAD=X,...", help="of the heads that search, or bm25=1")
    add_embedder(parser, "model that searches for the round trip")
    add_machine(parser)
    return parser


def _add_asking(parser: Parser) -> None:
    add = parser.add_argument_group("queries").add_argument
    add(
        "--baseline",
        choices=["title", "first_sentence"],
        help="no language model: this is the query, the rest its text",
    )
    add("--queries", type=int, default=3, metavar="N", help="per passage (default: 3)")
    add("--language", choices=["auto", "en", "zh"], default="auto", help="of the prompt (default: auto, by passage)")
    add("--prompt_file", metavar="FILE", help="a prompt of your own, with {passage} and {count}")
    add("--attempts", type=int, default=3, metavar="N", help="asked so often when answers hold no JSON (default: 3)")


def _add_endpoint(parser: Parser) -> None:
    group = parser.add_argument_group("language model, behind an endpoint like OpenAI's")
    add = group.add_argument
    add("--base_url", metavar="URL", help="such as https://api.openai.com/v1 or http://localhost:8000/v1")
    add("--llm", metavar="NAME", help="as the endpoint names it")
    add("--api_key_env", metavar="NAME", help="the environment variable with the key (default: OPENAI_API_KEY, if set)")
    add("--temperature", type=float, metavar="X", help="default: the endpoint's")
    add("--max_tokens", type=int, default=512, metavar="N", help="of an answer; 0: not sent (default: 512)")
    add("--seed", type=int, metavar="N", help="sent along, for endpoints that know it")
    add("--json_mode", action="store_true", help="ask the endpoint to enforce JSON")
    add("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: 8)")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="of a request (default: 120)")
    add("--max_retries", type=int, default=8, metavar="N", help="when it is busy or gone (default: 8)")
    add("--price_in", type=float, default=0.0, metavar="X", help="of a million tokens in the prompt")
    add("--price_out", type=float, default=0.0, metavar="X", help="of a million tokens in the answer")
