"""Children: an end of the parent is an end of the child, from its first moments on and while it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ultrarag.io import start_child

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems send no signal when a parent ends")
@pytest.mark.parametrize(
    ("parent", "printed"),
    [
        ("os.kill(os.getpid(), 9)", ""),
        ("print(child.stdout.readline(), end='', flush=True); os.kill(os.getpid(), 9)", "importing\n"),
    ],
    ids=["at once", "importing"],
)
def test_a_child_ends_with_its_parent(parent: str, printed: str) -> None:
    pipe = "subprocess.PIPE" if printed else "None"
    code = (
        "import os, subprocess; from ultrarag.io import start_child; "
        f"child = start_child('tests.io.orphan', stdout={pipe}, text=True); {parent}"
    )
    # stderr is a pipe that the child holds as well: it is read until both have ended
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (-9, printed)
    assert ("which started this one, has ended" in done.stderr) == (not printed)


def test_a_child_that_is_interrupted_while_it_imports_says_nothing() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = start_child("tests.io.orphan", cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, text=True, **pipes)
    assert child.stdout.readline() == "importing\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30) == ("", "")
    assert child.returncode == 130


@pytest.mark.skipif(sys.platform != "linux", reason="sched(7) is Linux's")
def test_a_child_gives_way_while_it_imports_also_where_sessions_are_scheduled() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with start_child(
        "tests.io.orphan", cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, niceness=3, text=True, **pipes
    ) as child:
        assert child.stdout.readline() == "importing\n"
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == min(19, os.nice(0) + 3)
        session = Path(f"/proc/{child.pid}/autogroup")
        if session.exists():
            assert session.read_text().split()[-2:] in (["nice", "3"], [])  # nothing where the kernel has it disabled
        child.kill()
