"""`ultrarag feedback ACTION PATH`: look at an index's feedback, take it out, bring it in, delete it."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultrarag.errors import DataError, IndexStateError, UsageError
from ultrarag.io import print_result, replacing, run_action, run_command
from ultrarag.retrieve.feedback import (
    FILE,
    FeedbackLog,
    Rules,
    TrainingRows,
    export_ubi,
    import_ubi,
    training_rows,
)
from ultrarag.retrieve.passages import Store


def feedback_main(argv: Sequence[str] | None = None) -> int:
    """Run one action; return the exit status: 0, 1 (it failed), 2 (wrong usage), 130 (Ctrl-C)."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: run_action(_parser(), words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ultrarag feedback", description="What people asked an index, and what they did with the hits."
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")

    def action(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = actions.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}."
        )
        added.add_argument("path", metavar="PATH", help="the index directory")
        added.add_argument("--json", action="store_true", help="print JSON")
        added.set_defaults(run=run)
        return added

    action("stats", _stats, "count searches, events and what the rules make of them")
    rows = action("rows", _rows, "write the training rows, and the held-out queries to judge by")
    rows.add_argument("--out", required=True, metavar="FILE", help="JSONL in the fine-tuning format")
    rows.add_argument("--held_out", metavar="FILE", help="qrels with votes (TREC: query 0 passage relevance)")
    rows.add_argument("--since", metavar="DATE", help="only of searches since then (ISO 8601)")
    export = action("export", _export, "write queries and events in the names of OpenSearch UBI")
    export.add_argument("--out", required=True, metavar="FILE", help="JSONL")
    export.add_argument("--since", metavar="DATE", help="ISO 8601")
    bring = action("import", _import, "read queries and events in the names of OpenSearch UBI")
    bring.add_argument("file", metavar="FILE", help="JSONL")
    forget = action("forget", _forget, "delete what a client did, or what is old, for good")
    either = forget.add_mutually_exclusive_group(required=True)
    either.add_argument("--client", help="as it was given to search")
    either.add_argument("--before", metavar="DATE", help="ISO 8601")
    keep = action("keep", _keep, "set what is kept, and for how long")
    keep.add_argument("--retention_days", type=int, metavar="N", help="0: for ever")
    keep.add_argument("--texts", choices=["kept", "hashed"], help="hashed: count queries, and read none")
    return parser


def _stats(arguments: argparse.Namespace) -> None:
    with _log(arguments) as log:
        found = {**log.counts(), "rules": _made(arguments, log, None).report}
    print_result(found, arguments.json, _lines)


def _rows(arguments: argparse.Namespace) -> None:
    _check_out("out", arguments.out)
    _check_out("held_out", arguments.held_out)
    with _log(arguments) as log:
        made = _made(arguments, log, _date(arguments.since))
    with replacing(Path(arguments.out)) as file:
        for row in made.rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    if arguments.held_out:
        for id in (id for judged in made.qrels.values() for id in judged):
            if id.split() != [id]:
                raise DataError(f"the passage {id!r} has an id with a space, which no TREC qrels can hold")
        with replacing(Path(arguments.held_out)) as file:
            for query, judged in made.qrels.items():
                file.writelines(f"{query} 0 {passage} {relevance}\n".encode() for passage, relevance in judged.items())
    print_result(made, arguments.json, lambda _: _lines(made.report))


def _check_out(flag: str, file: str | None) -> None:
    if file is not None and (not Path(file).absolute().parent.is_dir() or Path(file).is_dir()):
        raise UsageError(f"--{flag} '{file}' cannot be written: give a file in a folder that exists")


def _export(arguments: argparse.Namespace) -> None:
    _check_out("out", arguments.out)
    with _log(arguments) as log:
        print_result(export_ubi(log, arguments.out, _date(arguments.since)), arguments.json, _lines)


def _import(arguments: argparse.Namespace) -> None:
    with _log(arguments, new=True) as log:
        print_result(import_ubi(log, arguments.file), arguments.json, _lines)


def _forget(arguments: argparse.Namespace) -> None:
    with _log(arguments) as log:
        gone = log.forget(client=arguments.client, before=_date(arguments.before))
    print_result({"searches deleted": gone}, arguments.json, _lines)


def _keep(arguments: argparse.Namespace) -> None:
    with _log(arguments, new=True) as log:
        log.set(arguments.retention_days, arguments.texts)
        found = {"retention_days": log.retention_days, "texts": log.texts}
    print_result(found, arguments.json, _lines)


def _log(arguments: argparse.Namespace, new: bool = False) -> FeedbackLog:
    root = Path(arguments.path)
    Store.open(root, read_only=True).close()  # says that there is no index
    if not new and not (root / FILE).is_file():
        raise IndexStateError(f"'{root}' has no feedback yet: search with log=True (docs/feedback.md)")
    return FeedbackLog(root / FILE)


def _made(arguments: argparse.Namespace, log: FeedbackLog, since: float | None) -> TrainingRows:
    store = Store.open(Path(arguments.path), read_only=True)
    try:
        return training_rows(log.queries(since), store.get, Rules())
    finally:
        store.close()


def _date(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"'{text}' is no date; write it as 2026-11-29 or 2026-11-29T12:00:00+00:00") from None
    return moment.timestamp()


def _lines(found: Any, indent: str = "") -> str:
    lines = []
    for name, value in found.items():
        lines.append(f"{indent}{name}:" if isinstance(value, dict) else f"{indent}{name}: {value}")
        if isinstance(value, dict):
            lines.extend(filter(None, [_lines(value, indent + "  ")]))
    return "\n".join(lines)
