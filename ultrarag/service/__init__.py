"""The service: a live index over HTTP and MCP, for the clients that are there.

A path and settings come in; an ASGI application and the commands `ultrarag serve` and `ultrarag mcp` go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.service.app import create_app
    from ultrarag.service.command import main
    from ultrarag.service.openapi import document
    from ultrarag.service.settings import Limits, Settings
    from ultrarag.service.tools import create_tools
else:
    __getattr__, __dir__, __all__ = exports(__name__)
