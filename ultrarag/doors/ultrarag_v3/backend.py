"""The service behind the tools: `backend_configs` with the key ultrarag, checked, and requests to it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ultrarag.errors import IndexStateError, UsageError

#: What `backend` and the key of `backend_configs` are called.
NAME = "ultrarag"


class Backend(BaseModel):
    """`backend_configs: {ultrarag: ...}` of a parameter.yaml."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(pattern=r"^https?://", description="where `ultrarag serve` listens")
    token_variable: str = Field("ULTRARAG_TOKEN", description="the environment variable that holds its token")
    timeout: float = Field(60.0, gt=0, description="seconds for a request")
    weights: dict[str, float] | None = Field(None, description="of the heads; default: the service's")
    filter: dict[str, Any] | None = Field(None, description="only passages whose metadata pass it are searched")
    collection_field: str = Field("collection", description="the metadata field of a passage's collection_name")

    @classmethod
    def of(cls, backend: str, configs: Mapping[str, Any]) -> Backend:
        """Check what an init tool was given.

        Raises:
            UsageError: it names another backend, or has fields that cannot be used.
        """
        example = f"backend_configs: {{{NAME}: {{url: http://127.0.0.1:8080}}}}"
        if backend.lower() != NAME:
            raise UsageError(
                f"backend is '{backend}', and this server has '{NAME}' alone: write backend: {NAME} and {example}, or "
                f"name UltraRAG's own server"
            )
        if NAME not in configs:
            found = f"has {', '.join(map(str, configs))}" if configs else "is empty"
            raise UsageError(f"backend_configs {found}, and says nothing of '{NAME}': write {example}")
        try:
            return cls.model_validate(configs[NAME])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in ("backend_configs", NAME, *first["loc"]))
            raise UsageError(f"{place}: {first['msg']}") from error

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request; return the answer's JSON.

        Raises:
            UsageError: the service refuses it; the message is the service's.
            IndexStateError: nobody answers.
        """
        token = os.environ.get(self.token_variable, "").strip()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        data = None if body is None else json.dumps(body).encode()
        return answered(
            Request(f"{self.url.rstrip('/')}{path}", data, headers, method=method), self.timeout, self.token_variable
        )


def answered(request: Request, timeout: float, token_variable: str = "") -> Any:
    """The JSON that a request is answered with; its errors in words."""
    try:
        with urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except HTTPError as error:
        with error:
            said = _said(error.read())
        hint = (
            f" (the token is read from the variable {token_variable})" if error.code == 401 and token_variable else ""
        )
        raise UsageError(f"{request.full_url} answered {error.code}: {said}{hint}") from error
    except (URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        raise IndexStateError(
            f"{request.full_url} cannot be reached ({reason}): start the service with `ultrarag serve PATH`, or give "
            "its address as url"
        ) from error
    except ValueError as error:
        raise UsageError(f"{request.full_url} answered with what is no JSON: is it `ultrarag serve`?") from error


def _said(body: bytes) -> str:
    """The message of an error, in whichever of its shapes the service answered."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
        inner = found.get("error", found)
        return str(inner["message"] if isinstance(inner, dict) else inner)
    except (ValueError, KeyError, AttributeError):
        return text[:500]
