"""A service in this process, on a port of its own: for clients that speak HTTP."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

import httpx2
import uvicorn

from ultrarag.retrieve import LiveIndex
from ultrarag.service import Limits, Settings, create_app


class Running:
    """A service that runs until `stop`; its index is closed then."""

    def __init__(self, live: LiveIndex, reranker: Any = None, limits: Limits | None = None, **settings: Any) -> None:
        self.live = live
        chosen = Settings(str(live.path), limits=limits or Limits(), **settings)
        self.app = create_app(live, chosen, reranker)
        self.service = self.app.state.service
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, lifespan="on", ws="none"))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started:
            assert time.monotonic() < deadline
            assert self._thread.is_alive()
            time.sleep(0.01)
        headers = {"Authorization": f"Bearer {chosen.token}"} if chosen.token else {}
        self.client = httpx2.Client(base_url=self.url, headers=headers, timeout=60)

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            runner.run(self.server.serve(sockets=[self.socket]))

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.client.get(path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        return self.client.post(path, json=body, **options)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(60)
        self.client.close()
        assert not self._thread.is_alive()
        self.socket.close()
