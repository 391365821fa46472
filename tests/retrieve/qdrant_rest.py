"""Qdrant's REST interface over qdrant-client's local mode: what a request looks like on the wire is tested with it.

It checks each body against the client's own models, and can be busy, broken, or ask for a key.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import TypeAdapter
from qdrant_client import QdrantClient, models


class Taken(Exception):
    """A collection of that name exists."""


class Rest:
    """A server on loopback with everything in memory."""

    def __init__(self) -> None:
        self.local, self.lock = QdrantClient(":memory:"), threading.RLock()
        #: (method, path) of every request, and the answers to give before the real ones: (status, headers)
        self.seen: list[tuple[str, str]] = []
        self.failures: list[tuple[int, dict[str, str]]] = []
        self.key: str | None = None
        self.indexes: dict[str, dict[str, Any]] = {}
        #: the bodies with which collections were made, by name, and of all searches
        self.made: dict[str, models.CreateCollection] = {}
        self.asked: list[models.QueryRequest] = []
        rest = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, headers, result = rest.handle(self.command, self.path, body, self.headers.get("api-key"))
                content = json.dumps(result).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = answer

            def log_message(self, *values: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"qdrant://127.0.0.1:{self.server.server_port}/ultraragtest"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.local.close()

    def handle(self, method: str, path: str, body: bytes, key: str | None) -> tuple[int, dict[str, str], Any]:
        self.seen.append((method, path))
        if self.key is not None and key != self.key:
            return 403, {}, {"status": {"error": "forbidden"}}
        if self.failures:
            status, headers = self.failures.pop(0)
            return status, headers, {"status": {"error": "not now"}}
        try:
            with self.lock:
                result = self.route(method, path.split("?")[0], json.loads(body or "{}"))
        except Taken as error:
            return 409, {}, {"status": {"error": str(error)}}
        except ValueError as error:
            return 404, {}, {"status": {"error": str(error)}}
        return 200, {}, {"result": _plain(result), "status": "ok", "time": 0.0}

    def route(self, method: str, path: str, body: Any) -> Any:
        if path == "/collections":
            return _plain(self.local.get_collections())
        name, rest = re.fullmatch(r"/collections/([^/]+)(.*)", path).groups()  # type: ignore[union-attr]
        handlers = {
            ("PUT", ""): self.create,
            ("GET", ""): self.info,
            ("DELETE", ""): lambda name, body: self.local.delete_collection(name),
            ("PATCH", ""): lambda name, body: True,
            ("GET", "/exists"): lambda name, body: {"exists": self.local.collection_exists(name)},
            ("PUT", "/index"): self.index,
            ("PUT", "/points"): self.upsert,
            ("POST", "/points"): self.retrieve,
            ("POST", "/points/delete"): self.delete,
            ("POST", "/points/query"): self.query,
            ("POST", "/points/scroll"): self.scroll,
            ("POST", "/points/count"): lambda name, body: self.local.count(name, exact=True),
        }
        return handlers[method, rest](name, body)

    def create(self, name: str, body: Any) -> bool:
        wanted = models.CreateCollection.model_validate(body)
        if self.local.collection_exists(name):
            raise Taken(f"Wrong input: Collection `{name}` already exists!")
        self.indexes[name], self.made[name] = {}, wanted
        return self.local.create_collection(
            name, vectors_config=wanted.vectors or {}, sparse_vectors_config=wanted.sparse_vectors
        )

    def info(self, name: str, body: Any) -> Any:
        return {**_plain(self.local.get_collection(name)), "payload_schema": self.indexes[name]}

    def index(self, name: str, body: Any) -> Any:
        wanted = models.CreateFieldIndex.model_validate(body)
        self.indexes[name][wanted.field_name] = {"data_type": wanted.field_schema, "points": 0}
        return {"operation_id": 0, "status": "completed"}

    def upsert(self, name: str, body: Any) -> Any:
        return self.local.upsert(name, models.PointsList.model_validate(body).points)

    def delete(self, name: str, body: Any) -> Any:
        return self.local.delete(name, models.PointIdsList.model_validate(body))

    def retrieve(self, name: str, body: Any) -> Any:
        wanted = models.PointRequest.model_validate(body)
        return self.local.retrieve(name, wanted.ids, wanted.with_payload, wanted.with_vector or False)

    def query(self, name: str, body: Any) -> Any:
        wanted = models.QueryRequest.model_validate(body)
        self.asked.append(wanted)
        query = wanted.query.nearest if isinstance(wanted.query, models.NearestQuery) else wanted.query
        return self.local.query_points(
            name,
            query,
            using=wanted.using,
            limit=wanted.limit,
            query_filter=wanted.filter,
            with_payload=wanted.with_payload,
        )

    def scroll(self, name: str, body: Any) -> Any:
        wanted = models.ScrollRequest.model_validate(body)
        points, offset = self.local.scroll(
            name,
            wanted.filter,
            limit=wanted.limit,
            offset=wanted.offset,
            with_payload=wanted.with_payload,
            with_vectors=False,
        )
        return {"points": _plain(points), "next_page_offset": offset}


def _plain(value: Any) -> Any:
    return TypeAdapter(Any).dump_python(value, mode="json")
