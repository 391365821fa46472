"""Flag: one setting as the command line and `finetune()` know it; it reads text or a Python value."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ultrarag.errors import UsageError, did_you_mean

#: what a field's metadata may set besides the above; transformers has entries there that are argparse's
_LOOKS = ("split", "bare", "metavar", "shown_default")

_TRUE, _FALSE = ("true", "1", "yes", "y", "on"), ("false", "0", "no", "n", "off")


@dataclass(frozen=True)
class Flag:
    """One setting: its name, how its value reads, and what `--help` says about it."""

    name: str
    #: a key of _READERS
    kind: str
    default: Any
    help: str
    group: str
    choices: tuple[str, ...] = ()
    #: None is a value
    optional: bool = False
    #: commas separate values
    split: bool = False
    #: more than one value may follow
    many: bool = False
    #: the value of the flag alone
    bare: Any = None
    metavar: str | None = None
    shown_default: str | None = None
    #: files of JSON that come with the package, by the names that stand for them
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def secret(self) -> bool:
        """Whether the value must not be shown."""
        return self.name.endswith("token")

    def read(self, value: Any, spelling: str) -> Any:
        """Return `value`, text from the command line or a Python value, in the setting's type.

        Raises:
            UsageError: when it cannot be read; `spelling` is how the user named the setting.
        """
        if value is None or (self.optional and value == "None"):
            if not self.optional:
                raise UsageError(f"{spelling} needs a value ({self.wanted})")
            return None
        try:
            result = _READERS[self.kind](self, value)
        except (ValueError, TypeError) as error:
            reason = f" ({error})" if self.kind == "json" else ""
            raise UsageError(f"{spelling} is {value!r}; it must be {self.wanted}{reason}") from None
        self._check_choice(result, spelling)
        return result

    @property
    def wanted(self) -> str:
        """What a value looks like, in words."""
        if self.choices:
            return ("some of " if self.many else "one of ") + ", ".join(self.choices)
        return _WANTED[self.kind]

    def _check_choice(self, result: Any, spelling: str) -> None:
        for value in result if isinstance(result, tuple | list) else [result]:
            if self.choices and value not in self.choices:
                raise UsageError(
                    f"{spelling} is '{value}'; it must be {self.wanted}{did_you_mean(value, self.choices)}"
                )


def flags_of(arguments: type, group: str) -> dict[str, Flag]:
    """Return a Flag for every field of a dataclass that has a `help` text."""
    hints = typing.get_type_hints(arguments)
    fields = [item for item in dataclasses.fields(arguments) if item.init and "help" in item.metadata]
    return {item.name: _flag_of(item, hints[item.name], group) for item in fields}


def _flag_of(item: dataclasses.Field[Any], hint: Any, group: str) -> Flag:
    extra = dict(item.metadata)
    parts = _parts(hint)
    kind = extra.pop("kind", None) or _kind(parts)
    return Flag(
        name=item.name,
        kind=kind,
        default=None if item.default is dataclasses.MISSING else item.default,
        help=extra.pop("help"),
        group=group,
        choices=tuple(extra.pop("choices", ())) or _enum_values(parts),
        optional=type(None) in parts or item.default is None,
        many=extra.pop("many", kind in ("strs", "str_or_strs", "ints", "data")),
        **{name: value for name, value in extra.items() if name in _LOOKS},
    )


def _parts(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _kind(parts: tuple[Any, ...]) -> str:
    """Return how a value of a union of `parts` is written on the command line."""
    origins = {typing.get_origin(part) or part for part in parts}
    if dict in origins:
        return "json"
    if tuple in origins or list in origins:
        element = next(part for part in parts if typing.get_origin(part) in (tuple, list))
        first = typing.get_args(element)[0]
        return {int: "ints", str: "str_or_strs" if str in origins else "strs"}.get(first, "str")
    if str in origins:
        return "str_or_bool" if bool in origins or typing.Literal in origins else "str"
    return next((kind.__name__ for kind in (bool, int, float) if kind in origins), "object")


def _enum_values(parts: tuple[Any, ...]) -> tuple[str, ...]:
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
    return tuple(str(member.value) for member in enums[0]) if enums else ()


def _bool(flag: Flag, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise ValueError(text)
    return text in _TRUE


def _int(flag: Flag, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(value)
    number = float(value)
    if not number.is_integer():
        raise ValueError(value)
    return int(number)


def _float(flag: Flag, value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    number = float(value)
    if number != number:
        raise ValueError(value)
    # transformers distinguishes a number of steps from a share of all steps, and shows either as typed
    return int(number) if flag.name.endswith("_steps") and number.is_integer() else number


def _str(flag: Flag, value: Any) -> str:
    if isinstance(value, enum.Enum):
        return str(value.value)
    if not isinstance(value, str | os.PathLike):
        raise TypeError(value)
    return os.fspath(value)


def _str_or_number(flag: Flag, value: Any) -> str:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else _str(flag, value)


def _int_or_auto(flag: Flag, value: Any) -> int | str:
    return value if value == "auto" else _int(flag, value)


def _str_or_bool(flag: Flag, value: Any) -> str | bool:
    if isinstance(value, bool):
        return value
    text = _str(flag, value)
    return {"true": True, "false": False}.get(text.lower(), text)


def _strs(flag: Flag, value: Any) -> Any:
    if flag.bare is not None and isinstance(value, bool):
        return (flag.bare,) if value else ()
    values = [value] if isinstance(value, str | os.PathLike) else list(value)
    texts = [_str(flag, item) for item in values]
    if flag.split:
        texts = [part for text in texts for part in text.replace(",", " ").split()]
    return tuple(texts) if isinstance(flag.default, tuple) or flag.split else texts  # transformers wants lists


def _str_or_strs(flag: Flag, value: Any) -> Any:
    """Return one text as it is (transformers may read it as a pattern), several as a list."""
    texts = list(_strs(flag, value))
    return texts[0] if len(texts) == 1 else texts


def _ints(flag: Flag, value: Any) -> tuple[int, ...]:
    values = [value] if isinstance(value, str | int) else list(value)
    parts = [part for item in values for part in str(item).replace(",", " ").split()]
    return tuple(_int(flag, part) for part in parts)


def _json(flag: Flag, value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    text = _str(flag, value)
    if text.lstrip().startswith("{"):
        return _json_object(text)
    text = flag.files.get(text, text)
    if not os.path.isfile(text):
        ours = f"; ours are called {', '.join(flag.files)}" if flag.files else ""
        raise ValueError(f"there is no such file{ours}")
    with open(text, encoding="utf-8") as file:
        loaded = _json_object(file.read())
    return text if flag.name == "deepspeed" else loaded  # DeepSpeed's plugin wants to read the file itself


def _json_object(text: str) -> dict[str, Any]:
    loaded = json.loads(text)
    if not isinstance(loaded, dict):
        raise ValueError("it holds no JSON object")
    return loaded


def _data(flag: Flag, value: Any) -> Any:
    """Return paths as text, and rows as they are."""
    if isinstance(value, str | os.PathLike):
        return (os.fspath(value),) if flag.many else os.fspath(value)
    if not isinstance(value, Sequence):
        raise TypeError(value)
    items = list(value)
    if any(isinstance(item, os.PathLike) for item in items):
        items = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in items]
    if not flag.many and not all(isinstance(item, Mapping) for item in items):
        raise TypeError(value)
    return items


def _path_or_object(flag: Flag, value: Any) -> Any:
    """Return a path as text, and anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _object(flag: Flag, value: Any) -> Any:
    return value


_READERS: dict[str, Callable[[Flag, Any], Any]] = {
    "bool": _bool,
    "int": _int,
    "float": _float,
    "str": _str,
    "str_or_bool": _str_or_bool,
    "str_or_number": _str_or_number,
    "int_or_auto": _int_or_auto,
    "strs": _strs,
    "str_or_strs": _str_or_strs,
    "ints": _ints,
    "json": _json,
    "data": _data,
    "path_or_object": _path_or_object,
    "object": _object,
}

_WANTED = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "str_or_bool": "text, True or False",
    "str_or_number": "text or a number",
    "int_or_auto": "a whole number, or auto",
    "strs": "one or more texts",
    "str_or_strs": "one or more texts",
    "ints": "whole numbers, such as 64 128 or 64,128",
    "json": "a JSON object, or a file that holds one",
    "data": "a path, or rows",
    "path_or_object": "a path",
    "object": "a Python object",
}
