"""What a service is told when it starts: where the index is, who may ask, and how much."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ultrarag.errors import UsageError

#: The variable with the bearer token: a command line can be read by every user of a machine.
TOKEN_VARIABLE = "ULTRARAG_TOKEN"
#: Characters of a token at least: fewer can be guessed.
SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Limits:
    """How much one request, and one client, may ask."""

    #: bytes of a request's body
    body: int = 16 << 20
    #: seconds in which it must have arrived
    body_seconds: float = 30.0
    #: hits of a query
    k: int = 1000
    #: queries of a request
    queries: int = 256
    #: texts of a request that are embedded or reranked
    texts: int = 2048
    #: passages of a request that are written or listed
    passages: int = 10_000
    #: requests that wait for the encoder before others are sent away with 503
    waiting: int = 256
    #: requests a second of one client, as a long-time average; twice as many at once; 0: no limit
    rate: float = 0.0


@dataclass(frozen=True)
class Settings:
    """One service."""

    path: str
    host: str = "127.0.0.1"
    port: int = 8080
    #: what clients send as `Authorization: Bearer TOKEN`; None: anybody who reaches the port may do everything
    token: str | None = field(default=None, repr=False)
    #: where the token was read from, for workers to read it again
    token_file: str | None = None
    limits: Limits = field(default_factory=Limits)
    #: names that a request's Host may have beside those of loopback; empty and not on loopback: any
    allowed_hosts: tuple[str, ...] = ()
    #: of a shared index, of which `path` is this process's mirror
    uri: str | None = None
    checkpoints: str | None = None
    device: str | None = None
    #: a cross-encoder for the rerank endpoints; None: the index's own encoder compares
    reranker: str | None = None
    #: the weights of the heads where a request gives none
    weights: Mapping[str, float] | None = None
    #: other names that requests may call the live model by
    model_names: tuple[str, ...] = ()
    #: the folder that requests may name training data in; None: they bring their rows along
    data_dir: str | None = None
    #: where jobs keep what they make; None: the folder "service" in the index
    work_dir: str | None = None
    #: where the feedback log lies, which several workers share; None: in the index
    feedback_dir: str | None = None
    #: go on at the start with jobs that a crash or a stop has cut off
    resume: bool = False
    #: learn from feedback by itself: hourly, daily or weekly; None: when it is asked to
    learn: str | None = None
    #: where refreshes report their steps and figures, such as wandb and tensorboard
    report_to: tuple[str, ...] = ()
    workers: int = 1
    #: seconds that requests have to end in when the service is stopped
    grace: float = 30.0
    tls_cert: str | None = None
    tls_key: str | None = None

    @property
    def work(self) -> Path:
        """Where jobs keep what they make."""
        return Path(self.work_dir) if self.work_dir else Path(self.path) / "service"

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches the port."""
        return is_loopback(self.host)

    def check(self) -> None:
        """Raise UsageError for settings that would not be safe, or cannot be."""
        if not 0 <= self.port <= 65_535:
            raise UsageError(f"--port is {self.port}; it must lie between 0 and 65535")
        if self.workers < 1:
            raise UsageError(f"--workers is {self.workers}; it must be 1 or more")
        if self.token is None and not self.on_loopback:
            raise UsageError(
                f"--host {self.host} can be reached from other machines, and nobody would need a token: set "
                f"{TOKEN_VARIABLE} or give --token_file FILE, or stay on --host 127.0.0.1"
            )
        if self.report_to:
            from ultrarag.finetune.flags import check_reporters

            check_reporters(self.report_to)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("--tls_cert and --tls_key belong together: give both, or neither")
        for flag, value in (("reranker", self.reranker), ("data_dir", self.data_dir)):
            if value is not None and flag == "data_dir" and not Path(value).is_dir():
                raise UsageError(f"--{flag} '{value}' is no folder")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on, or a name in a request, is this machine's own."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def read_token(file: str | None) -> str | None:
    """The bearer token of a file, else of the environment; None where there is none.

    Raises:
        UsageError: it cannot be read, is too short, or holds what no header can.
    """
    if file is not None:
        try:
            found, source = Path(file).read_text(encoding="utf-8").strip(), f"the file '{file}'"
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--token_file '{file}' cannot be read: {error}") from error
    else:
        found, source = os.environ.get(TOKEN_VARIABLE, "").strip(), f"the variable {TOKEN_VARIABLE}"
        if not found:
            return None
    if len(found) < SHORTEST_TOKEN or not found.isascii() or not found.isprintable() or " " in found:
        raise UsageError(
            f"{source} must hold one token of at least {SHORTEST_TOKEN} letters, digits or signs, such as what "
            "`openssl rand -hex 32` prints"
        )
    return found
