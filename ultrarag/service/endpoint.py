"""Endpoint: one way to ask the service; the table of them makes the routes and the OpenAPI document alike."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import PydanticKnownError
from pydantic_core.core_schema import no_info_before_validator_function
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ultrarag.service.faults import Fault, Shape

if TYPE_CHECKING:
    from ultrarag.service.state import Service

_EMPTY: Mapping[str, str] = {}


def _without_booleans(schema: Any, inside: bool = False) -> Any:
    """A schema whose numbers refuse booleans; `inside`: within a model, and a model there has seen to its own."""
    if isinstance(schema, list | tuple):
        return type(schema)(_without_booleans(part, inside) for part in schema)
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind in ("int", "float"):
        return no_info_before_validator_function(partial(_number, kind), schema)
    if kind == "model" and inside:
        return schema
    return {name: _without_booleans(part, inside or kind == "model") for name, part in schema.items()}


def _number(kind: Literal["int", "float"], value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type" if kind == "int" else "float_type")
    return value


class _Brought(BaseModel):
    """What a request brings; true and false are no numbers, which pydantic takes for 1 and 0."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return _without_booleans(handler(source))


class Body(_Brought):
    """What a request brings: unknown names are refused, as unknown flags are."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Nothing(Body):
    """What a request brings where there is nothing to say."""


class Lenient(_Brought):
    """What the client of another product brings: names that mean nothing here are passed over."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Answer(BaseModel):
    """What is answered; held to by the tests, not at each request."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class Call:
    """One request, read and checked."""

    service: Service
    request: Request
    #: the endpoint's `body`, `query` and parts of the path
    body: Any
    query: Any
    path: Mapping[str, str]


@dataclass(frozen=True)
class Endpoint:
    """One method of one path."""

    method: str
    path: str
    run: Callable[[Call], Awaitable[Any]]
    #: a sentence for the document
    summary: str
    #: whose shape it has
    tag: str = "ultrarag"
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    #: what is answered: a model, or any type that pydantic describes
    answer: Any = None
    #: of the answer that is no JSON
    media: str = "application/json"
    status: int = 200
    #: statuses of errors beside those that every endpoint has
    errors: tuple[int, ...] = (400,)
    shape: Shape = "own"
    #: whether it may be asked without a token
    open: bool = False

    @property
    def reads(self) -> bool:
        """Whether the body is read: also where none is wanted, so that nothing that was asked for is passed over."""
        return self.body is not None or (self._nothing is not None and self.method != "GET")

    @property
    def refuses(self) -> bool:
        """Whether a request may be answered with 400."""
        return 400 in self.errors or self.query is not None or self.body is not None or self._nothing is not None

    @property
    def _nothing(self) -> type[Body] | None:
        """What the body and the query are where none is wanted; other products' clients may say more than is used."""
        return Nothing if self.tag == "ultrarag" else None

    def route(self) -> Route:
        """What Starlette calls."""
        return Route(self.path, self.answered, methods=[self.method], name=f"{self.method} {self.path}")

    async def answered(self, request: Request) -> Response:
        """Read a request, do what it asks, and answer."""
        service: Service = request.app.state.service
        request.scope["ultrarag.shape"], request.scope["ultrarag.route"] = self.shape, self.path  # for the guard
        wanted, brought = self.query or self._nothing, self.body or (self._nothing if self.reads else None)
        query = None if wanted is None else wanted.model_validate(_query(request, wanted))
        body = None if brought is None else brought.model_validate_json(await _read(request, service) or b"{}")
        found = await self.run(Call(service, request, body, query, request.path_params or _EMPTY))
        return found if isinstance(found, Response) else answer(found, self.status)


def answer(found: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response; ASCII, for a passage may hold any character."""
    text = json.dumps(found, allow_nan=False, separators=(",", ":"), default=_plain)
    return Response(text, status, headers, "application/json")


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} is not JSON")


async def _read(request: Request, service: Service) -> bytes:
    """The body, as JSON that is asked for as such: what a page of a stranger can send unasked is not."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(service.settings.limits.body_seconds):
            found = await request.body()
    except TimeoutError:
        raise Fault(408, "the request's body did not arrive in time") from None
    except ClientDisconnect:
        raise Fault(400, "the client went away before its request was read") from None
    if found and kind != "application/json" and not kind.endswith("+json"):
        raise Fault(415, f"the body's Content-Type is '{kind[:100]}'; it must be application/json")
    return found


def _query(request: Request, model: type[BaseModel]) -> dict[str, Any]:
    """Query parameters; those that may be given several times are lists."""
    found: dict[str, Any] = {}
    for name in request.query_params:
        values = request.query_params.getlist(name)
        field = model.model_fields.get(name)
        several = field is not None and "list" in str(field.annotation)
        if not several and len(values) > 1:
            raise Fault(400, f"'{name}' is given {len(values)} times")
        found[name] = values if several else values[0]
    return found
