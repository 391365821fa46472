"""The console over the small real model, asked as a browser asks: with cookies and forms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from ultrarag.retrieve import LiveIndex
from ultrarag.service import Settings, create_app

TOKEN = "a-token-of-twenty-four-chars"
HOST = "http://127.0.0.1:8080"


class Browser:
    """What a browser sends: its cookies, Accept, and with a form where it comes from."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.client.headers["Accept"] = "text/html"

    def get(self, path: str, status: int = 200, **options: Any) -> str:
        response = self.client.get(path, **options)
        assert response.status_code == status, response.text
        return response.text

    def send(self, path: str, status: int = 200, origin: str | None = HOST, **fields: Any) -> str:
        """Send a form of the console's, with the token that its pages carry."""
        found = re.search(r'name="form_token" value="(\w+)"', self.client.get("/console/search?q=vector").text)
        if found:
            fields.setdefault("form_token", found.group(1))
        headers = {} if origin is None else {"Origin": origin}
        response = self.client.post(path, data=fields, headers=headers)
        assert response.status_code == status, response.text
        return response.text


def browsers(live: LiveIndex, **settings: Any) -> Iterator[Browser]:
    app = create_app(live, Settings(str(live.path), **settings))
    with TestClient(app, base_url=HOST) as client:
        yield Browser(client)


@pytest.fixture
def browser(index: LiveIndex) -> Iterator[Browser]:
    """One that needs no token."""
    index.add([{"id": "evil", "text": "<script>alert(1)</script> vector & 'quotes'", "title": "<b>bold</b>"}])
    yield from browsers(index)


@pytest.fixture
def guarded(index: LiveIndex) -> Iterator[Browser]:
    """One that has not signed in."""
    yield from browsers(index, token=TOKEN)
