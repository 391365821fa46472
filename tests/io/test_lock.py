"""The owner's lock: who holds it, who may ask, and how long it is waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ultrarag.errors import IndexStateError
from ultrarag.io.lock import GRACE, LOCK_FILE, PATIENCE, Owner, OwnerLock, read_owner


def test_a_second_owner_learns_who_the_first_is(tmp_path: Path) -> None:
    lock = OwnerLock(tmp_path)
    with pytest.raises(IndexStateError, match=r"in use by this process on .* since 20"):
        OwnerLock(tmp_path)
    code = "import sys; from pathlib import Path; from ultrarag.io.lock import *; OwnerLock(Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    owner = read_owner(tmp_path)
    assert owner is not None
    assert f"process {owner.pid} on {owner.host}" in other.stderr
    lock.release()
    lock.release()
    assert read_owner(tmp_path) is None
    OwnerLock(tmp_path).release()


def test_the_lock_of_a_killed_owner_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from ultrarag.io.lock import *; "
        "lock = OwnerLock(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert json.loads((tmp_path / "owner.lock").read_text())["pid"]
    assert read_owner(tmp_path) is None
    OwnerLock(tmp_path).release()


def test_a_child_that_inherits_the_lock_is_waited_for_when_its_parent_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys; from pathlib import Path; from ultrarag.io.lock import *; "
        "lock = OwnerLock(Path(sys.argv[1])); "
        "subprocess.Popen(['sleep', str(PATIENCE + 0.3)], pass_fds=lock.descriptors()); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    OwnerLock(tmp_path).release()


def test_how_long_an_owner_is_waited_for() -> None:
    here = os.uname().nodename
    assert Owner(os.getpid(), here, "").patience() == PATIENCE
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert Owner(ended.pid, here, "").patience() == GRACE
    assert Owner(ended.pid, "elsewhere", "").patience() == PATIENCE


def test_somebody_who_asks_is_waited_for(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    OwnerLock(tmp_path).release()
    with open(tmp_path / LOCK_FILE) as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(asking, fcntl.LOCK_UN)).start()
        OwnerLock(tmp_path).release()


def test_the_error_says_what_else_can_be_done(tmp_path: Path) -> None:
    lock = OwnerLock(tmp_path)
    with pytest.raises(IndexStateError, match=r"close it there first \(it can be read meanwhile\)$"):
        OwnerLock(tmp_path, "it can be read meanwhile")
    lock.release()


@pytest.mark.parametrize("content", ["", "123"])
def test_a_lock_file_that_names_nobody(tmp_path: Path, content: str) -> None:
    lock = OwnerLock(tmp_path)
    (tmp_path / LOCK_FILE).write_text(content)
    assert read_owner(tmp_path) is None
    with pytest.raises(IndexStateError, match="in use by another process"):
        OwnerLock(tmp_path)
    lock.release()
