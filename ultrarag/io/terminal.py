"""What people see on a terminal: progress bars, aligned tables, texts made harmless, and secrets taken out."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

#: What a terminal would act upon in place of showing it: control characters (C0, DEL, C1), separators of lines, and
#: embeddings, overrides and isolates that reorder what stands beside them; and halves of characters, which no
#: encoding can write.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def progress_bar(total: int | None, label: str, unit: str, wanted: bool | None = None) -> Any:
    """Return a tqdm bar.

    Args:
        wanted: True always, False never, None on a terminal and after two seconds.
    """
    from tqdm import tqdm

    delay = 0 if wanted else 2
    disable = None if wanted is None else not wanted
    return tqdm(total=total, desc=label, unit=unit, delay=delay, leave=False, disable=disable, dynamic_ncols=True)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Keep transformers' own bars off a stderr that is no terminal; the process's setting is restored."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def visible(text: str, keep: str = "\n\t") -> str:
    """Return a text that a terminal only shows: unsafe characters, but those to keep, as escapes such as \\x1b."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(char: str) -> str:
    return repr(char)[1:-1]


def json_line(value: Any) -> str:
    """Return a value as one line of JSON; unsafe characters in its texts are JSON's escapes, such as \\u009b."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return aligned lines: header, rule, rows; no line ends in blanks, and no cell breaks its line."""
    cells = [[visible(str(cell), keep="") for cell in row] for row in [header, *rows]]
    widths = [max(width(row[i]) for row in cells) for i in range(len(header))]
    right = [i for i in range(len(header)) if rows and all(_number(row[i]) for row in rows)]
    lines = ["  ".join(_fit(cell, widths[i], i in right) for i, cell in enumerate(row)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * size for size in widths), *lines[1:]])


def width(text: str) -> int:
    """Columns that `text` takes on a terminal: two for a wide (Chinese, Japanese, Korean) character."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fit(text: str, size: int, right: bool) -> str:
    blanks = " " * (size - width(text))
    return blanks + text if right else text + blanks


#: The last word of the name of a parameter that holds a secret, after any others (X-Amz-Signature), or after those that
#: are written without a dash before it (apikey). `max_tokens` is a number, `code` the key of Azure's functions.
_WORD = r"keys?|token|secrets?|password|passwd|passphrase|pwd|credentials?|signature|sig|auth|authorization|bearer|jwt"
_SECRET = re.compile(
    rf"(.*[-_. ])?(api|access|auth|secret|private|subscription|client|session|security)*({_WORD})|code"
)


def secret_in(url: str) -> str | None:
    """Name the part of a URL that holds a secret ("a password", "the parameter 'api-key'"); None where none does."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        return "a user or password"
    given = [parts.query, parts.fragment, *parts.path.split(";")[1:]]
    for name, _ in chain.from_iterable(parse_qsl(part, keep_blank_values=True) for part in given):
        if _SECRET.fullmatch(re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()):
            return f"the parameter '{name}'"
    return None


def without_secret(text: str, secret: str | None) -> str:
    """A text with `***` where it repeats the secret, also as JSON or in a URL, or broken by white space."""
    if not secret:
        return text
    for form in dict.fromkeys((secret, json.dumps(secret)[1:-1], secret.replace("/", r"\/"), quote(secret, safe=""))):
        text = re.sub(r"\s*".join(re.escape(character) for character in form), "***", text)
    return text
