"""`python` for tests, without the seconds that a new interpreter takes to import torch and transformers.

A server imports them once per test process; each program is a fork of it, with its own words, variables, folder and
output. What a test says about starting, such as what is imported or printed by an import, it says of a real
`sys.executable`.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_server: tuple[subprocess.Popen[bytes], socket.socket] | None = None


class Popen:
    """A program like `python -m module words` or `python -c code words`, as by `subprocess.Popen`."""

    def __init__(
        self, words: Sequence[object], env: Mapping[str, str] | None = None, cwd: str | Path | None = None
    ) -> None:
        reads, writes = zip(*(os.pipe() for _ in range(3)), strict=True)
        request = {"words": list(map(str, words)), "env": dict(os.environ if env is None else env)}
        request["cwd"] = str(cwd or os.getcwd())
        self.args, self.returncode = request["words"], None
        socket.send_fds(_started(), [json.dumps(request).encode() + b"\0"], writes)
        for handle in writes:
            os.close(handle)
        self._status = os.fdopen(reads[0], "r")
        self.stdout, self.stderr = (os.fdopen(handle, "r", encoding="utf-8") for handle in reads[1:])
        self.pid = int(self._status.readline())

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()
        for file in (self.stdout, self.stderr, self._status):
            file.close()

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, when it has ended."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._status.readline())
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """All that it writes, when it has ended."""
        with ThreadPoolExecutor(2) as pool:
            parts = [pool.submit(file.read) for file in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            out, err = (part.result() for part in parts)
        for file in (self.stdout, self.stderr, self._status):
            file.close()
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def run(words: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    program = Popen(words, **options)
    out, err = program.communicate()
    return subprocess.CompletedProcess(program.args, program.wait(), out, err)


def torchrun(
    words: Sequence[object], processes: int = 2, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program as so many ranks, which find each other as under torchrun; output of all, the worst exit status.

    One process is started by itself.
    """
    if processes == 1:
        return run(words, env=env, **options)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common = {**(os.environ if env is None else env), **{name: str(value) for name, value in world.items()}}
    ranks = [
        Popen(words, env={**common, "RANK": str(number), "LOCAL_RANK": str(number)}, **options)
        for number in range(processes)
    ]
    with ThreadPoolExecutor(2 * processes) as pool:  # read while they run: who writes into a full pipe waits for ever
        read = [[pool.submit(file.read) for file in (rank.stdout, rank.stderr)] for rank in ranks]
        while any(rank.poll() is None for rank in ranks):
            time.sleep(0.02)
            if any(rank.poll() for rank in ranks):
                for rank in ranks:
                    rank.kill()
        out, err = ("".join(part.result() for part in parts) for parts in zip(*read, strict=True))
    status = 0
    for rank in ranks:
        with rank:
            status = max(status, rank.wait(), key=abs)
    return subprocess.CompletedProcess(ranks[0].args, status, out, err)


# ---- the server


def _started() -> socket.socket:
    global _server
    if _server is None or _server[0].poll() is not None:
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": paths},
                cwd=ROOT,
            )
        _server = process, ours
        atexit.register(_stop, process, ours)
    return _server[1]


def _stop(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.wait()


def _serve(connection: socket.socket) -> None:
    """Fork for each request; tell who asked the number of the process, and its exit status when it has ended."""
    _import_all()
    running: dict[int, int] = {}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the tests end us
    while True:
        if select.select([connection], [], [], 0.005 if running else None)[0]:
            content, handles, _, _ = socket.recv_fds(connection, 1 << 20, 3)
            if not content:
                return
            while not content.endswith(b"\0"):
                content += connection.recv(1 << 20)
            status, *outputs = handles
            if (child := os.fork()) == 0:
                connection.close()
                _become(json.loads(content[:-1]), outputs)
            for handle in outputs:
                os.close(handle)
            os.write(status, f"{child}\n".encode())
            running[child] = status
        while running:
            ended, code = os.waitpid(-1, os.WNOHANG)
            if not ended:
                break
            handle = running.pop(ended)
            os.write(handle, f"{os.waitstatus_to_exitcode(code)}\n".encode())
            os.close(handle)


def _import_all() -> None:
    import ultrarag.finetune.run
    import ultrarag.finetune.step.trainer
    import ultrarag.retrieve.build.child
    import ultrarag.retrieve.command.commands
    import ultrarag.retrieve.live  # noqa: F401
    from ultrarag.packages import quiet_deepspeed

    quiet_deepspeed()
    from deepspeed import DeepSpeedEngine  # noqa: F401


def _become(request: dict[str, Any], outputs: list[int]) -> None:
    """Be the program, to its end; never returns."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, handle in zip((1, 2), outputs, strict=True):
            os.dup2(handle, number)
            os.close(handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.path[:1] = [request["cwd"], *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))]
        option, what, *words = request["words"]
        sys.argv = [what if option == "-m" else "-c", *words]
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
