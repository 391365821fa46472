"""The C allocator's memory: bounded for a process whose threads come and go, and given back after a refresh.

glibc gives each thread an arena of its own, up to eight times the cores, and an arena keeps what was freed in it: with
every swap of a model other threads did the work, and the service's memory grew by 80 to 100 MB (benchmarks/service.py).
"""

from __future__ import annotations

import ctypes
import os
import platform

#: Of glibc's mallopt (malloc.h).
_M_ARENA_MAX = -8
#: One thread encodes, and the others allocate little.
ARENAS = 2
#: Variables by which whoever starts the process has decided otherwise.
DECIDED = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD")


def bound_arenas() -> bool:
    """Let all threads of this process share two arenas; call it before they start. Whether it was done."""
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in DECIDED):
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, ARENAS))


def give_back() -> bool:
    """Return freed memory to the system, whether there was some; takes milliseconds, and no lock of Python's."""
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).malloc_trim(0))
