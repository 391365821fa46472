"""The index for language models, over both of MCP's transports."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import anyio

from tests.service.running import Running
from ultrarag.service import create_tools

ROOT = Path(__file__).parents[2]


def called(server, *calls: tuple[str, dict]) -> tuple[list[str], list]:
    """The names of the tools, and what each call gives."""
    from mcp.client import Client

    async def run():
        async with Client(server) as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            return names, [await client.call_tool(name, arguments) for name, arguments in calls]

    return anyio.run(run)


def said(result) -> str:
    return result.content[0].text


def check(names, results, live) -> None:
    found, one, none, wrong, status = results
    assert names == ["search", "feedback", "get", "status"]
    hits = json.loads(said(found))
    assert hits["hits"][0]["id"] == "milvus"
    assert (hits["generation"], hits["fingerprint"]) == (1, live)
    assert json.loads(said(one))["text"] == "Milvus is a vector database."
    assert none.is_error
    assert "there is no passage 'none'; take an id that `search` gave" in said(none)
    assert wrong.is_error
    assert "unknown bound 'over'" in said(wrong)
    assert json.loads(said(status))["passages"] == 4


CALLS = (
    ("search", {"query": "what is milvus?", "k": 2}),
    ("get", {"id": "milvus"}),
    ("get", {"id": "none"}),
    ("search", {"query": "x", "filter": {"year": {"over": 1}}}),
    ("status", {}),
)


def test_in_memory(served: Running) -> None:
    check(*called(create_tools(served.service), *CALLS), served.live.fingerprint)


def test_feedback_reaches_the_log_and_its_errors_the_model(served: Running) -> None:
    from mcp.client import Client

    async def run():
        async with Client(create_tools(served.service)) as client:
            query = json.loads(said(await client.call_tool("search", {"query": "what is milvus?"})))["query_id"]
            calls = (
                {"query_id": query, "action": "cite", "id": "milvus"},
                {"query_id": query, "action": "answer_up"},
                {"query_id": query, "action": "cite", "id": "never-shown"},
                {"query_id": "0" * 5000, "action": "cite", "id": "milvus"},
            )
            return query, [await client.call_tool("feedback", given) for given in calls]

    query, (cited, voted, not_shown, unknown) = anyio.run(run)
    assert [json.loads(said(one)) for one in (cited, voted)] == [{"kept": True}] * 2
    assert not_shown.is_error
    assert "never-shown" in said(not_shown)
    assert unknown.is_error
    assert len(said(unknown)) < 1200
    (kept,) = [one for one in served.live.feedback_log.queries() if one.query_id == query]
    assert kept.text == "what is milvus?"
    assert [event[:2] for event in kept.events] == [("cite", "milvus"), ("answer_up", "")]


def test_logging_stays_as_it_was(served: Running) -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    root.handlers[:] = []
    try:
        create_tools(served.service)
        assert root.handlers == []
    finally:
        root.handlers[:] = before[0]
    assert root.level == before[1]


def test_over_http(served: Running) -> None:
    check(*called(f"{served.url}/mcp", *CALLS), served.live.fingerprint)


def test_over_http_with_a_token(index) -> None:
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    running = Running(index, token="a-token-that-is-long")
    try:
        assert httpx2.post(f"{running.url}/mcp", json={}).status_code == 401
        token = {"Authorization": "Bearer a-token-that-is-long"}

        async def run():
            from mcp.client import Client

            async with (
                httpx2.AsyncClient(headers=token) as http,
                Client(streamable_http_client(f"{running.url}/mcp", http_client=http)) as client,
            ):
                return await client.call_tool("status", {})

        assert json.loads(said(anyio.run(run)))["passages"] == 4
    finally:
        running.stop()


def test_over_stdio(index) -> None:
    from mcp.client.stdio import StdioServerParameters, stdio_client

    path, live = index.path, index.fingerprint
    index.close()
    program = StdioServerParameters(
        command=sys.executable,
        args=["-m", "ultrarag", "mcp", str(path)],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    check(*called(stdio_client(program), *CALLS), live)
