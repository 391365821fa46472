"""The OpenAPI document is true: it has the routes that there are, and real answers are what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from starlette.routing import Route

from tests.service.running import Running
from ultrarag.service import document
from ultrarag.service.table import ENDPOINTS


@pytest.fixture(scope="module")
def described(common: Running) -> dict[str, Any]:
    return common.get("/openapi.json").json()


def test_the_document_has_the_routes_that_there_are(common: Running, described) -> None:
    routed = {
        (method, route.path.replace(":path}", "}"))
        for route in common.app.routes
        if isinstance(route, Route) and route.path != "/mcp"
        for method in route.methods - {"HEAD"}
    }
    assert routed == {(m.upper(), path) for path, item in described["paths"].items() for m in item}
    assert described == json.loads(json.dumps(document(ENDPOINTS)))
    names = [operation["operationId"] for item in described["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)


def test_every_reference_leads_somewhere(described) -> None:
    text = json.dumps(described)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in described["components"]["schemas"]
    for schema in described["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def _true_for_numbers(schema: Any) -> list[Any]:
    """Values with true in each place of a schema that is a number and may not be a boolean."""
    kinds = [schema, *schema.get("anyOf", ())] if isinstance(schema, dict) else []
    if any(kind.get("type") == "boolean" for kind in kinds):
        return []
    found: list[Any] = []
    for kind in kinds:
        if kind.get("type") in ("integer", "number"):
            found.append(True)
        found += [{"x": value} for value in _true_for_numbers(kind.get("additionalProperties"))]
        found += [[value] for value in _true_for_numbers(kind.get("items"))]
    return found


def test_no_number_of_a_request_may_be_true() -> None:
    tried = []
    for endpoint in ENDPOINTS:
        for model in filter(None, (endpoint.body, endpoint.query)):
            for name, schema in model.model_json_schema(by_alias=True)["properties"].items():
                for value in _true_for_numbers(schema):
                    tried.append((endpoint.path, name))
                    with pytest.raises(ValidationError) as caught:
                        model.model_validate({name: value})
                    assert name in {error["loc"][0] for error in caught.value.errors()}, (endpoint.path, name, value)
    assert {("/v1/search", name) for name in ("k", "candidates", "mmr", "weights", "min_scores")} <= set(tried)
    assert ("/v1/embeddings", "dimensions") in tried


#: method, path, path as described, body or parameters, status
REQUESTS: list[tuple[str, str, str, Any, int]] = [
    ("GET", "/", "/", None, 200),
    ("GET", "/openapi.json", "/openapi.json", None, 200),
    ("GET", "/health", "/health", None, 200),
    ("GET", "/metrics", "/metrics", None, 200),
    ("GET", "/v1/status", "/v1/status", None, 200),
    ("POST", "/v1/search", "/v1/search", {"query": "milvus"}, 200),
    (
        "POST",
        "/v1/search",
        "/v1/search",
        {"query": "milvus", "texts": False, "heads": ["dense", "bm25"], "fusion": "rrf"},
        200,
    ),
    ("POST", "/v1/search", "/v1/search", {"query": 1}, 400),
    ("POST", "/v1/search", "/v1/search", {"query": "x", "k": 5000}, 413),
    ("POST", "/v1/search_many", "/v1/search_many", {"queries": ["milvus", "apfel"]}, 200),
    ("POST", "/v1/search_many", "/v1/search_many", {"queries": []}, 400),
    ("POST", "/v1/search", "/v1/search", {"query": "milvus", "log": True, "client": "ann"}, 200),
    ("GET", "/v1/feedback", "/v1/feedback", None, 200),
    ("POST", "/v1/feedback", "/v1/feedback", {"query_id": "gone", "action": "answer_up"}, 400),
    ("DELETE", "/v1/feedback?client=ann", "/v1/feedback", None, 200),
    ("DELETE", "/v1/feedback", "/v1/feedback", None, 400),
    ("GET", "/v1/passages?limit=2&ids=milvus&ids=apfel&ids=qdrant", "/v1/passages", None, 200),
    ("GET", "/v1/passages?limit=x", "/v1/passages", None, 400),
    ("GET", "/v1/passages?filter=[", "/v1/passages", None, 400),
    ("POST", "/v1/passages", "/v1/passages", {"passages": [{"id": "n", "text": "new"}]}, 200),
    ("POST", "/v1/passages", "/v1/passages", {"passages": [{"id": "n", "text": " "}]}, 400),
    ("PATCH", "/v1/passages", "/v1/passages", {"filter": {}, "metadata": {"a": 1}}, 200),
    ("PATCH", "/v1/passages", "/v1/passages", {"filter": {}}, 400),
    ("DELETE", "/v1/passages", "/v1/passages", {"ids": ["n"]}, 200),
    ("DELETE", "/v1/passages", "/v1/passages", {}, 400),
    ("GET", "/v1/count", "/v1/count", None, 200),
    ("GET", '/v1/count?filter={"a":{"b":1}}', "/v1/count", None, 400),
    ("GET", "/v1/passages/milvus", "/v1/passages/{id}", None, 200),
    ("GET", "/v1/passages/none", "/v1/passages/{id}", None, 404),
    ("DELETE", "/v1/passages/none", "/v1/passages/{id}", None, 200),
    ("POST", "/v1/refresh", "/v1/refresh", {"rows": []}, 400),
    ("GET", "/v1/jobs", "/v1/jobs", None, 200),
    ("GET", "/v1/jobs/none", "/v1/jobs/{id}", None, 404),
    ("DELETE", "/v1/jobs/none", "/v1/jobs/{id}", None, 404),
    ("GET", "/v1/jobs/none/events", "/v1/jobs/{id}/events", None, 404),
    ("POST", "/v1/jobs/none/cancel", "/v1/jobs/{id}/cancel", None, 404),
    ("POST", "/v1/jobs/none/resume", "/v1/jobs/{id}/resume", None, 404),
    ("POST", "/v1/swap", "/v1/swap", {}, 409),
    ("POST", "/v1/swap", "/v1/swap", {"generation": 99}, 404),
    ("POST", "/v1/rollback", "/v1/rollback", None, 409),
    ("POST", "/v1/rollback", "/v1/rollback", {"generation": 1}, 400),
    ("GET", "/v1/status?of=1", "/v1/status", None, 400),
    ("POST", "/v1/embeddings", "/v1/embeddings", {"input": "x", "model": "default"}, 200),
    ("POST", "/v1/embeddings", "/v1/embeddings", {"input": ["x"], "encoding_format": "base64"}, 200),
    ("POST", "/v1/embeddings", "/v1/embeddings", {"input": "x", "model": "0123456789ab"}, 409),
    ("POST", "/v1/embeddings", "/v1/embeddings", {"input": "x", "model": "other"}, 404),
    ("GET", "/v1/models", "/v1/models", None, 200),
    ("GET", "/v1/models/default", "/v1/models/{id}", None, 200),
    ("GET", "/v1/models/none", "/v1/models/{id}", None, 404),
    ("POST", "/v1/rerank", "/v1/rerank", {"query": "x", "documents": ["a"]}, 200),
    ("POST", "/v1/rerank", "/v1/rerank", {"query": " ", "documents": ["a"]}, 400),
    ("POST", "/v2/rerank", "/v2/rerank", {"query": "x", "documents": ["a"]}, 200),
    ("POST", "/rerank", "/rerank", {"query": "x", "documents": ["a"]}, 200),
    ("POST", "/rerank", "/rerank", {"query": "x", "texts": ["a"], "return_text": True}, 200),
    ("POST", "/rerank", "/rerank", {"query": "x"}, 400),
    ("POST", "/embed", "/embed", {"inputs": ["a", "b"]}, 200),
    ("POST", "/embed", "/embed", {"inputs": []}, 400),
    ("POST", "/similarity", "/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}, 200),
    ("GET", "/info", "/info", None, 200),
    ("POST", "/search", "/search", {"query_list": ["milvus"]}, 200),
]


@pytest.mark.parametrize(("method", "path", "described_path", "body", "status"), REQUESTS)
def test_answers_are_what_the_document_says(served: Running, described, method, path, described_path, body, status):
    answered = served.client.request(method, path, **({} if body is None else {"json": body}))
    assert answered.status_code == status, answered.text
    held_to(described, described_path, method, answered)


def held_to(described: dict[str, Any], path: str, method: str, answered: Any) -> None:
    """Compare a response with what the document says of its status."""
    said = described["paths"][path][method.lower()]["responses"][str(answered.status_code)]["content"]
    kind = answered.headers["content-type"].partition(";")[0]
    assert kind in said
    if kind == "application/json":
        schema = {**said[kind]["schema"], "components": described["components"]}
        Draft202012Validator(schema).validate(answered.json())


def test_every_operation_is_tried() -> None:
    tried = {(method, path) for method, _, path, _, _ in REQUESTS}
    assert tried == {(endpoint.method, endpoint.path.replace(":path}", "}")) for endpoint in ENDPOINTS}


def test_a_token_is_asked_for_as_it_says(index, described) -> None:
    running = Running(index, token="a-token-that-is-long")
    try:
        for endpoint in ENDPOINTS:
            path = endpoint.path.replace("{id:path}", "x").replace("{id}", "x")
            answered = running.client.request(endpoint.method, path, headers={"Authorization": "Bearer none"})
            assert (answered.status_code == 401) != endpoint.open
            if not endpoint.open:
                held_to(described, endpoint.path.replace(":path}", "}"), endpoint.method, answered)
    finally:
        running.stop()
