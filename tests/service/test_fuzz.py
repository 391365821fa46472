"""Whatever is sent, no request is answered with 500: bodies that are nearly right, and such as are nothing at all."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.running import Running
from tests.service.test_openapi import REQUESTS, held_to
from ultrarag.service import document
from ultrarag.service.table import ENDPOINTS

DOCUMENT = json.loads(json.dumps(document(ENDPOINTS)))
#: Requests with a body that are answered; a refresh would run for minutes.
BODIES = [(m, path, described, body) for m, path, described, body, status in REQUESTS if body and status == 200]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
FILTERS = st.dictionaries(
    st.sampled_from(["lang", "year", "and", "or", "not", "a.b", ""]),
    VALUES | st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte", "x"]), VALUES, max_size=2),
    max_size=3,
)
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def nearly(draw: st.DrawFn) -> tuple[str, str, str, Any]:
    """A request with one value, or one name, that is not as it should be."""
    method, path, described, body = draw(st.sampled_from(BODIES))
    changed = dict(body)
    names = [*changed, "filter", "k", "weights", "heads", "ids", "metadata", "top_n", "model"]
    name = draw(st.sampled_from(names) | TEXTS)
    changed[name] = draw(FILTERS if name == "filter" else VALUES)
    return method, path, described, changed


@given(nearly())
@QUIET
def test_a_body_that_is_nearly_right(common: Running, sent: tuple[str, str, str, Any]) -> None:
    method, path, described, body = sent
    answered = common.client.request(method, path, json=body)
    assert answered.status_code < 500, answered.text
    held_to(DOCUMENT, described, method, answered)


@given(st.sampled_from(ENDPOINTS), st.binary(max_size=20), TEXTS, TEXTS)
@QUIET
def test_what_is_no_request(common: Running, endpoint, content: bytes, part: str, value: str) -> None:
    path = endpoint.path.replace("{id:path}", quote(part, safe="")).replace("{id}", quote(part, safe=""))
    query = f"filter={quote(value)}&limit={quote(part)}&after={quote(value)}"
    typed = {"Content-Type": "application/json"}
    answered = common.client.request(endpoint.method, f"{path}?{query}", content=content, headers=typed)
    assert answered.status_code < 500, answered.text
