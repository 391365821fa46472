"""The `ultrarag` command: a table of subcommands, each imported only when it is run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ultrarag import __version__
from ultrarag.errors import UsageError
from ultrarag.io import leave, print_result, run_action, run_command, table


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
    if words[:1] == ["evaluate"]:
        from ultrarag.doors.mteb import main as evaluate

        return evaluate(words[1:])
    if words[:1] in (["serve"], ["mcp"]):
        from ultrarag.service import main as service

        status = service(words)
        if argv is None:  # the program, not one that calls it
            leave(status)
        return status
    return run_command(lambda: run_action(_parser(), words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ultrarag", description="Fine-tune embedding models and serve them live.")
    parser.add_argument("--version", action="version", version=f"ultrarag {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser("finetune", help="fine-tune a model (ultrarag finetune --help)", add_help=False)
    commands.add_parser("index", help="make, search and renew a live index (ultrarag index --help)", add_help=False)
    commands.add_parser("data", help="make, check and change training data (ultrarag data --help)", add_help=False)
    commands.add_parser("evaluate", help="evaluate a model with MTEB (ultrarag evaluate --help)", add_help=False)
    commands.add_parser("feedback", help="what people did with the hits (ultrarag feedback --help)", add_help=False)
    commands.add_parser("serve", help="serve a live index over HTTP and MCP (ultrarag serve --help)", add_help=False)
    commands.add_parser("mcp", help="offer a live index to a language model, over stdio", add_help=False)
    doors = commands.add_parser("doors", help="what a framework needs on its own side (docs/doors.md)")
    _doors(doors.add_subparsers(title="frameworks", required=True, metavar="FRAMEWORK"))
    checkpoint = commands.add_parser("checkpoint", help="a checkpoint: where it comes from, in int8, to the hub")
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


def _doors(frameworks: Any) -> None:
    from ultrarag.doors.ultrarag_v3 import add_arguments, run

    v3 = frameworks.add_parser("ultrarag_v3", help="server folders for the pipelines of OpenBMB's UltraRAG v3")
    add_arguments(v3)
    v3.set_defaults(run=run)


def _checkpoint_actions(actions: Any) -> None:
    log = actions.add_parser("log", help="the models that led to it, each with its data, arguments and metrics")
    log.add_argument("path", metavar="PATH", help="the checkpoint's folder")
    log.add_argument("--json", action="store_true", help="print JSON: a list, the newest model first")
    log.set_defaults(run=_checkpoint_log)
    from ultrarag.quantise import add_arguments

    quantise = actions.add_parser("quantise", help="int8 for a CPU, published if it loses little beside float32")
    add_arguments(quantise)
    quantise.set_defaults(run=_quantise)

    push = actions.add_parser("push", help="push it to the model hub, after it was loaded again and compared")
    push.add_argument("path", metavar="PATH", help="the checkpoint's folder")
    push.add_argument("repo", metavar="REPO", help="such as me/model; made where it does not exist")
    push.add_argument("--private", action="store_true", help="refuse a repository that others may read")
    push.add_argument("--revision", metavar="BRANCH", help="a branch, made for this push; default: main")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
    push.add_argument("--token_file", "--token-file", metavar="FILE", help="file with the token; default: HF_TOKEN")
    push.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    push.add_argument("--json", action="store_true", help="print JSON")
    push.set_defaults(run=_checkpoint_push)


def _quantise(arguments: argparse.Namespace) -> int:
    """Put int8 beside a checkpoint."""
    from ultrarag.quantise import run

    return run(arguments)


def _checkpoint_push(arguments: argparse.Namespace) -> int:
    """Push a checkpoint to the model hub."""
    from ultrarag.encoder import push_to_hub

    names = ("private", "revision", "message", "trust_remote_code")
    token = _read_token(arguments.token_file) if arguments.token_file else None
    given = {name: getattr(arguments, name) for name in names}
    print_result(push_to_hub(arguments.path, arguments.repo, token=token, **given), arguments.json)
    return 0


def _read_token(file: str) -> str:
    try:
        with open(file, encoding="utf-8") as lines:
            token = lines.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--token_file '{file}' cannot be read: {error}") from error
    if not token:
        raise UsageError(f"--token_file '{file}' is empty")
    return token


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
