"""The OpenAPI 3.1 document, made of the table of endpoints: what is answered and what is described are one thing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter

from ultrarag import __version__
from ultrarag.service.endpoint import Endpoint
from ultrarag.service.faults import Shape

_REF = "#/components/schemas/{model}"
#: Statuses that any endpoint may answer with.
COMMON = {
    401: "the token is missing or wrong",
    403: "a page from elsewhere asked",
    421: "the host is no name of this service",
    429: "too many requests",
    500: "the service failed",
    503: "too much is waiting, the service is stopping, or the machine does not allow it now",
}
REASONS = {
    400: "the request cannot be used; the message says what, and what can",
    404: "there is no such thing",
    408: "the body did not arrive in time",
    409: "the index's state, another fingerprint or the gate is in the way",
    413: "more than the limits allow",
    415: "the body is not declared as application/json",
}
_TEXT = {"type": "string"}
ERRORS: dict[Shape, dict[str, Any]] = {
    "own": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "code"],
                "properties": {
                    "message": _TEXT,
                    "type": _TEXT,
                    "code": {"type": "integer"},
                    "param": {"type": ["string", "null"]},
                },
            }
        },
    },
    "tei": {
        "type": "object",
        "required": ["error", "error_type"],
        "properties": {"error": _TEXT, "error_type": _TEXT},
    },
    "cohere": {"type": "object", "required": ["message"], "properties": {"message": _TEXT}},
}


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Describe endpoints."""
    schemas, definitions = _schemas(endpoints)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = endpoint.path.replace(":path}", "}")
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    errors = {f"Error_{shape}": schema for shape, schema in ERRORS.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ultrarag",
            "version": __version__,
            "description": "A live index whose encoder is exchanged while it answers. /mcp speaks MCP.",
        },
        "paths": paths,
        "components": {
            "schemas": {**definitions, **errors},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


def _schemas(endpoints: Iterable[Endpoint]) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """The schema of every body and answer, and what they refer to."""
    inputs: list[tuple[Any, Any, TypeAdapter[Any]]] = []
    for endpoint in endpoints:
        if endpoint.body is not None:
            inputs.append(((endpoint.method, endpoint.path, "body"), "validation", TypeAdapter(endpoint.body)))
        if endpoint.answer is not None:
            inputs.append(((endpoint.method, endpoint.path, "answer"), "serialization", TypeAdapter(endpoint.answer)))
    found, whole = TypeAdapter.json_schemas(inputs, ref_template=_REF)
    return {key: schema for (key, _), schema in found.items()}, whole.get("$defs", {})


def _operation(endpoint: Endpoint, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    name = endpoint.path.strip("/").replace("/", "_").replace("{", "").replace(":path", "").replace("}", "")
    found: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}_{name.replace('.', '_') or 'index'}",
        "tags": [endpoint.tag],
        "responses": _responses(endpoint, schemas[endpoint.method, endpoint.path, "answer"]),
    }
    if endpoint.open:
        found["security"] = [{}]
    if parameters := [*_path_parameters(endpoint), *_query_parameters(endpoint.query)]:
        found["parameters"] = parameters
    if endpoint.body is not None:
        schema = schemas[endpoint.method, endpoint.path, "body"]
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return found


def _responses(endpoint: Endpoint, schema: dict[str, Any]) -> dict[str, Any]:
    wanted = dict(COMMON) if not endpoint.open else {status: COMMON[status] for status in (403, 421, 500, 503)}
    own = {413, *endpoint.errors, *((408, 415) if endpoint.reads else ())}
    own |= {400} if endpoint.refuses else set()
    wanted |= {status: REASONS[status] for status in own}
    error: dict[str, Any] = {"$ref": f"#/components/schemas/Error_{endpoint.shape}"}
    if endpoint.shape != "own":  # refused before it is known whose client asks
        error = {"anyOf": [error, {"$ref": "#/components/schemas/Error_own"}]}
    content = {endpoint.media: {"schema": schema}}
    found = {str(endpoint.status): {"description": endpoint.summary, "content": content}}
    for status in sorted(wanted):
        found[str(status)] = {
            "description": wanted[status],
            "content": {"application/json": {"schema": error}},
        }
    return found


def _path_parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    names = [part[1:-1].partition(":")[0] for part in endpoint.path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]


def _query_parameters(model: type[BaseModel] | None) -> list[dict[str, Any]]:
    if model is None:
        return []
    schema = model.model_json_schema()
    required = schema.get("required", ())
    return [
        {
            "name": name,
            "in": "query",
            "required": name in required,
            "description": entry.get("description", ""),
            "schema": _without_null(
                {key: value for key, value in entry.items() if key not in ("description", "title")}
            ),
        }
        for name, entry in schema["properties"].items()
    ]


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter that is left out is None; there is no way to write that."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    if len(kinds) == 1:
        return kinds[0]
    return schema
