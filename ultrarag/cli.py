"""The `ultrarag` command: a table of subcommands, each imported only when it is run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ultrarag import __version__
from ultrarag.io import print_result, run_action, run_command, table


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit status: 0, 1 (it failed), 2 (wrong usage), 130 (Ctrl-C)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["finetune"]:  # its flags are read by its own parser
        from ultrarag.finetune import main as finetune

        return finetune(words[1:])
    if words[:1] == ["index"]:
        from ultrarag.retrieve.command import main as index

        return index(words[1:])
    if words[:1] == ["feedback"]:
        from ultrarag.retrieve.command import feedback_main

        return feedback_main(words[1:])
    if words[:1] == ["data"]:
        from ultrarag.data import main as data

        return data(words[1:])
    if words[:1] in (["serve"], ["mcp"]):
        from ultrarag.service import main as service

        return service(words)
    return run_command(lambda: run_action(_parser(), words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ultrarag", description="Fine-tune embedding models and serve them live.")
    parser.add_argument("--version", action="version", version=f"ultrarag {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser("finetune", help="fine-tune a model (ultrarag finetune --help)", add_help=False)
    commands.add_parser("index", help="make, search and renew a live index (ultrarag index --help)", add_help=False)
    commands.add_parser("data", help="make, check and change training data (ultrarag data --help)", add_help=False)
    commands.add_parser("feedback", help="what people did with the hits (ultrarag feedback --help)", add_help=False)
    commands.add_parser("serve", help="serve a live index over HTTP and MCP (ultrarag serve --help)", add_help=False)
    commands.add_parser("mcp", help="offer a live index to a language model, over stdio", add_help=False)
    checkpoint = commands.add_parser("checkpoint", help="show where a checkpoint comes from, quantise it")
    _checkpoint_actions(checkpoint.add_subparsers(title="actions", required=True, metavar="ACTION"))
    plugins = commands.add_parser("plugins", help="list adapters and extensions, the broken ones with their reason")
    plugins.add_argument("--json", action="store_true", help="print JSON")
    plugins.set_defaults(run=_plugins)
    actions = plugins.add_subparsers(title="actions", metavar="ACTION")
    check = actions.add_parser("check", help="check an adapter against everything that ultrarag relies on")
    check.add_argument("name", metavar="NAME", help="the adapter's name")
    check.add_argument("--path", metavar="MODEL", help="a model that it can load; default: its own tiny example")
    # SUPPRESS: without it, this parser's default would undo a --json that stands before the word check
    check.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    check.set_defaults(run=_check_plugin)
    return parser


def _checkpoint_actions(actions: Any) -> None:
    log = actions.add_parser("log", help="the models that led to it, each with its data, arguments and metrics")
    log.add_argument("path", metavar="PATH", help="the checkpoint's folder")
    log.add_argument("--json", action="store_true", help="print JSON: a list, the newest model first")
    log.set_defaults(run=_checkpoint_log)
    from ultrarag.quantise import add_arguments

    quantise = actions.add_parser("quantise", help="int8 for a CPU, published if it loses little beside float32")
    add_arguments(quantise)
    quantise.set_defaults(run=_quantise)


def _quantise(arguments: argparse.Namespace) -> int:
    """Put int8 beside a checkpoint."""
    from ultrarag.quantise import run

    return run(arguments)


def _checkpoint_log(arguments: argparse.Namespace) -> int:
    """Print the chain of models that led to a checkpoint."""
    from ultrarag.checkpoint import checkpoint_log, lineage_text

    print_result(checkpoint_log(arguments.path), arguments.json, lineage_text)
    return 0


def _plugins(arguments: argparse.Namespace) -> int:
    """Print every plugin; exit with 1 when one is broken."""
    from ultrarag.plugins import registry

    rows = registry().plugins()
    lines = [(r.name, r.kind, r.package, r.version, ", ".join(r.hooks), r.problem or "ok") for r in rows]
    header = ("name", "kind", "package", "version", "hooks", "state")
    print_result([row.__dict__ for row in rows], arguments.json, lambda _: table(header, lines))
    return 1 if any(row.problem and "switched off" not in row.problem for row in rows) else 0


def _check_plugin(arguments: argparse.Namespace) -> int:
    """Run the conformance kit on one adapter; exit with 1 when a check fails."""
    from ultrarag.testing import check_adapter

    report = check_adapter(arguments.name, arguments.path)
    print_result(report, arguments.json)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
