"""The allocator's arenas, counted by glibc itself in a process of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ultrarag.service.allocator import ARENAS, DECIDED, give_back

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

PROGRAM = """
import ctypes, sys, threading
from ultrarag.service.allocator import bound_arenas

done = bound_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
ready = threading.Barrier(8)

def allocate():
    ready.wait()  # so that all are there at once
    for _ in range(100):
        assert libc.malloc(5000)

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(done, flush=True)
libc.fdopen.restype = ctypes.c_void_p
out = libc.fdopen(1, b"w")
libc.malloc_info(0, ctypes.c_void_p(out))
libc.fflush(ctypes.c_void_p(out))
"""


def run(**variables: str) -> tuple[str, int]:
    """What `bound_arenas` said, and how many arenas eight threads have then."""
    environment = {name: value for name, value in os.environ.items() if name not in DECIDED}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    said, _, told = done.stdout.partition("\n")
    return said, told.count("<heap nr=")


def test_threads_share_two_arenas():
    assert run() == ("True", ARENAS)


def test_who_starts_the_process_decides():
    said, arenas = run(MALLOC_ARENA_MAX="5")
    assert said == "False"
    assert arenas > ARENAS


def test_what_was_freed_goes_back():
    held = [bytes(100_000) for _ in range(1000)]
    del held
    assert give_back() in (True, False)
