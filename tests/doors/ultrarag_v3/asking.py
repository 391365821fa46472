"""Run by the peer's Python: asks MCP servers by the client that UltraRAG has, and prints their answers as JSON.

Standard input: {"servers": {name: [command, ...]}, "calls": [[tool, arguments], ...]}.
"""

import asyncio
import json
import os
import sys

from fastmcp import Client


async def asked(servers, calls):
    environment = os.environ.copy()
    config = {name: {"command": words[0], "args": words[1:], "env": environment} for name, words in servers.items()}
    async with Client({"mcpServers": config}) as client:
        tools = {tool.name: tool.inputSchema for tool in await client.list_tools()}
        return {"tools": tools, "answers": [await answer(client, *call) for call in calls]}


async def answer(client, tool, arguments):
    try:
        found = await client.call_tool(tool, arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return json.loads(found.content[0].text) if found.content else None


print(json.dumps(asyncio.run(asked(**json.load(sys.stdin)))))
