"""The console: the service's pages for people, made on the server.

A request of a browser comes in, with its cookie and its form; a page that needs no script to be read goes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.service.console.access import admit, is_page
    from ultrarag.service.console.table import home, routes
else:
    __getattr__, __dir__, __all__ = exports(__name__)
