"""Memory of freed layers: a process in which an encoder was loaded does not ask the kernel for it again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ultrarag.testing.tiny import tiny_bert

FAULTS = """
import resource, sys
import torch
from ultrarag import Encoder

Encoder.load(sys.argv[1], "bge", device="cpu")

def layer():
    blocks = [torch.ones(2048, 1536) for _ in range(3)]  # 12 MiB each

layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps freed memory by its own rules")
def test_the_next_layer_finds_the_memory_of_the_last_one(tmp_path: Path):
    tiny_bert(tmp_path)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert int(run.stdout) < 5_000  # of 184,320 pages that are written to
