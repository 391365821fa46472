"""The command line of training data, `ultrarag data COMMAND ...`: a table of commands, imported when they are run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.io import run_command

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
