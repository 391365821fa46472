"""Row: one row of training data as it stands in a file, checked in its own words; keys that tell texts apart."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ultrarag.errors import did_you_mean
from ultrarag.rows.files import BadJson
from ultrarag.types import is_blank


def normalized(text: str) -> str:
    """Return a text without differences of case, of width (NFKC) and of spaces."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(folded.casefold().split())


def text_key(text: str) -> int:
    """Return a number above 0 that stands for the normalised text; two texts share one by chance once in 2**63."""
    return _number(normalized(text).encode("utf-8", "surrogatepass"))


def row_key(query: str, positives: Iterable[str]) -> int:
    """Return a number for a row: its query and its positives in any order; other negatives make no other row."""
    parts = [normalized(query), *sorted(normalized(text) for text in positives)]
    return _number("\0".join(parts).encode("utf-8", "surrogatepass"))


def _number(content: bytes) -> int:
    return (int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1) or 1


#: What kind of task a dataset is; it decides the group size and how passages are rendered (see `pools`).
RowType = Literal["normal", "only_1neg", "symmetric_sts", "symmetric_class", "symmetric_clustering"]


def _text(value: str) -> str:
    if is_blank(value):
        raise ValueError("is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            "holds half of a character (a lone surrogate, or bytes that are not UTF-8), which no tokenizer can read"
        ) from None
    return value


Text = Annotated[str, AfterValidator(_text)]
Count = Annotated[int, Field(gt=0)]


class Row(BaseModel):
    """One row as it stands in a file; `batch_size`, `train_group_size` and `type` speak for its whole dataset."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    query: Text
    pos: Annotated[list[Text], Field(min_length=1)]
    neg: list[Text] | None = None
    pos_scores: list[float] | None = None
    neg_scores: list[float] | None = None
    prompt: str | None = None
    type: RowType | None = None
    batch_size: Count | None = None
    train_group_size: Count | None = None
    id: Any = None


class BadRow(Exception):
    """A row cannot be used; the message says why."""


def parse_row(raw: Any, teacher: bool = False) -> Row:
    """Check one row: a line's bytes, or what a JSON list or a Python caller holds.

    Raises:
        BadRow: everything that is wrong with it.
    """
    if isinstance(raw, BadJson):
        raise BadRow(str(raw))
    try:
        row = Row.model_validate_json(raw) if isinstance(raw, bytes) else Row.model_validate(_lists(raw))
    except ValidationError as error:
        if error.errors(include_url=False)[0]["type"] == "json_invalid":
            return parse_row(_loads(raw), teacher)  # Python's parser reads on where pydantic's stops: better reasons
        raise BadRow("; ".join(_reason(item) for item in error.errors(include_url=False))) from error
    _check_scores(row, teacher)
    return row


def _lists(raw: Any) -> Any:
    """Python callers may write tuples."""
    if not isinstance(raw, Mapping):
        return raw
    return {key: list(value) if isinstance(value, tuple) else value for key, value in raw.items()}


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8", "surrogateescape").rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not valid JSON: {error}") from error


def _check_scores(row: Row, teacher: bool) -> None:
    problems = []
    for name, texts in (("pos", row.pos), ("neg", row.neg or [])):
        scores = getattr(row, f"{name}_scores") or []
        if scores and len(scores) != len(texts):
            problems.append(f"'{name}_scores' has {len(scores)} numbers for {len(texts)} texts in '{name}'")
        elif teacher and texts and not scores:
            problems.append(f"'{name}_scores' is missing, and knowledge distillation needs it")
    if problems:
        raise BadRow("; ".join(problems))


def _reason(error: Mapping[str, Any]) -> str:
    """Return what pydantic found, in the words of the row: 'neg[2]' must be text, not null."""
    place, kind, value = _where(error["loc"]), error["type"], error["input"]
    wanted = {"string_type": "text", "float_type": "a number", "int_type": "a whole number above 0"}
    if kind == "missing":
        return f"{place} is missing"
    if kind == "model_type":
        return f"not a JSON object, but {_kind(value)}"
    if kind == "value_error":
        return f"{place} {error['ctx']['error']}"
    if kind == "too_short":
        return f"{place} is empty"
    if kind == "list_type":
        hint = "; write it in brackets" if isinstance(value, str) else ""
        return f"{place} must be a list, not {_kind(value)}{hint}"
    if kind in wanted:
        return f"{place} must be {wanted[kind]}, not {_kind(value)}"
    if kind == "finite_number":
        return f"{place} must be a finite number, not {value}"
    if kind == "greater_than":
        return f"{place} is {value}; it must be a whole number above 0"
    if kind == "literal_error":
        known = get_args(RowType)
        return f"{place} is {value!r}; it must be one of {', '.join(known)}{did_you_mean(str(value), known)}"
    return f"{place}: {error['msg']}"


def _where(location: Sequence[str | int]) -> str:
    name, *rest = location or ("row",)
    return f"'{name}{''.join(f'[{part}]' for part in rest)}'"


def _kind(value: Any) -> str:
    """Return what JSON calls a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    names = {str: "text", int: f"the number {value}", float: f"the number {value}", list: "a list", dict: "an object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), f"a {type(value).__name__}")
