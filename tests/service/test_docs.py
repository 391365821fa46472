"""docs/service.md names every endpoint, flag and metric there is, and none that is not; its requests are routed."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.routing import Match

from tests.service.running import Running
from ultrarag.service import Limits
from ultrarag.service.command import _serve_parser
from ultrarag.service.table import ENDPOINTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
CURLS = [shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith("curl ")]


def asked(words: list[str]) -> tuple[str, str, str | None]:
    """Method, path and body of a curl line."""
    address = next(word for word in words if "localhost:8080" in word)
    body = words[words.index("-d") + 1] if "-d" in words and "-G" not in words else None
    method = words[words.index("-X") + 1] if "-X" in words else "POST" if body else "GET"
    return method, urlsplit(f"//{address}").path, body


@pytest.mark.parametrize("words", CURLS, ids=lambda words: " ".join(asked(words)[:2]))
def test_every_curl_line_is_a_request_that_is_understood(common: Running, words) -> None:
    method, path, body = asked(words)
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
    routes = [route for route in common.app.routes if route.matches(scope)[0] == Match.FULL]
    assert routes, f"{method} {path}"
    endpoint = next(e for e in ENDPOINTS if e.path == routes[0].path and e.method == method)
    if body is not None:
        endpoint.body.model_validate(json.loads(body))


def test_every_endpoint_has_a_curl_line(common: Running) -> None:
    tried = set()
    for words in CURLS:
        method, path, _ = asked(words)
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
        tried |= {(method, r.path) for r in common.app.routes if r.matches(scope)[0] == Match.FULL}
    described = {(e.method, e.path) for e in ENDPOINTS if e.path not in ("/", "/openapi.json")}
    assert described <= tried, described - tried


def test_flags_and_limits_are_those_that_there_are() -> None:
    known = {option for action in _serve_parser()._actions for option in action.option_strings}
    named = set(re.findall(r"(--[a-z_]+)(?![\w-])", PAGE)) - {"--build"}
    assert named <= known, named - known
    for item in fields(Limits):
        found = re.search(rf"\| `--max_{item.name}` \| ([\d]+)", PAGE)
        assert found, item.name
        assert float(found[1]) == item.default


def test_metrics_are_those_that_there_are(common: Running) -> None:
    common.post("/v1/search", {"query": "x"})
    text = common.get("/metrics").text
    there = set(re.findall(r"# TYPE (ultrarag_\w+)", text))
    there = {name for name in there if not name.endswith("_created")}
    named = set(re.findall(r"`(ultrarag_\w+)", PAGE))
    assert named == there


def test_the_compose_file_and_the_image_name_what_is_there() -> None:
    folder = ROOT / "resources" / "service"
    for name in ("Dockerfile", "compose.yaml"):
        text = (folder / name).read_text(encoding="utf-8")
        known = {option for action in _serve_parser()._actions for option in action.option_strings}
        assert set(re.findall(r"(--(?:host|token_file|work_dir|uri|checkpoints))\b", text)) <= known
    assert "resources/service/compose.yaml" in PAGE
