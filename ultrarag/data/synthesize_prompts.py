"""What the language model is asked, and how its answer is read; and queries without a language model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from ultrarag.errors import DataError, UsageError
from ultrarag.types import Passage

LANGUAGES = ("auto", "en", "zh")
#: Where the passage and the number of queries stand in a prompt.
PASSAGE, COUNT = "{passage}", "{count}"

_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_LETTER = re.compile(r"[^\W\d_]")
#: Share of Chinese characters among the letters from which a passage counts as Chinese.
_CHINESE = 0.3
#: A sentence ends at a full stop before a space, or at a Chinese one.
_SENTENCE = re.compile(r".*?(?:[.!?](?=\s)|[。！？])", re.DOTALL)
#: Brackets of an answer from which JSON is tried to be read.
_STARTS = 50
#: Letters of the shortest first sentence: "Dr." is none.
_SHORTEST = 12


class Prompt:
    """A prompt of ours per language, or the user's own file."""

    def __init__(self, language: str = "auto", file: str | Path | None = None) -> None:
        self.language = language
        names = ("en", "zh") if language == "auto" else (language,)
        self.texts = {"": _own(Path(file))} if file else {name: _ours(name) for name in names}

    def render(self, passage: Passage, count: int) -> str:
        """Return what the model is asked about a passage."""
        name = next(iter(self.texts)) if len(self.texts) == 1 else language_of(passage.content)
        # one pass, so that braces inside the passage stay as they are
        values = {PASSAGE: passage.content, COUNT: str(count)}
        return re.sub(r"\{passage\}|\{count\}", lambda found: values[found[0]], self.texts[name])


def _ours(name: str) -> str:
    return (files("ultrarag.data") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


def _own(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the prompt '{file}': {error}") from error
    if PASSAGE not in text:
        raise UsageError(
            f"the prompt '{file}' does not hold {PASSAGE}, where the passage goes ({COUNT}: how many queries)"
        )
    return text


def language_of(text: str) -> str:
    """Return zh for a text in Chinese, else en."""
    letters = len(_LETTER.findall(text))
    return "zh" if letters and len(_HAN.findall(text)) / letters >= _CHINESE else "en"


class BadAnswer(Exception):
    """An answer holds no queries; the message says why."""


def read_queries(answer: str, count: int) -> list[str]:
    """Return the queries of an answer: a JSON object with `queries`, or a list, alone or inside other text.

    Raises:
        BadAnswer: there are none.
    """
    values = list(_json_in(answer))
    for value in values:
        found = value.get("queries") if isinstance(value, dict) else value
        texts = [" ".join(text.split()) for text in found if isinstance(text, str)] if isinstance(found, list) else []
        if queries := list(dict.fromkeys(text for text in texts if text))[:count]:
            return queries
    raise BadAnswer(f"{'no list of queries' if values else 'no JSON'} in {_shown(answer)}")


def _json_in(answer: str) -> Iterator[Any]:
    """The JSON objects and lists in a text: models like to wrap them in words and fences."""
    decoder, end = json.JSONDecoder(), 0
    for start in islice(re.finditer(r"[\[{]", answer), _STARTS):
        if start.start() >= end:
            try:
                value, end = decoder.raw_decode(answer, start.start())
            except (ValueError, RecursionError):
                continue
            yield value


def _shown(answer: str) -> str:
    text = " ".join(answer.split())
    return repr(text if len(text) <= 120 else f"{text[:120]}...")


def by_title(passage: Passage) -> tuple[str, str] | None:
    """The title as the query of the text below it; None where one of them is missing."""
    title, text = " ".join(passage.title.split()), passage.text.strip()
    return (title, text) if title and text else None


def by_first_sentence(passage: Passage) -> tuple[str, str] | None:
    """The first sentence as the query of the rest; None for a text of one sentence."""
    text = passage.text.strip()
    for found in _SENTENCE.finditer(text):
        first, rest = text[: found.end()].strip(), text[found.end() :].strip()
        if rest and len(_LETTER.findall(first)) >= (_SHORTEST if language_of(first) == "en" else _SHORTEST // 2):
            return " ".join(first.split()), Passage("", rest, passage.title).content
    return None


#: name -> (passage -> its query and what is left of it as the positive), without a language model
BASELINES: dict[str, Callable[[Passage], tuple[str, str] | None]] = {
    "title": by_title,
    "first_sentence": by_first_sentence,
}


def baseline(name: str) -> Callable[[Passage], tuple[str, str] | None]:
    """The baseline with this name."""
    if name not in BASELINES:
        raise DataError(f"'{name}' is no baseline; there are {', '.join(BASELINES)}")
    return BASELINES[name]
