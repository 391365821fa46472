"""Endpoint: a chat model behind OpenAI's API, asked by many tasks at once, patiently and without telling its key."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from ultrarag.errors import UltraragError, UsageError
from ultrarag.optional import install

logger = logging.getLogger("ultrarag")

#: Answers that say "not now": timeouts, conflicts, too many requests, and all of 500 and above.
_LATER = (408, 409, 425, 429)
#: Seconds before the second try; they double with each.
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
#: A wait from which the user is told.
_TOLD = 20.0


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
        retries: further tries of a request that the endpoint could not take.
    """

    base_url: str
    model: str
    key: str | None = None
    body: Mapping[str, Any] | None = None
    timeout: float = 120.0
    retries: int = 8
    first_wait: float = _FIRST_WAIT

    def __post_init__(self) -> None:
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
        """Return the answer to a prompt, however often the endpoint has to be asked to take it.

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
        if seconds >= _TOLD:
            logger.warning("%s: %s; waiting for %.0f s", self._url, reason, seconds)
        await asyncio.sleep(seconds)

    def _excerpt(self, response: Any) -> str:
        text = " ".join(response.text.split())
        return self._clean(text if len(text) <= 300 else f"{text[:300]}...") or "an empty answer"

    def _clean(self, text: str) -> str:
        """A text of the endpoint's without the key, which some repeat in their errors."""
        return text.replace(self.key, "***") if self.key else text


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
