"""An open index belongs to the process that opened it: a fork, a pickle or a copy is refused by name."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle

import pytest

from ultrarag.errors import IndexStateError
from ultrarag.retrieve import LiveIndex

USES = {
    "search": lambda live: live.search("river"),
    "add": lambda live: live.add([{"id": "z", "text": "from the fork"}]),
    "delete": lambda live: live.delete(["0"]),
    "vacuum": lambda live: live.vacuum(),
    "len": len,
    "status": lambda live: live.status(),
}


@pytest.fixture(params=["numpy", "qdrant-edge"])
def live(request, tmp_path, m3_encoder):
    with LiveIndex.create(tmp_path / "kb", m3_encoder, backend=request.param) as live:
        live.add([{"id": str(n), "text": f"river {n}"} for n in range(3)])
        yield live


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_fork_is_refused_and_harms_nothing(live, use):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with live:  # its end closes nothing of the parent's
                use(live)
            said = "nothing"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    assert os.waitpid(child, 0)[1] == 0
    said = os.read(reader, 10_000).decode()
    os.close(reader)
    assert said.startswith("IndexStateError")
    assert str(os.getpid()) in said
    assert "shared-index" in said
    live.add([{"id": "y", "text": "from the parent"}])
    assert len(live) == 4
    with pytest.raises(IndexStateError, match="in use by this process"):
        LiveIndex.open(live.path)  # the lock is still held


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_open_index_is_not_copied(live, take):
    with pytest.raises(IndexStateError, match="cannot be pickled"):
        take(live)


def test_a_spawned_process_cannot_be_given_one(live):
    with pytest.raises(IndexStateError, match="cannot be pickled"):
        multiprocessing.get_context("spawn").Process(target=print, args=(live,)).start()
