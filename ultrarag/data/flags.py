"""Flags of the data commands: argparse that raises UsageError, with the nearest flag for an unknown one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ultrarag.errors import UsageError, did_you_mean


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
        found, rest = self.parse_known_args([_underscored(word) for word in argv])
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


def _underscored(word: str) -> str:
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word[2:].partition("=")
    return word if " " in name else f"--{name.replace('-', '_')}{equals}{value}"
