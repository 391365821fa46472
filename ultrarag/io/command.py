"""What every command does alike: exit status, errors on one line, results as text or as JSON."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, NoReturn, TextIO

from ultrarag.errors import DataError, UltraragError, UsageError
from ultrarag.io.conditions import REMEDIES
from ultrarag.io.terminal import json_line, visible

_CLOSED = "standard output is closed: send it to a file, a pipe or /dev/null"


class OutputError(UltraragError):
    """Standard output cannot be written."""


def run_command(run: Callable[[], int | None], interrupted: str = "", who: str = "") -> int:
    """Run a command and return its exit status: 0, 1 (it failed), 2 (wrong usage), 130 (Ctrl-C).

    Errors that are raised on purpose, and conditions of the machine such as a full disk, become one line on stderr;
    anything else is a fault of ours and keeps its traceback.

    Args:
        run: returns the status, None for 0.
        interrupted: what Ctrl-C leaves, where the exception does not say it.
        who: the process among others that the line on stderr is from.
    """
    try:
        with _guarded_output(), lasting_interrupts():
            return int(run() or 0)
    except UsageError as error:
        return _failed(2, error, who)
    except UltraragError as error:
        return 1 if isinstance(error.__cause__, BrokenPipeError) else _failed(1, error, who)
    except BrokenPipeError:  # the reader of stderr, such as head, has seen enough
        return 1
    except OSError as error:
        if error.errno not in REMEDIES:  # nobody's mistake in a program: one line in place of a traceback
            raise
        return _failed(1, _condition(error), who)
    except KeyboardInterrupt as stop:
        return _failed(130, str(stop) or interrupted, who, "interrupted")


def leave(status: int) -> NoReturn:
    """End this process with a status, and without tearing down what it has imported.

    That takes torch and what it brings 2.3 s of a processor: who stops a service, or waits for a child, waits for it.
    As at any end threads that are no daemons are waited for, what is registered is called (atexit), and the standard
    streams are flushed.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def run_action(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Run the action that a parser has set as `run`; without any word show its help, and return 2."""
    if not words:
        parser.print_help(sys.stderr)
        return 2
    arguments = parser.parse_args(words)
    return int(arguments.run(arguments) or 0)


def underscored(word: str) -> str:
    """A flag with underscores for dashes: both spellings are in use. Other words, and values, stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    if " " in name:
        return word  # a text that begins with dashes
    return f"--{name.replace('-', '_')}{equals}{value}"


@contextmanager
def lasting_interrupts() -> Iterator[None]:
    """Have a Ctrl-C arrive that Python drops because it came while an object was being deleted.

    No exception leaves `__del__` or the callback of a weak reference, KeyboardInterrupt neither: without this the work
    would go on as if nobody had asked it to stop.
    """
    before = sys.unraisablehook

    def again(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        main = threading.main_thread().ident
        later = threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT))  # from here it would be dropped again
        later.daemon = True
        later.start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before


def print_result(found: Any, as_json: bool, text: Callable[[Any], object] = str) -> None:
    """Print a result: as one line of JSON (what its `to_dict` gives, if it has one), or as text."""
    if as_json:
        print(json_line(found.to_dict() if hasattr(found, "to_dict") else found))
    else:
        print(visible(str(text(found))))


def print_error(message: object) -> None:
    """Print a line on stderr; where that cannot be written nobody can be reached."""
    with suppress(OSError):
        print(visible(str(message)), file=sys.stderr, flush=True)


def standard_input() -> TextIO:
    """What is piped into the command; DataError where standard input is closed."""
    if sys.stdin is None:
        raise DataError("standard input is closed: pipe the lines into the command, or name a file in place of -")
    return sys.stdin


class _VisibleFormatter(logging.Formatter):
    """Warnings may quote texts too, such as what a server answered."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _Output:
    """Standard output whose failures are OutputErrors: an OSError would not say what it is about."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _discard(self._stream)
            raise OutputError(f"cannot write to standard output: {error.strerror or error}") from error


@contextmanager
def _guarded_output() -> Iterator[None]:
    """Write what is printed before the command ends, so that a failure shows in its status."""
    closed = sys.stdout is None  # so Python says that descriptor 1 was closed at the start
    _open_closed_descriptors()
    if closed:
        raise OutputError(_CLOSED)
    if logging.lastResort is not None:  # what prints warnings where nobody has set logging up
        logging.lastResort.setFormatter(_VisibleFormatter())
    with redirect_stdout(_Output(sys.stdout)):
        try:
            yield
        finally:
            sys.stdout.flush()


def _open_closed_descriptors() -> None:
    """Give closed standard descriptors to /dev/null, or the next file that is opened would get what is printed."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)  # as standard descriptors are
    os.close(handle)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)


def _discard(stream: TextIO) -> None:
    """Send what is left in a stream's buffer nowhere, or Python complains about it once more at the end."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _failed(status: int, message: object, who: str, kind: str = "error") -> int:
    parts = [kind, who, str(message)]
    print_error(": ".join(part for part in parts if part))
    return status


def _condition(error: OSError) -> str:
    where = f"'{error.filename}': " if error.filename else ""
    return f"{where}{error.strerror or error}"
