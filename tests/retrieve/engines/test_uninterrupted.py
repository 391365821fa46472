"""Requests that Ctrl-C does not reach: a KeyboardInterrupt within grpc leaves a lock held, and the process hangs."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from ultrarag.retrieve.engines.server import uninterrupted


def test_ctrl_c_lets_the_request_in_flight_end_and_then_goes_on() -> None:
    done: list[bool] = []

    def request() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        done.append(threading.current_thread() is threading.main_thread())

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(request, 10)
    assert done == [False]


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
