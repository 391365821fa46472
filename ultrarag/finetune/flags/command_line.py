"""The command line of fine-tuning, over argparse: reads flags as text, and prints the help."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.finetune.flags.values import Flag
from ultrarag.io import underscored

#: More choices than this are listed in the text and not in the flag's heading.
_MOST_CHOICES = 5


@dataclass(frozen=True)
class Given:
    """A setting as the user gave it: how it was spelled, and its value."""

    spelling: str
    value: Any


def read_command_line(argv: Sequence[str], flags: Mapping[str, Flag], prog: str) -> dict[str, Given]:
    """Return the flags given in `argv` by name, their values as text; `--help` prints and exits.

    Raises:
        UsageError: for a flag that is not known, or given twice, or lacks its value.
    """
    parser = _parser(flags.values(), prog)
    namespace, rest = parser.parse_known_args([underscored(word) for word in argv])
    if rest:
        raise UsageError(_not_understood(rest[0], flags))
    return dict(vars(namespace))


def refuse_unknown(names: Iterable[str], flags: Mapping[str, Flag], what: str) -> None:
    """Raise UsageError for the first name that is no flag, with the nearest one."""
    for name in names:
        if name not in flags:
            raise UsageError(f"{what} '{name}' is not known{did_you_mean(name, flags)}")


def named_adapter(argv: Sequence[str]) -> str | None:
    """Return the adapter that `argv` names, so that its defaults can be had before the rest is read."""
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if word == "--adapter":
            return following
        if word.startswith("--adapter="):
            return word.partition("=")[2]
    return None


def _not_understood(word: str, flags: Mapping[str, Flag]) -> str:
    if not word.startswith("-"):
        return f"'{word}' follows no flag that takes it"
    name = word.lstrip("-").partition("=")[0]
    near = did_you_mean(name, flags).replace("'", "'--", 1)  # compared without dashes, which all flags share
    return f"flag '--{name}' is not known{near}; --help lists all"


class _Parser(argparse.ArgumentParser):
    """argparse that raises UsageError where it would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.replace("argument --", "--"))


class _Once(argparse.Action):
    """Keeps the value as it stands and how the flag was spelled; refuses a second one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest, None)
        if earlier is not None:
            both = f"{earlier.spelling} and {option_string}" if earlier.spelling != option_string else option_string
            raise UsageError(f"{both} given twice" if both == option_string else f"{both} set the same thing: give one")
        setattr(namespace, self.dest, Given(str(option_string), self._value(values, option_string)))

    def _value(self, values: Any, option_string: str | None) -> Any:
        if option_string != self.option_strings[0]:  # --no_flag
            return not _is_true(values, str(option_string))
        return self.const if values is None or values == [] else values


def _is_true(text: str | None, spelling: str) -> bool:
    return text is None or bool(Flag("", "bool", None, "", "").read(text, spelling))


def _parser(flags: Iterable[Flag], prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog}\n       --model_name_or_path MODEL --train_data FILE ... --output_dir DIR [flags]",
        description="Fine-tune a model on your data. Flags may be written with dashes or underscores; one that "
        "takes True or False may stand alone, or be switched off as --no_FLAG.",
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for flag in flags:
        if flag.kind == "object":
            continue  # for Python only
        group = groups.get(flag.group) or groups.setdefault(flag.group, parser.add_argument_group(flag.group))
        _add(group, flag)
    return parser


def _add(group: Any, flag: Flag) -> None:
    complement = [f"--no_{flag.name}"] if flag.kind == "bool" else []
    bare = True if flag.kind == "bool" else flag.bare
    several = "*" if bare is not None else "+"
    one = "?" if bare is not None else None
    group.add_argument(
        f"--{flag.name}",
        *complement,
        dest=flag.name,
        action=_Once,
        nargs=several if flag.many else one,
        const=bare,
        metavar=_metavar(flag),
        help=_help_text(flag),
    )


def _metavar(flag: Flag) -> str:
    if flag.metavar:
        return flag.metavar
    if flag.choices and len(flag.choices) <= _MOST_CHOICES:
        return "{" + ",".join(flag.choices) + "}"
    names = {"bool": "BOOL", "int": "N", "ints": "N", "float": "X", "json": "JSON", "data": "PATH"}
    return names.get(flag.kind, "TEXT")


def _help_text(flag: Flag) -> str:
    text = " ".join(flag.help.replace("%%", "%").split())
    if len(flag.choices) > _MOST_CHOICES:
        text += f" One of: {', '.join(flag.choices)}."
    default = _shown(flag.default) if flag.shown_default is None else flag.shown_default
    return (f"{text} (default: {default})" if default else text).replace("%", "%%")


def _shown(value: Any) -> str:
    if value is None or value in ((), []):
        return "not set"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(getattr(value, "value", value)) or "empty"


class _Help(argparse.HelpFormatter):
    """Help at the terminal's width, at most 100 columns; `--no_FLAG` is described once, and not at every flag."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((90, 24)).columns, 100)
        super().__init__(prog, max_help_position=30, width=max(width - 2, 40))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not isinstance(action, _Once):
            return super()._format_action_invocation(action)
        values = self._format_args(action, str(action.metavar))
        return f"{action.option_strings[0]} {values}".rstrip()


def with_defaults(flags: Mapping[str, Flag], defaults: Mapping[str, Any]) -> dict[str, Flag]:
    """Return the flags with an adapter's defaults in the place of ours."""
    return {
        name: replace(flag, default=defaults[name], shown_default=None) if name in defaults else flag
        for name, flag in flags.items()
    }


def program_name() -> str:
    """Return how the running command was called, for its help."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is not None and module.name.startswith("ultrarag.finetune"):
        return f"python -m {module.name.removesuffix('.__main__')}"
    return os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "ultrarag"
