"""A language model that is asked for queries: the endpoint (OpenAI's API), what it is asked, and how it answers.

Many tasks ask at once; a busy endpoint is asked again later, and its key appears in no message.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from ultrarag.errors import UltraragError, UsageError
from ultrarag.io import secret_in, without_secret
from ultrarag.packages import install
from ultrarag.types import Passage

logger = logging.getLogger("ultrarag")

#: Answers that say "not now": timeouts, conflicts, too many requests, and all of 500 and above.
_LATER = (408, 409, 425, 429)
#: Seconds before the second try; they double with each.
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
#: A wait from which a warning says so.
_LONG_WAIT = 20.0
#: Where the passage and the number of queries stand in a prompt.
PASSAGE, COUNT = "{passage}", "{count}"

LETTER = re.compile(r"[^\W\d_]")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
#: Share of Chinese characters among the letters from which a passage counts as Chinese.
_CHINESE = 0.3
#: Brackets of an answer from which JSON is tried to be read.
_STARTS = 50


class EndpointError(UltraragError):
    """The endpoint does not answer, or refuses; what it answered before is kept."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Reply(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass(frozen=True)
class Answer:
    """One answer of the model, which has been paid."""

    text: str
    #: None where the endpoint does not say
    tokens_in: int | None
    tokens_out: int | None
    #: it was cut at the most tokens that were allowed
    cut: bool = False


@dataclass
class Endpoint:
    """Use it as an async context.

    Args:
        base_url: what stands before /chat/completions, such as https://api.openai.com/v1.
        model: as the endpoint names it.
        key: sent as a bearer token; None: nothing is sent. It is in no message, log or file.
        body: more fields of each request (temperature, seed, ...).
        timeout: seconds for one request.
        retries: further tries of a request that the endpoint could not answer.
    """

    base_url: str
    model: str
    key: str | None = None
    body: Mapping[str, Any] | None = None
    timeout: float = 120.0
    retries: int = 8
    first_wait: float = _FIRST_WAIT

    def __post_init__(self) -> None:
        if secret := secret_in(self.base_url):
            raise UsageError(
                f"--base_url holds {secret}, which would stand in messages and files: put it into an environment "
                f"variable, and name that with --api_key_env"
            )
        if not self.base_url.startswith(("http://", "https://")):
            raise UsageError(f"--base_url is '{self.base_url}'; it begins with http:// or https://")
        self._url = self.base_url.rstrip("/") + "/chat/completions"
        self._not_before = 0.0

    def __repr__(self) -> str:
        return f"Endpoint({self._url!r}, {self.model!r})"

    async def __aenter__(self) -> Endpoint:
        client = _httpx().AsyncClient
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # redirects are not followed: the key is for this host
        limits = _httpx().Limits(max_connections=None)
        self._client = client(headers=headers, timeout=self.timeout, follow_redirects=False, limits=limits)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.aclose()

    async def ask(self, prompt: str) -> Answer:
        """Return the answer to a prompt, however often the endpoint has to be asked.

        Raises:
            EndpointError: it refuses, or could not be reached in all tries.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **(self.body or {})}
        for attempt in range(self.retries + 1):
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            answer, reason, wait = await self._try(body, attempt)
            if answer is not None:
                return answer
            if attempt < self.retries:
                await self._wait(wait, reason)
        raise EndpointError(
            f"{self._url}: {reason}, {self.retries + 1} times; the answers so far are kept: the same command goes on"
        )

    async def _try(self, body: Mapping[str, Any], attempt: int) -> tuple[Answer | None, str, float]:
        """Ask once: the answer, or why there is none and for how long to wait."""
        own = min(_LONGEST_WAIT, self.first_wait * 2**attempt) * random.uniform(0.5, 1.0)
        try:
            response = await self._client.post(self._url, json=body)
        except _httpx().TimeoutException:
            return None, f"no answer within {self.timeout:g} s", own
        except _httpx().TransportError as error:
            return None, f"{type(error).__name__}: {self._clean(str(error)) or 'the connection failed'}", own
        if response.status_code in _LATER or response.status_code >= 500:
            asked = retry_after(response.headers)
            if asked is not None and response.status_code == 429:  # it means all requests, not only this one
                self._not_before = max(self._not_before, time.monotonic() + asked)
            return None, f"status {response.status_code}", own if asked is None else asked
        if response.status_code != 200:
            raise EndpointError(f"{self._url} refuses with status {response.status_code}: {self._excerpt(response)}")
        try:
            return _answer(response.content), "", 0.0
        except ValidationError:
            return None, f"no answer in the form of OpenAI's API, but {self._excerpt(response)}", own

    async def _wait(self, seconds: float, reason: str) -> None:
        if seconds >= _LONG_WAIT:
            logger.warning("%s: %s; waiting for %.0f s", self._url, reason, seconds)
        await asyncio.sleep(seconds)

    def _excerpt(self, response: Any) -> str:
        text = " ".join(self._clean(response.text).split())  # cleaned before it is cut, which would leave half a key
        return (text if len(text) <= 300 else f"{text[:300]}...") or "an empty answer"

    def _clean(self, text: str) -> str:
        """A text of the endpoint's without the key, which some repeat in their errors."""
        return without_secret(text, self.key)


def _answer(content: bytes) -> Answer:
    reply = _Reply.model_validate_json(content)
    choice, usage = reply.choices[0], reply.usage
    tokens_in, tokens_out = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
    return Answer(choice.message.content or "", tokens_in, tokens_out, choice.finish_reason == "length")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or a date; None where there is none to read."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())


def key_from(variable: str | None) -> str | None:
    """The key in an environment variable; that of OpenAI's own tools may be missing, one that is named may not.

    Raises:
        UsageError: the variable is not set.
    """
    key = os.environ.get(variable or "OPENAI_API_KEY", "").strip()
    if variable and not key:
        raise UsageError(f"--api_key_env names {variable}, which is not set: export it before you start")
    return key or None


def _httpx() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise UsageError(f"an endpoint is asked with httpx2: {install('httpx2')}") from error
    return httpx2


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
    letters = len(LETTER.findall(text))
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
