"""Child processes: started with this process's import path, and ended when it ends, however it ends."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ultrarag.io.command import leave

#: Environment variable with the process number of whoever started a child.
PARENT = "ULTRARAG_PARENT"
#: Of work beside searches, for which somebody waits: a third of the time of each of their threads. Beside 16 clients
#: that never paused a fine-tune got 19 % of the processor time that both had; at 10 it was 10 %, and no refresh ended.
NICENESS = 5
_NICENESS = "ULTRARAG_NICENESS"
_PR_SET_PDEATHSIG = 1


def start_child(
    module: str, *words: str, env: Mapping[str, str] | None = None, niceness: int = 0, **options: Any
) -> subprocess.Popen[Any]:
    """Start `python -m module words` with this process's import path.

    It gets a session of its own: Ctrl-C reaches this process only, which then ends the child in good order. It ends
    with this process, from its first moments on: before the module and all that it imports.

    Args:
        env: variables beside those of this process.
        niceness: how much lower its priority is, also while it imports, which takes longer than many a fine-tune.
        options: of `subprocess.Popen`, such as stdout and pass_fds.
    """
    paths = os.pathsep.join(path for path in sys.path if path)  # a program run from its source folder
    variables = {**os.environ, "PYTHONPATH": paths, **(env or {}), PARENT: str(os.getpid())}
    variables[_NICENESS] = str(niceness)
    command = [sys.executable, "-m", __name__, module, *words]
    return subprocess.Popen(command, env=variables, start_new_session=True, **options)


def end_with_parent() -> None:
    """Be killed with the process that started this one, or end now if that is gone already.

    Linux sends the signal. It comes only for a death after this call, so that the parent is looked for as well:
    it may have ended while this process imported its modules.
    """
    parent = os.environ.pop(PARENT, None)  # a child of this process has another parent
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != int(parent):
        raise SystemExit(f"process {parent}, which started this one, has ended")


def give_way(niceness: int) -> None:
    """Lower the priority of this process, which leads a session of its own.

    Linux may schedule sessions, and weigh the processes of one against each other alone (autogroup, sched(7)): then the
    session is what gives way.
    """
    if niceness and hasattr(os, "nice"):
        os.nice(niceness)
        with suppress(OSError):  # a kernel without
            Path("/proc/self/autogroup").write_text(str(niceness), encoding="ascii")


def _main() -> None:
    """Be the module that the first word names."""
    end_with_parent()
    give_way(int(os.environ.pop(_NICENESS, "0")))  # popped: a child of this process has another one
    del sys.argv[0]
    status: Any = 0
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:  # its parent asked for the end, here before the module could see to it
        status = 130
    if not isinstance(status, int):  # a message
        sys.exit(status)
    leave(status)


def stop_child(child: subprocess.Popen[Any], patience: float) -> None:
    """End a child: with SIGTERM, and by force after `patience` seconds."""
    child.terminate()
    try:
        child.wait(patience)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def process_exists(process: int) -> bool:
    """Whether a process of this machine has not ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return process > 0


if __name__ == "__main__":
    _main()
