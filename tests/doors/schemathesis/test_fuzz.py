"""Schemathesis over the service's OpenAPI document: no request is answered with 500, or otherwise than it says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import tiny_m3  # noqa: F401
from tests.service.running import Running
from ultrarag.retrieve import LiveIndex

CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


@pytest.fixture(scope="module")
def service(tiny_m3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:  # noqa: F811
    """One over a tiny model, with what its requests may ask for: a passage, a search that is remembered, a job."""
    from ultrarag import Encoder

    live = LiveIndex.create(tmp_path_factory.mktemp("fuzz") / "kb", Encoder.load(tiny_m3, "bge", device="cpu"))
    live.add([{"id": str(n), "text": f"passage number {n}", "metadata": {"n": n}} for n in range(20)])
    running = Running(live, weights={"dense": 1.0})
    running.post("/v1/search", {"query": "passage", "log": True})
    yield running
    running.stop()


@pytest.mark.parametrize("phase", ["coverage", "fuzzing", "stateful"])
def test_every_operation_answers_as_the_document_says(service: Running, phase: str, tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("st"))
    words = [program, "run", f"{service.url}/openapi.json", "--checks", ",".join(CHECKS), "--phases", phase]
    words += ["--max-examples", "10", "--generation-deterministic", "--request-timeout", "60", "--continue-on-failure"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert service.get("/health").json() == {"status": "ok"}
