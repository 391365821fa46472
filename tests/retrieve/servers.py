"""Vector servers for tests: Milvus Lite as a process on loopback TCP, and the clusters that the environment names."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

#: What the collections of tests begin with, so that those left over in a cluster are known.
NAME = "ultraragtest"


class MilvusLite:
    """A Milvus Lite server; it can be killed and started again on the same data."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def uri(self) -> str:
        return f"milvus://127.0.0.1:{self.port}/{NAME}"

    def start(self) -> None:
        """Start, and wait until it listens; on loopback, for it would listen to the whole network."""
        command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(self.folder), "--host", "127.0.0.1"]
        log = open(self.folder.with_suffix(".log"), "ab")  # noqa: SIM115
        with log:
            self.process = subprocess.Popen([*command, "--port", str(self.port)], stdout=log, stderr=log)
        wait_for(lambda: listening(self.port), 120)  # two seconds on a quiet machine

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


def missing(module: str) -> str | None:
    """Why a test must be skipped, or None."""
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def cluster(engine: str) -> str | None:
    """The URI of a real cluster: from ULTRARAG_TEST_QDRANT_URL or ULTRARAG_TEST_MILVUS_URI, ours or http(s)://."""
    found = os.environ.get({"qdrant": "ULTRARAG_TEST_QDRANT_URL", "milvus": "ULTRARAG_TEST_MILVUS_URI"}[engine])
    if not found:
        return None
    scheme, _, rest = found.partition("://")
    host = rest.split("?")[0].split("/")[0]
    tls = "?tls=true" if scheme == "https" or "tls=true" in rest else ""
    return f"{engine}://{host}/{NAME}{tls}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, seconds: float) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
