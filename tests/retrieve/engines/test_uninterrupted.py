"""Requests that Ctrl-C does not reach: a KeyboardInterrupt within grpc leaves a lock held, and the process hangs."""

from __future__ import annotations

import threading

import pytest

from tests import forked
from ultrarag.retrieve.engines.server import uninterrupted

INTERRUPTED = """
import os, signal, threading, time
from ultrarag.retrieve.engines.server import uninterrupted

done = []

def request():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    done.append(threading.current_thread() is threading.main_thread())

try:
    uninterrupted(request, 10)
except KeyboardInterrupt:
    print("interrupted", done)
"""


def test_ctrl_c_lets_the_request_in_flight_end_and_then_goes_on() -> None:
    """In a process of its own: whatever the others' tests leave of signals, this one is not to end them."""
    assert forked.run(["-c", INTERRUPTED]).stdout == "interrupted [False]\n"


def test_errors_and_results_pass() -> None:
    def fail() -> None:
        raise ValueError("refused")

    assert uninterrupted(lambda: 7, 1) == 7
    with pytest.raises(ValueError, match="refused"):
        uninterrupted(fail, 1)


def test_another_thread_asks_by_itself() -> None:
    found: list[bool] = []
    asking = threading.Thread(target=lambda: found.append(uninterrupted(threading.current_thread, 1) is asking))
    asking.start()
    asking.join()
    assert found == [True]
