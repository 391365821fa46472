"""Commands: each entry point ends alike, whatever happens inside it, and prints its results alike."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from ultrarag.errors import DataError, UsageError
from ultrarag.io import print_result, run_command

#: Module with `main`, the words of a command, and what that command calls.
ENTRIES: dict[str, tuple[str, list[str], str]] = {
    "ultrarag": ("ultrarag.cli", ["plugins"], "ultrarag.plugins.registry"),
    "checkpoint": ("ultrarag.cli", ["checkpoint", "log", "x"], "ultrarag.checkpoint.manifest.checkpoint_log"),
    "plugins check": ("ultrarag.cli", ["plugins", "check", "x"], "ultrarag.testing.check_adapter"),
    "data": ("ultrarag.cli", ["data", "check"], "ultrarag.data.checking.main"),
    "index": ("ultrarag.cli", ["index", "status", "x"], "ultrarag.retrieve.command.commands.status"),
    "finetune": ("ultrarag.finetune.__main__", [], "ultrarag.finetune.__main__._run"),
    "build": ("ultrarag.retrieve.build.__main__", ["x", "y"], "ultrarag.retrieve.build.__main__._run"),
    "demo": ("ultrarag.demo.__main__", ["--output", "x"], "ultrarag.demo.__main__.run_demo"),
}
#: What is raised inside -> exit status and line on stderr.
ERRORS: dict[str, tuple[BaseException, int, str]] = {
    "usage": (UsageError("no such flag"), 2, "error: no such flag"),
    "failed": (DataError("a.jsonl:3: \x1b[2J"), 1, r"error: a.jsonl:3: \x1b[2J"),
    "disk full": (OSError(errno.ENOSPC, "No space left", "/data/x"), 1, "error: '/data/x': No space left"),
    "many files": (OSError(errno.EMFILE, "Too many open files"), 1, "error: Too many open files"),
    "ctrl-c": (KeyboardInterrupt("go on with --resume"), 130, "interrupted: go on with --resume"),
}


@pytest.fixture(params=ENTRIES)
def entry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """Runs an entry point with a body of the test's own."""
    module, words, inner = ENTRIES[request.param]

    def run(body: Callable[[], Any]) -> int:
        monkeypatch.setattr(inner, lambda *given, **named: body())
        return int(importlib.import_module(module).main(words))

    return run


def raising(error: BaseException) -> Callable[[], Any]:
    def body() -> None:
        raise error

    return body


def printing(text: str) -> Callable[[], Any]:
    def body() -> None:
        print(text)
        raise DataError("reached")  # build would print the result of this body

    return body


@pytest.mark.parametrize("case", ERRORS)
def test_errors(entry: Any, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, status, line = ERRORS[case]
    assert entry(raising(error)) == status
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), FileNotFoundError(2, "missing", "x")])
def test_what_nobody_expects_keeps_its_traceback(entry: Any, error: Exception) -> None:
    with pytest.raises(type(error)):
        entry(raising(error))


@pytest.mark.parametrize("text", ["short", "long " * 10_000])
def test_a_reader_that_has_seen_enough(entry: Any, text: str, monkeypatch: Any, capsys: Any) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert entry(printing(text)) == 1
    assert "Broken pipe" not in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("text", ["short", "long " * 10_000])
def test_a_full_disk_behind_stdout(entry: Any, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert entry(printing(text)) == 1
    assert capsys.readouterr().err == "error: cannot write to standard output: No space left on device\n"


def test_a_closed_stdout_stops_a_command_before_it_begins(entry: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert entry(raising(AssertionError("begun"))) == 1
    assert capsys.readouterr().err.startswith("error: standard output is closed: ")


def test_ctrl_c_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(KeyboardInterrupt()), "all is kept", "rank 3") == 130
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted: rank 3: all is kept\ninterrupted\n"


def test_a_closed_stdin_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    from ultrarag.cli import main

    for words in (["add", str(tmp_path), "-"], ["delete", str(tmp_path), "--ids_file", "-"]):
        assert main(["index", *words]) == 1
        assert capsys.readouterr().err.startswith("error: standard input is closed: ")


def test_results_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    class Found:
        def to_dict(self) -> dict[str, str]:
            return {"query": "東京\x9b"}

        def __str__(self) -> str:
            return "text\x9b"

    print_result(Found(), True)
    print_result({"n": 1}, True)
    print_result(Found(), False)
    print_result({"n": 1}, False, lambda found: found["n"])
    first, *others = capsys.readouterr().out.splitlines()
    assert json.loads(first) == {"query": "東京\x9b"}
    assert "\x9b" not in first
    assert others == ['{"n": 1}', r"text\x9b", "1"]


def test_a_warning_that_quotes_a_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.lastResort, "formatter", None)
    run_command(lambda: 0)
    assert logging.lastResort is not None
    record = logging.makeLogRecord({"msg": "the server says %s", "args": ("\x1b[2J",)})
    assert logging.lastResort.format(record) == r"the server says \x1b[2J"


def _python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], stderr=subprocess.PIPE, text=True, check=False, **options)


def test_the_module_is_the_command() -> None:
    bare = _python("-m", "ultrarag", stdout=subprocess.PIPE)
    assert (bare.returncode, bare.stdout) == (2, "")
    assert "usage: ultrarag " in bare.stderr
    assert "finetune" in bare.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_python_adds_nothing_at_its_end() -> None:
    with open("/dev/full", "w") as full:
        done = _python("-m", "ultrarag", "--help", stdout=full)
    assert (done.returncode, done.stderr) == (
        1,
        "error: cannot write to standard output: No space left on device\n",
    )


def test_closed_descriptors_are_not_given_to_files() -> None:
    code = (
        "import os; from ultrarag.io import run_command\n"
        "run_command(lambda: 0); os.write(1, b'x')\n"
        "print(os.readlink('/proc/self/fd/0'), open('/dev/zero').fileno() > 2)"
    )
    shell = f'exec "{sys.executable}" -c "{code}" <&- 2>&-'
    done = subprocess.run(["sh", "-c", shell], stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout == "x/dev/null True\n"


def test_who_leaves_calls_what_is_registered_and_tears_nothing_down() -> None:
    code = (
        "import atexit, threading; from ultrarag.io import leave\n"
        "class Module:\n"
        "    def __del__(self): print('torn down')\n"
        "module = Module(); atexit.register(print, 'registered')\n"
        "threading.Timer(0.2, print, ['waited for']).start()\n"
        "print('done'); leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "done\nwaited for\nregistered\n", "")


@pytest.mark.parametrize("dropped", ["__del__", "weakref"])
def test_ctrl_c_within_a_destructor_still_stops_the_command(dropped: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Python drops it there; a campaign of kills met it in the destructors of two libraries."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    class Item:
        pass

    def work() -> int:
        item = Item()
        if dropped == "__del__":
            Item.__del__ = interrupt  # type: ignore[attr-defined]
        else:
            reference = weakref.ref(item, interrupt)
        del item
        time.sleep(20)
        return 0 if dropped == "__del__" else id(reference)

    begun = time.monotonic()
    assert run_command(work, "nothing is lost") == 130
    assert time.monotonic() - begun < 10
    assert capsys.readouterr().err == "interrupted: nothing is lost\n"
