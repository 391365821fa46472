"""An index in a server that several processes share: mirrors, the lease, and following a swap."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import forked
from tests.retrieve import servers
from tests.retrieve.test_live import corpus, count_encoded, text_of
from ultrarag import Encoder
from ultrarag.errors import CheckpointError, IndexStateError, UsageError
from ultrarag.maps import LinearMap
from ultrarag.retrieve import remove_shared
from ultrarag.retrieve.command.parser import main
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.shared import lease as lease_module
from ultrarag.retrieve.shared import link as link_module
from ultrarag.retrieve.shared.documents import (
    Document,
    SharedRow,
    SharedState,
    lease_numbers,
    open_documents,
    read_state,
    vector_collections,
)
from ultrarag.retrieve.shared.lease import Lease, LeaseError
from ultrarag.types import Passage

#: One process's own client is of the long tests: it speaks as the stand-in over TCP does, and nobody shares it.
ENGINES = {
    "qdrant-local": "qdrant_client",
    "qdrant-rest": "qdrant_client",
    "milvus-lite": "milvus_lite",
    "qdrant-cluster": "qdrant_client",
    "milvus-cluster": "pymilvus",
}


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watcher looks when a test says so."""
    monkeypatch.setattr(link_module.Watcher, "_run", lambda self: None)
    monkeypatch.setattr(link_module, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(lease_module, "RETRY_SECONDS", 0.02)


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.long] if name == "qdrant-local" else []) for name in ENGINES]
)
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An address whose name no other test has."""
    engine = request.param
    if reason := servers.missing(ENGINES[engine]):
        pytest.skip(reason)
    if engine.endswith("-cluster"):
        found = servers.cluster(engine.removesuffix("-cluster"))
        if found is None:
            pytest.skip("no cluster is named")
        base = found
    elif engine == "qdrant-local":
        yield f"qdrant://{request.getfixturevalue('memory')}/local"
        return
    else:
        base = request.getfixturevalue("rest" if engine == "qdrant-rest" else "milvus_lite").uri
    name = f"{servers.NAME}{abs(hash(str(tmp_path))) % 10**9}"
    yield base.replace(f"/{servers.NAME}", f"/{name}")
    remove_shared(base.replace(f"/{servers.NAME}", f"/{name}"))


@pytest.fixture
def writer(uri: str, tmp_path: Path, tiny) -> Iterator[LiveIndex]:
    with closing(LiveIndex.create(tmp_path / "a", tiny, uri=uri)) as live:
        yield live


@pytest.fixture
def reader(writer: LiveIndex, uri: str, tmp_path: Path, tiny) -> Iterator[LiveIndex]:
    with closing(LiveIndex.open(tmp_path / "b", tiny, uri=uri)) as live:
        yield live


def poll(*indexes: LiveIndex) -> None:
    for live in indexes:
        watcher = live._core.watcher
        assert watcher is not None
        watcher.poll()


def release(live: LiveIndex) -> None:
    """Let the lease go, as two idle seconds would."""
    link = live._core.link
    assert link is not None
    link._used = float("-inf")
    link.heartbeat()
    assert not link.lease.held


def found(live: LiveIndex, number: int, **options: Any) -> list[str]:
    return [hit.id for hit in live.search(text_of(number), k=3, **(options or {"heads": ["dense"]}))]


def everything(live: LiveIndex) -> dict[str, Passage]:
    return {passage.id: passage for passage in live.passages()}


# Following


def test_what_one_process_writes_the_others_find(writer: LiveIndex, reader: LiveIndex) -> None:
    writer.add(corpus(20))
    assert len(reader) == 0
    poll(reader)
    assert everything(reader) == everything(writer)
    for options in ({"heads": ["dense"]}, {"heads": ["bm25"]}, {"heads": ["colbert"]}, {"weights": {"sparse": 1}}):
        assert found(reader, 7, **options) == found(writer, 7, **options), options
    assert [hit.id for hit in reader.search("number", k=50, filter={"even": True}, heads=["bm25"])] == [
        hit.id for hit in writer.search("number", k=50, filter={"even": True}, heads=["bm25"])
    ]


def test_changes_and_deletions_are_followed(writer: LiveIndex, reader: LiveIndex) -> None:
    writer.add(corpus(10))
    poll(reader)
    writer.add([Passage("p1", text_of(33)), Passage("p2", text_of(2), metadata={"n": -1})])
    writer.delete(["p3"])
    poll(reader)
    assert everything(reader) == everything(writer)
    assert "p3" not in everything(reader)
    assert found(reader, 33, heads=["bm25"])[0] == "p1"
    assert reader.get("p2").metadata == {"n": -1}


def test_a_mirror_made_late_has_everything(writer: LiveIndex, uri: str, tmp_path: Path, tiny) -> None:
    writer.add(corpus(600))
    writer.delete([f"p{n}" for n in range(0, 600, 7)])
    writer.add([Passage("p1", "changed")])
    with closing(LiveIndex.open(tmp_path / "late", uri=uri)) as late:
        assert everything(late) == everything(writer)
        assert late.fingerprint == writer.fingerprint
        assert found(late, 8) == found(writer, 8)


def test_a_long_text_comes_whole(writer: LiveIndex, reader: LiveIndex) -> None:
    long = "ひらがな and letters " * 20_000
    writer.add([Passage("long", long), *corpus(3)])
    writer.add([Passage("long", long + "!"), Passage("\0odd/ïd", "short")])
    poll(reader)
    assert reader.get("long").text == long + "!"
    assert reader.get("\0odd/ïd").text == "short"


def test_a_process_that_was_away_goes_on_from_its_mirror(
    writer: LiveIndex, uri: str, tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add(corpus(400))
    with closing(LiveIndex.open(tmp_path / "b", tiny, uri=uri)):
        pass
    writer.add(corpus(10, start=400))
    asked: list[tuple[int, int]] = []
    between = link_module.open_documents

    def counting(uri: str, kind: str):
        documents = between(uri, kind)
        inner = documents.between
        documents.between = lambda after, until: asked.append((after, until)) or inner(after, until)
        return documents

    monkeypatch.setattr(link_module, "open_documents", counting)
    with closing(LiveIndex.open(tmp_path / "b", tiny)) as again:
        assert len(again) == 410
    assert asked == [(400, 410)]


# Writing in turn


def test_one_process_writes_at_a_time(writer: LiveIndex, reader: LiveIndex) -> None:
    writer.add(corpus(3))
    with pytest.raises(LeaseError, match=r"is being written to by .*/a: one process writes at a time"):
        reader.add(corpus(3, start=3))
    assert len(reader) == 0
    release(writer)
    assert reader.add(corpus(5)).added == 2  # it knows the three others now
    assert found(reader, 4)[0] == "p4" or "p4" in found(reader, 4)
    release(reader)
    poll(writer)
    assert everything(writer) == everything(reader) == {passage.id: passage for passage in corpus(5)}
    writer.delete(["p0"])
    release(writer)
    poll(reader)
    assert len(reader) == 4


def test_the_next_writer_encodes_only_what_is_new(
    writer: LiveIndex, reader: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add(corpus(30))
    release(writer)
    seen = count_encoded(monkeypatch, reader)
    reader.add([Passage("new", "quite new")])
    assert seen == ["quite new"]


def test_processes_that_write_by_turns_lose_nothing(
    writer: LiveIndex, reader: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "WAIT_SECONDS", 60.0)
    monkeypatch.setattr(link_module, "IDLE_SECONDS", 0.0)
    errors: list[BaseException] = []

    def write(live: LiveIndex, start: int) -> None:
        try:
            for number in range(start, start + 12, 3):
                live.add(corpus(3, start=number))
                poll(live)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(live, n * 12)) for n, live in enumerate((writer, reader))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for live in (writer, reader):
        poll(live)
        poll(live)
        assert everything(live) == {passage.id: passage for passage in corpus(24)}
    with writer._core.leading():
        assert writer._core.live.backend.count() == 24


def test_a_dead_writer_is_followed_by_another(
    writer: LiveIndex, reader: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add(corpus(5))
    reader._core.link.lease.seconds = 0.6
    before = time.monotonic()
    reader.add(corpus(6))  # waits until the lease of the other, which sends no heartbeat, has expired
    assert 0.5 < time.monotonic() - before < 30
    assert len(reader) == 6
    with pytest.raises(LeaseError, match="another process took over"):
        writer._core.link.lease.write(lambda state: state)
    with pytest.raises(LeaseError, match="is being written to by"):
        writer.add(corpus(7))
    poll(writer)
    assert everything(writer) == everything(reader)


def test_a_write_that_the_lease_did_not_outlive_is_not_acknowledged(
    writer: LiveIndex, reader: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new holder appears between the writing of the passages and that of the state."""
    writer.add(corpus(5))
    put = writer._core.link.passages.put

    def slowly(documents) -> None:
        put(documents)
        reader._core.link.lease.seconds = 0.0
        reader.add([Passage("theirs", "theirs")])

    monkeypatch.setattr(writer._core.link.passages, "put", slowly)
    monkeypatch.setattr(link_module, "WAIT_SECONDS", 5.0)
    with pytest.raises(LeaseError, match="may be stored or not"):
        writer.add([Passage("ours", "ours")])
    assert writer.get("ours") is None
    monkeypatch.setattr(writer._core.link.passages, "put", put)
    release(reader)
    poll(writer, reader)
    assert everything(writer) == everything(reader)
    assert "theirs" in everything(writer)


def test_vectors_are_not_written_once_the_lease_is_gone(
    writer: LiveIndex, reader: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding took so long that another process took over, and replaced the same passage."""
    writer.add(corpus(5))
    encode = writer._core.live.encode_passages

    def slowly(texts):
        found = encode(texts)
        reader._core.link.lease.seconds = 0.0
        reader.add([Passage("p1", text_of(34))])
        writer._core.link.lease._last_heartbeat = float("-inf")
        return found

    monkeypatch.setattr(writer._core.vectors._target, "_encode", slowly)
    monkeypatch.setattr(link_module, "WAIT_SECONDS", 5.0)
    with pytest.raises(IndexStateError, match="stored and will not be lost, but it cannot be searched yet"):
        writer.add([Passage("p1", text_of(33))])
    release(reader)
    poll(writer)
    assert everything(writer) == everything(reader)
    held, wanted = reader.vectors(["p1"]), reader.encoder.encode([text_of(34)], "passage")
    assert abs(held.dense - wanted.dense).max() < 1e-5


def test_a_failed_write_leaves_mirror_and_server_in_step(
    writer: LiveIndex, reader: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies after some of the passages: they may be there or not, but everywhere alike."""
    writer.add(corpus(5))
    put = writer._core.link.passages.put

    def half(documents) -> None:
        put(documents[:2])
        raise IndexStateError("the server went away")

    monkeypatch.setattr(writer._core.link.passages, "put", half)
    with pytest.raises(IndexStateError, match="went away"):
        writer.add(corpus(9))
    assert len(writer) == 5
    poll(reader)
    assert len(reader) == 5
    monkeypatch.setattr(writer._core.link.passages, "put", put)
    writer.add([Passage("more", "more")])
    poll(reader)
    assert everything(writer) == everything(reader)
    assert len(writer) == 8  # what the server had got is there
    assert found(writer, 6, heads=["bm25"])[0] == "p6"


def test_a_full_disk_after_the_server_took_it_leaves_nothing_apart(
    writer: LiveIndex, reader: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has the write, the mirror cannot keep it: the next write must not take the same number."""
    writer.add(corpus(5))
    database, send = writer._core.store.database, writer._core.link._push

    def full(db) -> None:
        send(db)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(database, "before_commit", full)
    with pytest.raises(IndexStateError, match="make room on the disk"):
        writer.add(corpus(7))
    assert len(writer) == 5
    monkeypatch.setattr(database, "before_commit", send)
    assert writer.add(corpus(8)).added == 1  # two are there: the server had taken them
    poll(reader)
    assert everything(writer) == everything(reader) == {passage.id: passage for passage in corpus(8)}
    assert writer._core.live.backend.count() == 8


def test_a_taking_over_that_fails_half_way_is_taken_up_again(
    writer: LiveIndex, reader: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add(corpus(5))
    release(writer)
    between = reader._core.link.passages.between
    monkeypatch.setattr(reader._core.link.passages, "between", lambda after, until: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reader.add(corpus(1, start=5))
    monkeypatch.setattr(reader._core.link.passages, "between", between)
    assert reader.add(corpus(1, start=5)).added == 1
    assert everything(reader) == {passage.id: passage for passage in corpus(6)}


def test_words_and_vectors_hold_what_a_dead_writer_stored(writer: LiveIndex, reader: LiveIndex) -> None:
    """It died after the passages were acknowledged, before their vectors were written."""
    writer.add(corpus(5))
    link = writer._core.link
    with writer._core.leading():
        writer._core.store.write([])
        from ultrarag.retrieve.passages.files import records

        writer._core.store.write(list(records(corpus(8))))
    link.lease.abandon()
    reader._core.link.lease.seconds = 0.0
    reader.add([Passage("one", "one more")])
    assert reader._core.live.backend.count() == len(reader) == 9
    assert "p7" in found(reader, 7)


# Swapping


@pytest.fixture
def swapped(writer: LiveIndex, reader: LiveIndex, checkpoint: Path, quick_builds: None) -> int:
    writer.add(corpus(20))
    poll(reader)
    made = writer.build(checkpoint)
    writer.swap(made)
    return made.id


def test_a_swap_is_followed(writer: LiveIndex, reader: LiveIndex, swapped: int) -> None:
    old = reader.fingerprint
    assert found(reader, 3)  # still on the old pair, which still answers
    assert reader.fingerprint == old
    poll(reader)
    assert reader.fingerprint == writer.fingerprint != old
    assert reader.status()["live"]["id"] == swapped
    assert found(reader, 3) == found(writer, 3)


def test_another_process_rolls_back(writer: LiveIndex, reader: LiveIndex, swapped: int) -> None:
    poll(reader)
    release(writer)
    reader.add([Passage("later", "written after the swap")])
    flip = reader.rollback()
    assert flip.old.id == swapped
    assert "later" in [hit.id for hit in reader.search("written after the swap", k=3, heads=["dense"])]
    release(reader)
    poll(writer)
    assert writer.fingerprint == reader.fingerprint == flip.new.fingerprint
    assert len(writer) == 21


def test_a_process_swaps_what_another_built(
    writer: LiveIndex, reader: LiveIndex, checkpoint: Path, quick_builds: None
) -> None:
    writer.add(corpus(12))
    made = writer.build(checkpoint)
    release(writer)
    poll(reader)
    assert reader.build(checkpoint).id == made.id  # it is ready: nothing is built twice
    reader.swap(made.id)
    release(reader)
    poll(writer)
    assert writer.fingerprint == reader.fingerprint == made.fingerprint


def test_a_swap_that_the_server_did_not_take_is_none(
    writer: LiveIndex, reader: LiveIndex, checkpoint: Path, quick_builds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add(corpus(12))
    made = writer.build(checkpoint)
    old = writer.fingerprint
    write = writer._core.link.lease.write

    def refused(change: Callable[[SharedState], SharedState]) -> None:
        raise IndexStateError("the server went away")

    monkeypatch.setattr(writer._core.link.lease, "write", refused)
    with pytest.raises(IndexStateError, match="went away"):
        writer.swap(made)
    assert writer.fingerprint == old
    assert writer.generation(made.id).state == "ready"
    monkeypatch.setattr(writer._core.link.lease, "write", write)
    poll(reader)
    assert reader.fingerprint == old
    writer.swap(made)
    poll(reader)
    assert reader.fingerprint == made.fingerprint


def test_vacuum_deletes_what_no_generation_has(
    writer: LiveIndex, reader: LiveIndex, swapped: int, uri: str, other, tiny
) -> None:
    poll(reader)
    first = writer.build(tiny, share=False)
    writer.swap(first)  # the one before the swap is retired by this
    poll(reader)
    assert sorted(path.name for path in (reader.path / "generations").iterdir()) == [str(swapped), str(first.id)]
    with open_documents(uri, "states") as states:
        before = len(states.collections())
        writer.vacuum()
        assert len(states.collections()) < before
        assert len(lease_numbers(states.collections(), states.address.name)) == 1
    assert found(reader, 3) == found(writer, 3)
    assert writer.rollback().new.fingerprint == other.fingerprint
    folder = Path(writer.status()["shared"]["checkpoints"])
    assert sorted(path.name for path in folder.iterdir()) == sorted([other.fingerprint, tiny.fingerprint])


def test_shared_vectors_are_followed_and_outlive_who_made_them(
    writer: LiveIndex, reader: LiveIndex, uri: str, tmp_path: Path, tiny, other, quick_builds: None
) -> None:
    def collections() -> list[str]:
        with open_documents(uri, "states") as states:
            return vector_collections(states.collections(), states.address.name)

    writer.add(corpus(12))
    poll(reader)
    before, vectors = collections(), reader._core.live.vectors
    query_side = writer.build(Encoder.of_sides(tiny, other))
    writer.swap(query_side)
    assert (query_side.vectors_of, collections()) == (1, before)
    poll(reader)
    assert reader.fingerprint == query_side.fingerprint
    assert reader._core.live.vectors is vectors
    maps = [LinearMap(np.eye(tiny.dim)[::-1], np.zeros(tiny.dim))]
    mapped = writer.build(Encoder.of_sides(tiny, other, passage_maps=maps))
    writer.swap(mapped)
    assert mapped.mapped_from == 1
    assert len(collections()) > len(before)
    writer.vacuum()  # generation 1 is retired; its vectors are those of 2
    writer.add(corpus(3, 12))
    poll(reader)
    release(writer)
    with closing(LiveIndex.open(tmp_path / "late", uri=uri)) as late:
        assert late.fingerprint == mapped.fingerprint
        late.rollback()
        assert late.fingerprint == query_side.fingerprint
        assert late.status()["live"]["vectors_of"] == 1
        release(late)
        poll(reader, writer)
        assert reader.fingerprint == query_side.fingerprint
        for number in (3, 13):
            assert found(reader, number) == found(late, number) == found(writer, number)


def test_a_checkpoint_that_is_not_seen_stops_nothing(
    writer: LiveIndex, reader: LiveIndex, swapped: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(writer.status()["shared"]["checkpoints"])
    folder.rename(folder.with_name("away"))
    with pytest.raises(CheckpointError, match="every process of a shared index must see the folder"):
        poll(reader)
    assert found(reader, 3)
    folder.with_name("away").rename(folder)
    poll(reader)
    assert reader.fingerprint == writer.fingerprint


# Names, and errors


def test_an_index_is_created_once(writer: LiveIndex, uri: str, tmp_path: Path, tiny) -> None:
    with pytest.raises(IndexStateError, match=r"has a shared index '.*' already; open it with"):
        LiveIndex.create(tmp_path / "again", tiny, uri=uri)
    assert not (tmp_path / "again").exists()


def test_wrong_places_are_named(uri: str, tmp_path: Path, tiny, writer: LiveIndex) -> None:
    missing = uri + "x" if "local" not in uri else f"qdrant:///{tmp_path}/nothing"
    with pytest.raises(IndexStateError, match="holds no shared index"):
        LiveIndex.open(tmp_path / "c", uri=missing)
    assert not (tmp_path / "c").exists()
    with closing(LiveIndex.create(tmp_path / "own", tiny, backend="numpy")):
        pass
    with pytest.raises(IndexStateError, match="holds an index of its own; name another directory"):
        LiveIndex.open(tmp_path / "own", uri=uri)
    writer.close()
    with pytest.raises(UsageError, match="no one process repairs"):
        LiveIndex.open(tmp_path / "a", repair=True)
    with pytest.raises(UsageError, match="needs a path or a uri"):
        LiveIndex.open()
    with pytest.raises(UsageError, match="backend is for an index of this process alone"):
        LiveIndex.create(tmp_path / "d", tiny, uri=uri, backend="numpy")


def test_quantised_vectors_are_part_of_the_shared_generation(rest, tmp_path: Path, tiny, other, quick_builds) -> None:
    uri = rest.uri.replace(f"/{servers.NAME}", f"/{servers.NAME}bytes")

    def kept(live: LiveIndex) -> tuple[str, str]:
        backend = live._core.live.backend
        assert live._core.catalog.live().backend == backend.address.uri
        codes = rest.made[backend.collection].vectors["dense"].quantization_config
        return backend.address.quantise, next(iter(codes))[0]

    with closing(LiveIndex.create(tmp_path / "a", tiny, uri=f"{uri}?quantise=int8")) as one:
        one.add(corpus(3))
        release(one)
        with pytest.raises(IndexStateError, match="generation 1 as int8, not as binary: leave quantise out"):
            LiveIndex.open(tmp_path / "c", tiny, uri=f"{uri}?quantise=binary")
        with closing(LiveIndex.open(tmp_path / "b", tiny, uri=uri)) as two:
            assert kept(one) == kept(two) == ("int8", "scalar")
            with pytest.raises(UsageError, match="that address with another quantise"):
                one.build(other, backend="numpy")
            one.swap(one.build(other, backend=f"{uri}?quantise=binary"))
            poll(two)
            assert kept(one) == kept(two) == ("binary", "binary")
            assert found(two, 1) == found(one, 1)
            release(one)
        LiveIndex.open(tmp_path / "b", uri=f"{uri}?quantise=binary").close()
    remove_shared(uri)


def test_an_older_version_is_told_of_quantised_vectors() -> None:
    row = {"id": 1, "fingerprint": "f", "state": "live", "heads": ["dense"], "precision": "fp32", "base_seq": 0}
    row |= {"applied_seq": 0, "created": "", "forced": False, "metrics": {}}
    for quantise, version in (("", 1), ("int8", 3)):
        rows = [SharedRow(**row, quantise=quantise)]
        state = SharedState(epoch=1, holder="", checkpoints="", generations=rows)
        body = json.loads(state.document().body)
        assert (body["format"], body["generations"][0].get("quantise", "")) == (version, quantise)
        assert read_state(state.document(), "here").generations == rows


def test_a_mirror_needs_no_path(uri: str, tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with (
        closing(LiveIndex.create(uri=uri, encoder=tiny)) as one,
        closing(LiveIndex.open(uri=uri)) as two,
    ):
        assert one.path != two.path
        assert one.path.parent == two.path.parent
        one.add(corpus(2))
        poll(two)
        assert len(two) == 2


def test_status_says_who_writes(writer: LiveIndex, reader: LiveIndex, uri: str) -> None:
    writer.add(corpus(2))
    poll(reader)
    said = reader.status()["shared"]
    assert said["uri"] == uri
    assert not said["writing"]
    assert said["holder"].endswith("/a")
    assert said["committed"] == 2
    assert writer.status()["shared"]["writing"]
    json.dumps(reader.status())


def test_the_command_line(uri: str, tmp_path: Path, tiny_m3: str, capsys: pytest.CaptureFixture[str]) -> None:
    for n, text in enumerate(("red apple", "deep ocean")):
        (tmp_path / f"{n}.jsonl").write_text(json.dumps({"_id": f"p{n}", "text": text}) + "\n")
    one, two, model = str(tmp_path / "one"), str(tmp_path / "two"), ["--model", tiny_m3, "--adapter", "bgem3"]
    folder = str(tmp_path / "checkpoints")
    for words in (
        ["create", one, *model, "--uri", uri, "--checkpoints", folder],
        ["add", one, str(tmp_path / "0.jsonl")],
        ["mirror", two, "--uri", uri],
        ["add", two, str(tmp_path / "1.jsonl")],
        ["search", one, "deep ocean", "--heads", "bm25"],
        ["status", one],
    ):
        assert main(words) == 0, words
    out = capsys.readouterr().out
    assert "1 added, 0 changed, 0 unchanged; the index holds 2 passages" in out
    assert "p1" in out
    assert f"mirrors {uri}" in out
    assert main(["mirror", str(tmp_path / "three"), "--uri", uri + "&x=1" if "?" in uri else uri + "?x=1"]) == 2
    assert "has no option 'x'" in capsys.readouterr().err


# The lease and the documents alone


@pytest.fixture
def documents(uri: str, request: pytest.FixtureRequest):
    with open_documents(uri, "states") as states:
        states.create()
        states.create()  # twice is harmless
        yield states
        if "qdrant:///" not in uri:
            states.claim(f"{states.address.name}_lease_1", "m")  # so that there is an index to remove


def key_of(number: int) -> str:
    return f"00000000-0000-0000-0000-{number:012d}"


def test_documents_are_replaced_whole(documents) -> None:
    many = [Document(key_of(n), n, f'{{"n": {n}}}') for n in range(1, 601)]
    documents.put(many)
    assert documents.between(0, 600) == many
    assert documents.between(10, 12) == many[10:12]
    long = Document(key_of(5), 601, "é" * 50_000)
    documents.put([long])
    assert documents.get([key_of(5), key_of(999)]) == {key_of(5): long}
    shorter = Document(key_of(5), 602, "ü" * 20_000)
    documents.put([shorter])
    assert documents.between(600, 700) == [shorter]
    assert documents.between(4, 5) == []
    documents.delete([key_of(5), key_of(6)])
    assert documents.get([key_of(5), key_of(6)]) == {}


def test_a_name_is_claimed_once(documents) -> None:
    name = f"{documents.address.name}_lease_7"
    won: list[bool] = []
    threads = [threading.Thread(target=lambda n=n: won.append(documents.claim(name, f"h{n}"))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 5 + [True]
    assert lease_numbers(documents.collections(), documents.address.name) == [7]
    documents.drop(name)
    assert documents.claim(name, "h9")


def test_a_lease_passes_on_what_was_written_before(documents, tmp_path: Path) -> None:
    one, two = Lease(documents, tmp_path / "1"), Lease(documents, tmp_path / "2")
    assert one.initialize(SharedState(epoch=1, holder="", checkpoints="c"))
    assert not two.initialize(SharedState(epoch=1, holder="", checkpoints="d"))
    one.write(lambda state: state.model_copy(update={"committed": 5}))
    with pytest.raises(LeaseError, match="is being written to by"):
        two.acquire(0.1)
    one.release()
    assert two.acquire(0.1).committed == 5
    assert two.read().epoch == 2
    with pytest.raises(LeaseError, match="does not hold the lease"):
        one.write(lambda state: state)
    two.write(lambda state: state.model_copy(update={"committed": 6}))
    two.release()
    assert one.acquire(0.1).committed == 6
    assert one.read().checkpoints == "c"


PROCESS = """
import json, sys, time
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.shared import link
link.POLL_SECONDS = 0.2
with LiveIndex.open(sys.argv[1], uri=sys.argv[2]) as live:
    print(json.dumps({"ready": live.fingerprint}), flush=True)
    seen, deadline = set(), time.monotonic() + 120
    while time.monotonic() < deadline:
        hits = live.search("vector database", k=3, heads=["dense"])
        fingerprint = live.fingerprint
        if fingerprint not in seen:
            seen.add(fingerprint)
            print(json.dumps({"fingerprint": fingerprint, "hits": len(hits), "passages": len(live)}), flush=True)
        if len(seen) == 2 and len(live) == 21:
            break
"""


def test_real_processes_follow_and_outlive_each_other(
    request: pytest.FixtureRequest, tmp_path: Path, tiny, checkpoint: Path, quick_builds: None
) -> None:
    """Two processes answer while this one writes, swaps, and leaves; one of them is killed."""
    if reason := servers.missing("milvus_lite"):
        pytest.skip(reason)
    uri = request.getfixturevalue("milvus_lite").uri.replace(f"/{servers.NAME}", f"/{servers.NAME}processes")
    with closing(LiveIndex.create(tmp_path / "w", tiny, uri=uri)) as live:
        live.add(corpus(20))
        command = [sys.executable, "-c", PROCESS]
        readers = [
            subprocess.Popen([*command, str(tmp_path / name), uri], stdout=subprocess.PIPE, text=True) for name in "xy"
        ]
        for process in readers:
            assert json.loads(process.stdout.readline())["ready"] == tiny.fingerprint
            assert json.loads(process.stdout.readline())["passages"] == 20
        live.swap(live.build(checkpoint))
        swapped = live.fingerprint
        live.add([Passage("last", "written after the swap")])
    readers[1].kill()
    readers[1].wait()
    readers[1].stdout.close()
    told = json.loads(readers[0].stdout.readline())
    assert told["fingerprint"] == swapped
    assert told["hits"] == 3
    assert readers[0].wait(120) == 0
    readers[0].stdout.close()
    with closing(LiveIndex.open(tmp_path / "y")) as again:  # the mirror of the killed one is sound
        assert len(again) == 21
        assert again.fingerprint == swapped
    remove_shared(uri)


WRITER = """
import sys
from ultrarag.retrieve.live import LiveIndex
with LiveIndex.open(sys.argv[1], uri=sys.argv[2]) as live:
    number = len(live)
    while True:
        live.add([{"id": f"w{number + n}", "text": f"written {number + n}"} for n in range(3)])
        number += 3
        print(number, flush=True)
"""


def test_nothing_is_lost_when_a_writer_is_killed(
    request: pytest.FixtureRequest, tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "WAIT_SECONDS", 2.0)
    if reason := servers.missing("milvus_lite"):
        pytest.skip(reason)
    uri = (
        request.getfixturevalue("milvus_lite").uri.replace(f"/{servers.NAME}", f"/{servers.NAME}killed") + "?timeout=1"
    )
    with closing(LiveIndex.create(tmp_path / "w", tiny, uri=uri)):
        pass
    command = [sys.executable, "-c", WRITER, str(tmp_path / "x"), uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            acknowledged = int(process.stdout.readline())
        time.sleep(0.1)
        process.kill()
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
    with closing(LiveIndex.open(tmp_path / "w")) as live:
        assert live.add([Passage("mine", "and mine")]).added == 1  # once the lease of the dead one has ended
        held = everything(live)
        assert {f"w{n}" for n in range(acknowledged)} <= set(held)
        assert live._core.live.backend.count() == len(held)
        assert sorted(live._core.live.backend.ids()) == sorted(held)
    with closing(LiveIndex.open(tmp_path / "x")) as again:
        assert everything(again) == held
    remove_shared(uri)


DYING = """
import os, sys
from tests.retrieve.test_live import text_of
from ultrarag.retrieve.live import LiveIndex

def dying(real, share):  # does a part of what it is asked, and the process is killed
    def call(*arguments):
        real(*(each[: int(len(each) * share)] if isinstance(each, list) else each for each in arguments))
        os.kill(os.getpid(), 9)
    return call

def write(folder, uri, moment):
    core = LiveIndex.open(folder, uri=uri)._core
    link, target = core.link, core.vectors._target
    if moment == "half of the passages":
        link.passages.put = dying(link.passages.put, 0.5)
    elif moment == "the log":
        link.lease.write = dying(link.lease.write, 1)
    else:
        real = core.live.backend.upsert
        core.live.backend.upsert = lambda ids, vectors, metadata: dying(
            lambda rows: real([ids[row] for row in rows], vectors[rows], [metadata[row] for row in rows]), 0.5
        )(list(range(len(ids))))
    changed = [{"id": f"p{number}", "text": text_of(number + 100)} for number in range(30)]
    core.write(lambda: core.store.write(list(records(changed))))

from ultrarag.retrieve.passages.files import records
for folder, uri, moment in zip(*[iter(sys.argv[1:])] * 3):
    if (child := os.fork()) == 0:
        write(folder, uri, moment)
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
MOMENTS = ("half of the passages", "the log", "half of the vectors")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize(
    "moments", [MOMENTS[:1], pytest.param(MOMENTS[1:], marks=pytest.mark.long)], ids=["first", "rest"]
)
def test_followers_settle_what_a_killed_writer_left(
    moments: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody writes any more, and yet each passage comes to be served with its own vector, everywhere alike."""
    if reason := servers.missing("milvus_lite"):
        pytest.skip(reason)
    monkeypatch.setattr(link_module, "IDLE_SECONDS", 0.0)
    base = request.getfixturevalue("milvus_lite").uri
    uris = [base.replace(f"/{servers.NAME}", f"/{servers.NAME}dying{MOMENTS.index(moment)}") for moment in moments]
    words = []
    for number, (uri, moment) in enumerate(zip(uris, moments, strict=True)):
        with closing(LiveIndex.create(tmp_path / f"w{number}", tiny, uri=uri)) as live:
            live.add(corpus(42))
        with closing(LiveIndex.open(tmp_path / f"f{number}", tiny, uri=uri)):
            pass  # a mirror that has what was there before
        words += [str(tmp_path / f"x{number}"), uri, moment]
    done = forked.run(["-c", DYING, *words])
    assert done.stdout.split() == ["-9"] * len(moments), done.stderr
    for number, (uri, moment) in enumerate(zip(uris, moments, strict=True)):
        with (
            closing(LiveIndex.open(tmp_path / f"f{number}", tiny)) as follower,
            closing(LiveIndex.open(tmp_path / f"g{number}", tiny, uri=uri)) as late,
        ):
            for live in (follower, late):
                live._core.link.lease.seconds = 0.3
            servers.wait_for(lambda: settled(follower, late), 10)
            assert everything(follower) == everything(late), moment
            assert_pairs(follower)
            changed = sum(passage.text == text_of(int(id[1:]) + 100) for id, passage in everything(late).items())
            assert changed == (15 if moment == "half of the passages" else 30)
        remove_shared(uri)


def settled(*indexes: LiveIndex) -> bool:
    """Whether the lease is free, and nothing is left over for any of the processes."""
    poll(*indexes)
    links = [live._core.link for live in indexes]
    return all(link.state.released and not link.lease.held and not link.left_over() for link in links)


def assert_pairs(live: LiveIndex) -> None:
    """Each passage is stored with the vector that the encoder gives its text."""
    held = everything(live)
    wanted = live.encoder.encode([passage.content for passage in held.values()], "passage")
    assert abs(live.vectors(list(held)).dense - wanted.dense).max() < 1e-5


def test_a_writer_whose_vectors_failed_takes_them_up_by_itself(
    writer: LiveIndex, reader: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add(corpus(5))
    poll(reader)
    with monkeypatch.context() as patch:
        patch.setattr(writer._core.live.backend, "upsert", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.add([Passage("p1", text_of(33))])
    release(writer)
    poll(reader)  # it is the first to see that the vectors are behind
    poll(reader)
    assert reader.get("p1").text == text_of(33)
    assert_pairs(reader)
    release(reader)
    poll(writer)
    assert not writer._core.link.lease.held  # nothing is left to settle
    assert everything(writer) == everything(reader)


def test_what_is_in_doubt_is_settled_when_the_writer_closes(
    writer: LiveIndex, uri: str, tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add(corpus(5))
    put = writer._core.link.passages.put

    def half(documents) -> None:
        put(documents[:2])
        raise IndexStateError("the server went away")

    with monkeypatch.context() as patch:
        patch.setattr(writer._core.link.passages, "put", half)
        with pytest.raises(IndexStateError, match="went away"):
            writer.add([Passage(f"p{number}", text_of(number + 100)) for number in range(5)])
    writer.close()
    with closing(LiveIndex.open(tmp_path / "late", tiny, uri=uri)) as late:
        assert len(late) == 5
        poll(late)
        assert [late.get(f"p{number}").text == text_of(number + 100) for number in range(3)] == [True, True, False]
        assert_pairs(late)


def succeeds(work: Callable[[], object]) -> bool:
    try:
        work()
    except IndexStateError:
        return False
    return True


def test_a_server_that_went_away_and_came_back(tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := servers.missing("milvus_lite"):
        pytest.skip(reason)
    monkeypatch.setattr(link_module, "WAIT_SECONDS", 10.0)
    server = servers.MilvusLite(tmp_path / "data")
    try:
        uri = server.uri + "?timeout=1"
        with (
            closing(LiveIndex.create(tmp_path / "a", tiny, uri=uri)) as writer,
            closing(LiveIndex.open(tmp_path / "b", tiny, uri=uri)) as reader,
        ):
            writer.add(corpus(5))
            poll(reader)
            server.kill()
            for attempt in (lambda: writer.add(corpus(7)), lambda: poll(reader), lambda: found(reader, 3)):
                with pytest.raises(IndexStateError, match=r"milvus://127\.0\.0\.1"):
                    attempt()
            assert found(reader, 3, heads=["bm25"])[0] == "p3"  # the words are here
            server.start()
            servers.wait_for(lambda: succeeds(lambda: writer.add(corpus(8))), 60)  # gRPC connects again when it likes
            servers.wait_for(lambda: succeeds(lambda: poll(reader)), 60)
            assert everything(writer) == everything(reader) == {passage.id: passage for passage in corpus(8)}
            assert found(reader, 3) == found(writer, 3)
    finally:
        server.kill()
