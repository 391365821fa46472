"""A full disk, a folder that is read-only, too few descriptors, many threads: named, survived, and never damage."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.retrieve.test_live import corpus, text_of
from ultrarag.encode import encode_apart
from ultrarag.errors import IndexStateError, ResourceError, UsageError
from ultrarag.retrieve import read_passages, read_status
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.passages.database import IDLE, TIMEOUT, Database
from ultrarag.retrieve.passages.files import records
from ultrarag.retrieve.passages.store import Store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts, and limits of descriptors, are Linux's")
NOBODY = 65534
ENGINES = ["numpy", "qdrant-edge", "ivf"]
LIBRARIES = {"qdrant-edge": "qdrant_edge", "ivf": "faiss"}


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextlib.contextmanager
def mounted(*words: str, at: Path) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    if os.geteuid() or subprocess.run(["mount", *words, str(at)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield at
    finally:
        gc.collect()  # what an error still holds open
        subprocess.run(["umount", "--lazy", str(at)], check=True)


@contextlib.contextmanager
def read_only(folder: Path, way: str = "mount") -> Iterator[Path]:
    """The folder as somebody sees it who may not write."""
    if way == "mount":
        with mounted("--bind", str(folder), at=folder.with_name("read-only")) as place:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
            yield place
        return
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        shutil.copytree(folder, place := Path(parent) / "kb")
        os.seteuid(NOBODY)
        try:
            yield place
        finally:
            os.seteuid(0)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    with mounted("-t", "tmpfs", "-o", "size=6m", "none", at=folder / "disk") as place:
        yield place


def fill(disk: Path) -> Path:
    """Leave no byte free."""
    with open(disk / "filling", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return disk / "filling"


@pytest.fixture(params=ENGINES)
def closed(request, tmp_path: Path, tiny) -> Path:
    """The folder of an index of twelve passages that nobody has open."""
    if request.param in LIBRARIES:
        pytest.importorskip(LIBRARIES[request.param])
    with LiveIndex.create(tmp_path / "kb", tiny, backend=request.param) as live:
        live.add(corpus(12))
    return tmp_path / "kb"


def assert_reads(live: LiveIndex) -> None:
    """Everything that does not write works, and the rest is refused."""
    assert len(live.search(text_of(3), k=12, heads=["dense"])) == 12
    assert live.search(text_of(3), k=1, heads=["bm25"])[0].id == "p3"
    assert (live.get("p3").text, len(list(live.passages())), live.status()["passages"]) == (text_of(3), 12, 12)
    judged = live.evaluate({"q": text_of(3)}, {"q": {"p3": 1}}, metrics=["recall@12"], heads=["dense"])
    assert judged.metrics["recall@12"] == 1.0
    assert live.status()["read_only"]
    for write in (
        lambda: live.add(corpus(1, start=20)),
        lambda: live.delete(["p3"]),
        lambda: live.build(live.encoder),
        live.vacuum,
        live.retry,
        lambda: live.refresh("train.jsonl", output_dir="out"),
    ):
        with pytest.raises(IndexStateError, match="is open for reading, for nothing could be written"):
            write()


# A folder that cannot be written


@pytest.mark.parametrize("way", ["mount", "another user"])
def test_an_index_that_cannot_be_written_is_read(closed: Path, tiny, way: str, caplog) -> None:
    before = snapshot(closed)
    with read_only(closed, way) as place:
        with LiveIndex.open(place, tiny) as live:
            assert_reads(live)
            with LiveIndex.open(place, tiny) as second:  # several may read
                assert second.search(text_of(3), k=1, heads=["bm25"])[0].id == "p3"
        assert read_status(place)["passages"] == len(list(read_passages(place))) == 12
        with pytest.raises(ResourceError, match=r"Read-only file system|Permission denied"):
            LiveIndex.open(place, tiny, repair=True)
        assert snapshot(place) == before
    assert "is opened for reading" in caplog.text
    with LiveIndex.open(closed, tiny) as live:
        assert live.add(corpus(13)).added == 1


def test_who_reads_keeps_owners_out_and_the_other_way_round(closed: Path, tiny) -> None:
    with read_only(closed) as place:
        with LiveIndex.open(place, tiny), pytest.raises(IndexStateError, match="in use"):
            LiveIndex.open(closed, tiny)
        with LiveIndex.open(closed, tiny), pytest.raises(IndexStateError, match="in use"):
            LiveIndex.open(place, tiny)


def test_what_a_read_only_index_cannot_find_is_said(closed: Path, tiny, caplog) -> None:
    """What a crash between the two commits leaves: the store is ahead."""
    store = Store.open(closed)
    store.write(records(corpus(2, start=12)))
    store.close()
    with read_only(closed) as place, LiveIndex.open(place, tiny) as live:
        assert live.get("p13").text == text_of(13)
        assert live.status()["live"]["behind"] == 2
        assert len(live.search(text_of(3), k=20, heads=["dense"])) == 12
    assert "2 writes are not in the vectors yet" in caplog.text
    assert "2 writes are not in the words yet" in caplog.text


@pytest.mark.parametrize("index", ["kept", "gone"])
def test_what_a_crash_left_in_the_log_of_the_database_is_read(tmp_path: Path, index: str) -> None:
    (tmp_path / "crashed").mkdir()
    store = Store.create(tmp_path)
    store.write(records(corpus(3)))
    for path in tmp_path.glob("passages.sqlite*"):  # as a kill leaves them
        shutil.copy(path, tmp_path / "crashed")
    store.close()
    if index == "gone":
        (tmp_path / "crashed" / "passages.sqlite-shm").unlink()
    with read_only(tmp_path / "crashed") as place:
        found = Store.open(place, read_only=True)
        assert found.count() == 3
        found.close()


# A full disk


def test_an_index_on_a_full_disk_is_read(closed: Path, tiny, tmp_path: Path, caplog) -> None:
    with small_disk(tmp_path) as disk:
        subprocess.run(["cp", "-a", "--sparse=always", str(closed), str(disk / "kb")], check=True)
        filling = fill(disk)
        with LiveIndex.open(disk / "kb", tiny) as live:
            assert_reads(live)
        assert "No space left on device" in caplog.text
        with pytest.raises(ResourceError, match=r"'.*/disk/.*': No space left on device.*make room"):
            LiveIndex.create(disk / "new", tiny, backend="numpy")
        filling.unlink()
        if read_status(closed)["live"]["backend"] == "numpy":  # for qdrant, also below ivf, this disk has no room
            with LiveIndex.open(disk / "kb", tiny) as live:
                assert live.add(corpus(13)).added == 1


def test_a_disk_that_becomes_full_refuses_writes_by_name_and_is_searched_on(tiny, other, tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk, LiveIndex.create(disk / "kb", tiny, backend="numpy") as live:
        live.add(corpus(12))
        live._core.flush()
        filling = fill(disk)
        for write in (lambda: live.add([{"id": "long", "text": "word " * 9999}]), lambda: live.build(other)):
            with pytest.raises(IndexStateError, match=r"'.*kb.*No space left on device"):
                write()
            assert len(live.search(text_of(3), k=20, heads=["dense"])) == 12
        filling.unlink()
        assert live.add(corpus(13)).added == 1


def test_the_vector_engine_is_not_let_onto_a_disk_that_is_nearly_full(tiny, tmp_path: Path, monkeypatch) -> None:
    """It would take the process with it: a file that is mapped into memory cannot grow there (SIGBUS)."""
    pytest.importorskip("qdrant_edge")
    live = LiveIndex.create(tmp_path / "kb", tiny, backend="qdrant-edge")
    live.add(corpus(12))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20))
        with pytest.raises(IndexStateError, match=r"stored and will not be lost.*1 MiB are free, 32 are needed"):
            live.add(corpus(13))
        assert len(live.search(text_of(3), k=20, heads=["dense"])) == 12
    live.add(corpus(14))
    assert len(live.search(text_of(3), k=20, heads=["dense"])) == 14
    live.close()


# Too few file descriptors


@contextlib.contextmanager
def descriptors(more: int) -> Iterator[None]:
    """Let this process open `more` files beside those it has open."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = {int(name) for name in os.listdir("/proc/self/fd")}
    limit = next(n for n in range(soft) if n + 1 - len([fd for fd in held if fd <= n]) > more)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("closed", "repair"), [("numpy", False), ("qdrant-edge", True), ("ivf", False)], indirect=["closed"]
)
def test_too_few_descriptors_are_not_damage(closed: Path, tiny, repair: bool, caplog) -> None:
    with LiveIndex.open(closed, tiny) as live:  # imports what it needs
        live.search(text_of(3), heads=["bm25"])
    words = (closed / "bm25" / "bm25.sqlite").stat().st_ino
    refused = []
    gc.freeze()  # what is imported: half a second of each collection
    for more in range(60):
        gc.collect()
        try:
            with descriptors(more):
                LiveIndex.open(closed, tiny, repair=repair).close()
            break
        except ResourceError as error:
            refused.append(str(error))
    gc.unfreeze()
    assert 5 < len(refused) < 60
    assert all("Too many open files; nothing is damaged: raise the limit" in message for message in refused)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # nothing was made anew
    assert (closed / "bm25" / "bm25.sqlite").stat().st_ino == words
    with LiveIndex.open(closed, tiny) as live:
        assert len(live.search(text_of(3), k=20, heads=["dense"])) == 12


def test_a_condition_of_the_machine_is_not_a_passage_that_cannot_be_encoded() -> None:
    def encode(texts):
        if "north" in texts[0]:
            raise OSError(24, "Too many open files")
        raise AssertionError

    with pytest.raises(OSError, match="Too many open files"):
        encode_apart(corpus(1), encode)


# Vacuum beside a reader


def test_vacuum_does_not_wait_for_who_reads(closed: Path, tiny, caplog) -> None:
    reader = Database.open(closed / "passages.sqlite", read_only=True)
    with LiveIndex.open(closed, tiny) as live:
        live.delete(["p3"])
        with reader.reading() as db:
            db.execute("BEGIN")
            db.execute("SELECT count(*) FROM passages").fetchone()
            started = time.monotonic()
            live.vacuum()
            assert time.monotonic() - started < TIMEOUT / 2
            db.execute("ROLLBACK")
        assert "another process or thread is reading it" in caplog.text
        live.vacuum()
        assert caplog.text.count("is reading it") == 1
    reader.close()


# Many threads


def test_memory_does_not_grow_with_the_threads_that_search(tmp_path: Path, tiny, monkeypatch) -> None:
    """Each connection has a cache, and each thread that ran a model keeps torch's buffers and helpers."""
    with LiveIndex.create(tmp_path / "kb", tiny, backend="numpy") as live:
        live.add(corpus(5))
        forwards: set[int] = set()
        encode, together = live.encoder.encode_tokens, threading.Barrier(IDLE * 2)

        def noting(*args, **options):
            forwards.add(threading.get_ident())
            return encode(*args, **options)

        def search(number: int) -> None:
            with live._core.store.database.reading():
                together.wait()
            live.search(text_of(number), heads=["dense"])

        monkeypatch.setattr(live.encoder, "encode_tokens", noting)
        threads = [threading.Thread(target=search, args=(n,)) for n in range(IDLE * 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(forwards) == 1
        assert len(live._core.store.database._idle) == IDLE


# A folder that does not name its adapter


def test_a_build_takes_the_adapter_that_claims_the_folder(live: LiveIndex, tiny_m3: str, quick_builds) -> None:
    live.add(corpus(3))
    built = live.build(tiny_m3)
    assert (built.state, built.heads) == ("ready", live._core.live.heads)


def test_a_build_refuses_what_cannot_take_the_place_of_the_live_encoder(
    live: LiveIndex, tmp_path: Path, quick_builds
) -> None:
    from ultrarag.testing.tiny import tiny_bert, tiny_cross_encoder, tiny_masked_lm

    for name, make in {"plain": tiny_bert, "pairs": tiny_cross_encoder, "body": tiny_masked_lm}.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    live.add(corpus(3))
    with pytest.raises(UsageError, match=r"plain' has no ultrarag.json; read with the adapter 'bge' it has no head"):
        live.build(tmp_path / "plain")
    with pytest.raises(UsageError, match=r"read with the adapter 'bgem3' it has no head 'sparse'"):
        live.build(tmp_path / "body")  # a bare encoder says nothing, so the adapter in use counts
    with pytest.raises(UsageError, match=r"is a reranker, which scores .* an index needs an embedding model"):
        live.build(tmp_path / "pairs")
    with pytest.raises(UsageError, match="no model folder"):
        live.build(tmp_path / "missing")
    assert live.build(tmp_path / "plain", adapter="bge").heads == ("dense",)
