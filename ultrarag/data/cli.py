"""The command line of training data, `ultrarag data COMMAND ...`: commands and flags, imported when they run."""

from __future__ import annotations

import argparse
import logging
import string
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from ultrarag.encoder.engines import PRECISIONS, add_engine_flag
from ultrarag.errors import UsageError, did_you_mean
from ultrarag.io import run_command, underscored

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


class Parser(argparse.ArgumentParser):
    """The parser of `ultrarag data NAME`; flags may be written with dashes or underscores."""

    def __init__(self, name: str, description: str, prog: str | None = None) -> None:
        super().__init__(prog=prog or f"ultrarag data {name}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError in place of printing the usage and leaving."""
        raise UsageError(message.replace("argument --", "--"))

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Read the words after the command's name.

        Raises:
            UsageError: a flag is unknown (names the nearest), or its value cannot be used.
        """
        found, rest = self.parse_known_args([underscored(word) for word in argv])
        for word in rest:
            name = word.partition("=")[0]
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = did_you_mean(name, known) if name.startswith("-") else ""
            raise UsageError(f"'{name}' is not understood{near}; see {self.prog} --help")
        return found

    def add_output(self, help: str) -> None:
        """Add --output, --overwrite and --json, which all commands that write files have."""
        self.add_argument("--output", "-o", required=True, metavar="PATH", help=help)
        self.add_argument("--overwrite", action="store_true", help="replace what is there, finished or begun")
        self.add_argument("--json", action="store_true", help="print JSON")


logger = logging.getLogger("ultrarag")

#: FlagEmbedding's classes of models -> our adapters
EMBEDDERS = {"encoder-only-base": "bge", "encoder-only-m3": "bgem3", "decoder-only-icl": "icl"}
RERANKERS = {
    "encoder-only-base": "bge-reranker",
    "decoder-only-base": "bge-reranker-gemma",
    "decoder-only-layerwise": "bge-reranker-minicpm-layerwise",
}
POOLING = ("cls", "mean", "last_token", "weighted_mean")


def boolean(text: str) -> bool:
    """Read True or False."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"'{text}' is not True or False")
    return text.lower() in ("true", "1", "yes")


def add_switch(group: Any, *names: str, help: str, default: bool | None = False) -> None:
    """Add a flag that stands alone, or before True or False."""
    group.add_argument(*names, nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=help)


def weights(text: str) -> dict[str, float]:
    """Read head=number,... ."""
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        head, _, number = part.partition("=")
        try:
            found[head.strip()] = float(number)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{part}' is not HEAD=NUMBER, such as dense=1,bm25=0.3") from None
    return found


def template(text: str) -> str:
    """Read a format with two holes, the instruction's and the text's; a typed backslash-n is a line break."""
    text = text.replace("\\n", "\n")
    try:
        holes = [part[1] for part in string.Formatter().parse(text) if part[1] is not None]
    except ValueError:
        holes = []
    if holes != ["", ""]:
        raise argparse.ArgumentTypeError(f"'{text}' must hold exactly two {{}}: the instruction, then the text")
    return text


def add_embedder(parser: argparse.ArgumentParser, title: str, *also_query_length: str) -> None:
    """Add the flags of an embedding model; `also_query_length` are more names of --query_max_length."""
    group = parser.add_argument_group(title)
    add = group.add_argument
    add(
        "--model_name_or_path", "--embedder_name_or_path", metavar="MODEL", help="checkpoint folder, or name on the Hub"
    )
    add("--adapter", metavar="NAME", help="the kind of model; default: what the folder says")
    add("--embedder_model_class", choices=[*EMBEDDERS, "decoder-only-base"], help="FlagEmbedding's name for --adapter")
    add("--query_instruction_for_retrieval", metavar="TEXT", help="instruction before queries")
    add(
        "--query_instruction_format_for_retrieval",
        "--query_instruction_format",
        type=template,
        metavar="FORMAT",
        help="how it is put there, such as '{}{}'",
    )
    lengths = ("--query_max_length", "--embedder_query_max_length", *also_query_length)
    add(*lengths, type=int, metavar="N", help="longest query in tokens")
    add(
        "--passage_max_length", "--embedder_passage_max_length", type=int, metavar="N", help="longest passage in tokens"
    )
    add("--pooling_method", choices=POOLING, help="default: what the checkpoint declares")
    add_switch(group, "--normalize_embeddings", default=None, help="default: what the checkpoint declares")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add how models run."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device", "--devices", nargs="+", metavar="NAME", help="such as cuda; default: the best there is"
    )
    group.add_argument("--precision", choices=PRECISIONS, help="of the forward (default: fp32)")
    add_engine_flag(group)
    add_switch(group, "--use_fp16", help="fp16 where there is a GPU, as FlagEmbedding does")
    add_switch(group, "--use_bf16", help="the same as --precision bf16")
    group.add_argument("--batch_tokens", type=int, metavar="N", help="padded tokens per forward")
    group.add_argument("--cache_dir", metavar="DIR", help="where downloaded models are kept")
    add_switch(group, "--trust_remote_code", help="run Python code that comes with the model")


def load_embedder(arguments: argparse.Namespace) -> Encoder:
    """Load the embedding model that the flags describe."""
    from ultrarag.encoder import Encoder
    from ultrarag.hookspecs import LoadOptions

    options = LoadOptions(
        pooling=arguments.pooling_method,
        normalize=arguments.normalize_embeddings,
        trust_remote_code=arguments.trust_remote_code,
        cache_dir=arguments.cache_dir,
    )
    adapter = arguments.adapter or _adapter(arguments.embedder_model_class, EMBEDDERS, "embedder_model_class")
    encoder = Encoder.load(
        arguments.model_name_or_path,
        adapter,
        device=device(arguments),
        precision=precision(arguments),
        options=options,
        query_instruction=arguments.query_instruction_for_retrieval,
        query_format=arguments.query_instruction_format_for_retrieval,
        query_max_length=arguments.query_max_length,
        passage_max_length=arguments.passage_max_length,
    )
    if encoder.adapter.declared.pair_input:
        raise UsageError(
            f"'{arguments.model_name_or_path}' ({encoder.adapter.name}) is a reranker, which scores pairs and gives no "
            "vectors: name an embedding model"
        )
    return encoder


def load_reranker(arguments: argparse.Namespace, **settings: Any) -> Encoder:
    """Load the reranker that the flags describe."""
    from ultrarag.encoder import Encoder
    from ultrarag.hookspecs import LoadOptions

    named = getattr(arguments, "reranker_model_class", None)
    reranker = Encoder.load(
        arguments.reranker_name_or_path,
        arguments.reranker_adapter or _adapter(named, RERANKERS, "reranker_model_class"),
        device=device(arguments),
        precision=precision(arguments),
        options=LoadOptions(trust_remote_code=arguments.trust_remote_code, cache_dir=arguments.cache_dir),
        **settings,
    )
    if not reranker.adapter.declared.pair_input:
        raise UsageError(
            f"'{arguments.reranker_name_or_path}' ({reranker.adapter.name}) is no reranker: it encodes texts one by one"
        )
    return reranker


def device(arguments: argparse.Namespace) -> str | None:
    """The one device that was named, if one was.

    Raises:
        UsageError: several were.
    """
    if not arguments.device:
        return None
    if len(arguments.device) > 1:
        raise UsageError(
            f"--device names {len(arguments.device)}; one is used: split the input, one process per device"
        )
    return str(arguments.device[0])


def precision(arguments: argparse.Namespace) -> str:
    """The precision of the forward."""
    import torch

    if arguments.precision:
        return str(arguments.precision)
    if arguments.use_bf16:
        return "bf16"
    return "fp16" if arguments.use_fp16 and torch.cuda.is_available() else "fp32"


def say_without_effect(arguments: argparse.Namespace, **reasons: str) -> None:
    """Say of each flag that was given and does nothing here, why."""
    for name, reason in reasons.items():
        if getattr(arguments, name) is not None:
            logger.warning("--%s has no effect: %s", name, reason)


def _adapter(named: str | None, known: dict[str, str], flag: str) -> str | None:
    if named is None:
        return None
    if named not in known:
        raise UsageError(f"--{flag} {named}: say which with --adapter (ultrarag plugins lists them)")
    return known[named]


#: name -> (module, its function (argv) -> exit status, what it does)
COMMANDS = {
    "check": ("ultrarag.data.checking", "main", "find what would spoil a fine-tune, before it"),
    "clean": ("ultrarag.data.cleaning", "main", "leave out rows and negatives by their teacher's scores"),
    "split": (
        "ultrarag.data.splitting",
        "main",
        "split rows by length, or into train and test without shared passages",
    ),
    "convert": (
        "ultrarag.data.converting",
        "main",
        "convert BEIR, CSV, pairs, triplets, RAG-Retrieval rows, both ways",
    ),
    "encode": ("ultrarag.data.commands", "run_encode", "encode a corpus to disk, on several devices"),
    "mine": ("ultrarag.data.commands", "run_mine", "find hard negatives for rows"),
    "score": ("ultrarag.data.scoring", "main", "give rows a teacher's scores"),
    "synthesize": ("ultrarag.data.synthesize_command", "main", "write queries for passages"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 (it failed), 2 (wrong usage), 130 (Ctrl-C)."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    name = words[0]
    if name not in COMMANDS:
        raise UsageError(f"'{name}' is no command{did_you_mean(name, COMMANDS)}; ultrarag data --help lists all")
    module, function, _ = COMMANDS[name]
    return int(getattr(import_module(module), function)(words[1:]))


def _help() -> str:
    lines = [f"  {name:<11} {text}" for name, (_, _, text) in COMMANDS.items()]
    head = "usage: ultrarag data COMMAND ...\n\nMake, check and change training data.\n\ncommands:"
    return "\n".join([head, *lines, "\nultrarag data COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
