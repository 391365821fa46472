"""A few rounds of benchmarks/campaign.py, and that it counts each thing which it is there to count."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ultrarag.retrieve.live import LiveIndex
from ultrarag.types import Embeddings

HERE = Path(__file__).parents[2] / "benchmarks"
PASSAGES = {"p/1": ("river stone", {"n": 1}), "p/2": ("cloud ember harbor", {"n": 2})}


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch):
    """The campaign's checks, which import one another by name."""
    monkeypatch.syspath_prepend(str(HERE))
    import campaign_checks

    return campaign_checks


@pytest.fixture
def filled(live: LiveIndex) -> LiveIndex:
    live.add({"id": id, "text": text, "metadata": metadata} for id, (text, metadata) in PASSAGES.items())
    return live


def check(checks, live: LiveIndex, passages=PASSAGES, events=()):
    live.close()
    return checks.check_index([live.path], list(events), {"passages": passages, "live": 1})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the campaign takes in what lost its parent")
@pytest.mark.parametrize("rounds", [3, pytest.param(24, marks=pytest.mark.long)])
def test_rounds_count_nothing(rounds: int, tmp_path: Path) -> None:
    seed = str(os.getpid())
    libraries = {"qdrant-edge": "qdrant_edge", "ivf": "faiss"}
    engines = ["numpy", *(name for name, library in libraries.items() if importlib.util.find_spec(library))]
    command = ["--rounds", str(rounds), "--engine", *engines, "--folder", str(tmp_path / "work"), "--seed", seed]
    command += ["--output", str(tmp_path / "result.json")]
    done = subprocess.run([sys.executable, str(HERE / "campaign.py"), *command], capture_output=True, text=True)
    report = json.loads((tmp_path / "result.json").read_text())
    # how a command ends is not asked here: Ctrl-C before its first line, or in a callback of Python, ends it badly
    never = ("acknowledged writes lost", "indexes that do not open", "wrong answers", "orphans", "files left over")
    assert {name: report[name] for name in never} == dict.fromkeys(never, 0), f"seed {seed}: {done.stdout}{done.stderr}"
    assert report["rounds"] == rounds
    assert sum(report["rounds per command"].values()) == rounds


def test_a_sound_index_is_sound(checks, filled: LiveIndex) -> None:
    found = check(checks, filled)
    assert (found["lost"], found["closed"], found["wrong"]) == ([], [], [])


def test_a_lost_write_is_counted(checks, filled: LiveIndex) -> None:
    row = {"id": "p/3", "text": "meadow", "metadata": {}}
    event = {"op": "add", "number": 0, "rows": [row]}
    begun, done = {"what": "begin", **event}, {"what": "done", **event}
    assert "p/3" in check(checks, filled, events=[begun, done])["lost"][0]
    assert check(checks, filled, events=[begun])["lost"] == []


def test_a_deleted_passage_and_another_live_generation_are_counted(checks, filled: LiveIndex) -> None:
    filled.close()
    known = {"passages": {"p/1": PASSAGES["p/1"]}, "live": 7}
    found = checks.check_index([filled.path], [], known)["lost"]
    assert "p/2" in found[0]
    assert "generation 1 is live" in found[1]


def test_the_vector_of_another_text_is_counted(checks, filled: LiveIndex) -> None:
    held: Embeddings = filled.vectors(["p/1"])
    filled._core.live.backend.upsert(["p/2"], held, [{"n": 2}])
    found = check(checks, filled)["wrong"]
    assert "p/2: not its vector" in found


def test_an_index_that_does_not_open_is_counted(checks, filled: LiveIndex) -> None:
    filled.close()
    for path in (filled.path / "generations" / "1" / "checkpoint").glob("*.safetensors"):
        path.write_bytes(b"damage")
    assert "CheckpointError" in checks.check_index([filled.path], [], {"passages": PASSAGES, "live": 1})["closed"][0]


def test_opening_an_index_removes_what_killed_processes_left(checks, filled: LiveIndex) -> None:
    filled.close()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    vectors = filled.path / "generations" / "1" / "vectors"
    (vectors / f".checksums.json.{socket.gethostname()}.{child.pid}.tmp").write_text("half")
    (vectors / ".atomicwriteX1").mkdir()
    assert len(checks.left_over(filled.path)) == 2
    LiveIndex.open(filled.path, device="cpu").close()
    assert checks.left_over(filled.path) == []


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("kb/.progress.json.host.1.tmp", True),
        ("kb/generations/3/vectors/.atomicwrite1", True),
        ("kb/generations/3.tmp/.progress.json.host.1.tmp", True),
        ("tmp/ultrarag-1.jsonl", True),
        (".new.host.1.tmp", True),
        ("kb/generations/3.tmp/progress.json", False),
        ("kb/generations/3.tmp/vectors/shard/.atomicwrite1/tmpfile.tmp", False),
        ("kb/owner.lock", False),
    ],
)
def test_files_left_over_are_counted(checks, tmp_path: Path, name: str, counted: bool) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    assert bool(checks.left_over(tmp_path)) == counted
