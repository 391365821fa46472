"""`ultrarag serve PATH` and `ultrarag mcp PATH`: flags, the open index, and a server that stops in order."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.io import OwnerLock, print_error, run_command, underscored
from ultrarag.packages import install
from ultrarag.retrieve.command import parse_weights
from ultrarag.service.allocator import bound_arenas
from ultrarag.service.settings import Limits, Settings, read_token

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from ultrarag.encoder import Encoder
    from ultrarag.retrieve import LiveIndex

#: The variable in which the settings travel to workers, without the token, which is in its own variable or file.
_SETTINGS = "ULTRARAG_SERVICE_SETTINGS"
#: Seconds in which the first worker must have made its mirror of a shared index.
MIRROR_SECONDS = 120.0


def main(argv: Sequence[str]) -> int:
    """Run `serve` or `mcp`; return the exit status: 0, 1 (it failed), 2 (wrong usage), 130 (Ctrl-C)."""
    name, *words = argv
    words = [underscored(word) for word in words]
    return run_command(lambda: _COMMANDS[name](words), "every write that was answered is kept")


def _parser(name: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"ultrarag {name}", description=text, allow_abbrev=False)
    parser.add_argument("path", metavar="PATH", help="the index directory")
    parser.add_argument("--uri", help="of a shared index, of which PATH is, or becomes, this process's mirror")
    parser.add_argument("--checkpoints", metavar="DIR", help="of a shared index: its folder of checkpoints")
    parser.add_argument("--device", help="where the encoder is loaded, such as cuda")
    parser.add_argument(
        "--weights", type=parse_weights, metavar="A=1,B=0.5", help="weights of the heads, where none are given"
    )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


def _serve_parser() -> argparse.ArgumentParser:
    parser = _parser("serve", "Serve a live index over HTTP and MCP (docs/service.md).")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; elsewhere a token is needed")
    parser.add_argument("--port", type=int, default=8080, help="default: 8080; 0: any that is free")
    parser.add_argument("--token_file", metavar="FILE", help="file with the bearer token; default: ULTRARAG_TOKEN")
    parser.add_argument(
        "--allowed_hosts", type=_names, default=(), metavar="A,B", help="names that clients may call it"
    )
    parser.add_argument("--reranker", metavar="MODEL", help="a cross-encoder for the rerank endpoints")
    parser.add_argument("--model_names", type=_model_names, default=(), metavar="A,B", help="names for the live model")
    parser.add_argument("--data_dir", metavar="DIR", help="folder of training data that refreshes may name")
    parser.add_argument("--work_dir", metavar="DIR", help="where jobs keep what they make; default: PATH/service")
    parser.add_argument("--resume", action="store_true", help="go on with the job that the last stop or crash cut off")
    parser.add_argument(
        "--learn",
        choices=["hourly", "daily", "weekly"],
        help="learn from feedback by itself, so often at most, when there is enough (docs/feedback.md)",
    )
    parser.add_argument(
        "--report_to", type=_names, default=(), metavar="A,B", help="where refreshes report to: wandb, tensorboard"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; more than one for a shared index alone")
    parser.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="for requests to end in at a stop")
    parser.add_argument("--tls_cert", metavar="FILE", help="certificate chain (PEM)")
    parser.add_argument("--tls_key", metavar="FILE", help="its private key (PEM)")
    limits = parser.add_argument_group("limits")
    for item in fields(Limits):
        kind = float if item.type in ("float", float) else int
        limits.add_argument(f"--max_{item.name}", type=kind, default=item.default, metavar="N", help=_LIMITS[item.name])
    return parser


#: What each limit is of.
_LIMITS = {
    "body": "bytes of a request (default: 16 MiB)",
    "body_seconds": "in which a request must have arrived (default: 30)",
    "k": "hits of a query (default: 1000)",
    "queries": "of a request (default: 256)",
    "texts": "embedded or reranked by a request (default: 2048)",
    "passages": "written or listed by a request (default: 10000)",
    "waiting": "requests for the encoder before others get 503 (default: 256)",
    "rate": "requests a second of a client; default: no limit on loopback, 100 elsewhere",
}


def _model_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def read_settings(words: Sequence[str]) -> Settings:
    """The settings that a command line of `serve` asks for.

    Raises:
        UsageError: for settings that would not be safe, or cannot be.
    """
    given = vars(_serve_parser().parse_args(words))
    limits = Limits(**{item.name: given.pop(f"max_{item.name}") for item in fields(Limits)})
    settings = Settings(**given, token=read_token(given["token_file"]), limits=limits)
    if not settings.on_loopback and not limits.rate:
        settings = replace(settings, limits=replace(limits, rate=100.0))
    settings.check()
    return settings


def serve(words: Sequence[str]) -> int:
    """Serve until told to stop."""
    settings = read_settings(words)
    if any(importlib.util.find_spec(name) is None for name in ("uvicorn", "starlette", "prometheus_client")):
        raise UsageError(f"serving needs the extra serve: {install('starlette', 'uvicorn', 'prometheus-client')}")
    if settings.workers > 1:
        _check_workers(settings)
    with _logged(), _listening(settings) as listener:
        return _run_workers(settings, listener) if settings.workers > 1 else _run(settings, listener)


def _check_workers(settings: Settings) -> None:
    """Refuse several processes over an index that one process owns."""
    if settings.uri is not None:
        return
    from ultrarag.retrieve import read_status

    found = read_status(settings.path)
    if found["shared"] is None:
        raise UsageError(
            f"--workers {settings.workers}: the index '{settings.path}' is embedded in the one process that owns it, "
            "and a second one cannot open it. One process serves many clients at once (searches are encoded together); "
            "for more, make a shared index in Qdrant or Milvus (docs/shared-index.md), which any number of workers and "
            "machines serve"
        )


def _listening(settings: Settings) -> socket.socket:
    """The port, taken before the index is loaded: who cannot have it learns so at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host.strip("[]"), settings.port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(f"--host {settings.host} --port {settings.port} cannot be served: {error.strerror}") from error
    listener.set_inheritable(True)
    return listener


@contextmanager
def _logged() -> Iterator[None]:
    """Lines of access and of faults on stderr for a block; none of them holds a text of anybody's."""
    root, handler = logging.getLogger("ultrarag"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    before = root.level, root.propagate
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        root.propagate = before[1]


def _config(app: Any, settings: Settings, **more: Any) -> Any:
    import uvicorn

    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=int(settings.grace),
        h11_max_incomplete_event_size=64 << 10,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        **more,
    )


def _run(settings: Settings, listener: socket.socket) -> int:
    import uvicorn

    app = _opened(settings)
    _tell(settings, listener, app)
    server = uvicorn.Server(_config(app, settings))
    for number in (signal.SIGINT, signal.SIGTERM):  # the server raises them again when it has stopped
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    if not server.started:
        raise IndexStateError("the service could not start; the lines above say why")
    print_error("stopped; every write that was answered is kept")
    return 0


def _run_workers(settings: Settings, listener: socket.socket) -> int:
    from uvicorn.supervisors import Multiprocess

    os.environ[_SETTINGS] = json.dumps({**asdict(settings), "token": None})
    more = {"factory": True, "workers": settings.workers, "timeout_worker_healthcheck": 120}
    config = _config("ultrarag.service.command:worker", settings, **more)
    print_error(f"{_address(settings, listener)}: {settings.workers} workers start")
    Multiprocess(config, sockets=[listener]).run()
    print_error("stopped; every write that was answered is kept")
    return 0


def worker() -> Starlette:
    """The application of one of several workers, each with a mirror of its own."""
    given = json.loads(os.environ[_SETTINGS])
    given["limits"] = Limits(**given["limits"])
    for name in ("allowed_hosts", "model_names", "report_to"):
        given[name] = tuple(given[name])
    settings = Settings(**{**given, "token": read_token(given["token_file"])})
    _logging.enter_context(_logged())
    return _opened(_with_mirror(settings))


def _with_mirror(settings: Settings) -> Settings:
    """Settings with a directory that no other worker has: PATH itself, PATH.worker-2, ...; kept until the end."""
    from ultrarag.retrieve import read_status

    uri = settings.uri or read_status(settings.path)["shared"]["uri"]
    work = str(settings.work)  # jobs are the service's, not a worker's
    for number in range(1, settings.workers + 64):
        path = Path(settings.path) if number == 1 else Path(f"{settings.path}.worker-{number}")
        claims = Path(f"{settings.path}.workers") / str(number)  # beside it: an empty PATH becomes a mirror
        claims.mkdir(parents=True, exist_ok=True)
        try:
            _claims.append(OwnerLock(claims, patience=0.0))
        except IndexStateError:
            continue
        if number > 1:
            _wait_for_mirror(Path(settings.path))
        return replace(settings, path=str(path), uri=uri, work_dir=work, feedback_dir=settings.path)
    raise IndexStateError(f"no mirror beside '{settings.path}' is free for another worker")


def _wait_for_mirror(path: Path) -> None:
    """Wait for the first worker to make its mirror, beside whose passages the feedback of all workers lies."""
    from ultrarag.retrieve import read_status

    deadline = time.monotonic() + MIRROR_SECONDS
    while True:
        try:
            read_status(path)
            return
        except IndexStateError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


#: Held until the process ends.
_claims: list[OwnerLock] = []
_logging = ExitStack()


def _opened(settings: Settings) -> Starlette:
    """Open the index, and make the application; the index is closed when it stops."""
    bound_arenas()
    from ultrarag.service.app import create_app

    live = _open(settings)
    try:
        return create_app(live, settings, _reranker(settings))
    except BaseException:
        live.close()
        raise


def _open(settings: Settings) -> LiveIndex:
    from ultrarag.retrieve import LiveIndex

    return LiveIndex.open(settings.path, uri=settings.uri, checkpoints=settings.checkpoints, device=settings.device)


def _reranker(settings: Settings) -> Encoder | None:
    if settings.reranker is None:
        return None
    from ultrarag.encoder import Encoder

    return Encoder.load(settings.reranker, device=settings.device)


def _address(settings: Settings, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{shown}:{port}"


def _tell(settings: Settings, listener: socket.socket, app: Starlette) -> None:
    live = app.state.service.live
    print_error(
        f"serving '{settings.path}' at {_address(settings, listener)}: {len(live)} passages, encoder "
        f"{live.fingerprint[:12]}{'' if settings.token else ', no token'}"
    )


def serve_tools(words: Sequence[str]) -> int:
    """Answer a language model over stdin and stdout until it closes them."""
    arguments = _parser("mcp", "Offer a live index to a language model as MCP tools, over stdio.").parse_args(words)
    if importlib.util.find_spec("mcp") is None:
        raise UsageError(f"MCP needs the extra mcp: {install('mcp')}")
    import anyio

    from ultrarag.service.state import Service
    from ultrarag.service.tools import create_tools

    settings = Settings(**vars(arguments))
    output, sys.stdout = sys.stdout, sys.stderr  # the protocol's alone
    with _open(settings) as live:
        service = Service(live, settings)
        sys.stdout = output
        try:
            anyio.run(create_tools(service).run_stdio_async)
        finally:
            service.close()
    return 0


_COMMANDS = {"serve": serve, "mcp": serve_tools}
