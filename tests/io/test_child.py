"""Children: an end of the parent is an end of the child, also before the child has asked for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems send no signal when a parent ends")
@pytest.mark.parametrize(
    ("when", "parent", "said"),
    [
        ("late", "os.kill(os.getpid(), 9)", ""),
        ("early", "print(child.stdout.readline(), end='', flush=True); os.kill(os.getpid(), 9)", "ready\n"),
    ],
)
def test_a_child_ends_with_its_parent(when: str, parent: str, said: str) -> None:
    pipe = "None" if when == "late" else "subprocess.PIPE"
    code = (
        "import os, subprocess; from ultrarag.io import start_child; "
        f"child = start_child('tests.io.orphan', '{when}', stdout={pipe}, text=True); {parent}"
    )
    # stderr is a pipe that the child holds as well: it is read until both have ended
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (-9, said)
    assert ("which started this one, has ended" in done.stderr) == (when == "late")
