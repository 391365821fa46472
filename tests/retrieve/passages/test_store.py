"""The store: what a write did, what the log says of it, what is refused, and damage."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ultrarag.errors import DataError, IndexStateError
from ultrarag.retrieve.generation.catalog import Catalog
from ultrarag.retrieve.passages.files import records
from ultrarag.retrieve.passages.listing import delete_matching
from ultrarag.retrieve.passages.store import DATABASE_FILE, Store, Written
from ultrarag.retrieve.search import parse
from ultrarag.types import Passage


@pytest.fixture
def store(tmp_path: Path):
    store = Store.create(tmp_path)
    yield store
    store.close()


def write(store: Store, *passages: Passage | dict) -> Written:
    return store.write(records(passages))


def test_a_write_says_what_it_did(store: Store) -> None:
    assert write(store, Passage("1", "one"), Passage("2", "two")) == Written(added=2)
    assert write(store, Passage("1", "one"), Passage("2", "zwei")) == Written(changed=1, unchanged=1)
    assert write(store, Passage("1", "one", metadata={"lang": "en"})) == Written(metadata=1)
    assert store.get(["1", "2", "3"]) == {
        "1": Passage("1", "one", metadata={"lang": "en"}),
        "2": Passage("2", "zwei"),
    }
    assert store.count() == 2


def test_of_an_id_twice_the_last_wins(store: Store) -> None:
    assert write(store, Passage("1", "first"), Passage("1", "last")) == Written(added=1)
    assert store.get(["1"])["1"].text == "last"


def test_a_title_moved_into_the_text_is_kept_though_nothing_needs_encoding(store: Store) -> None:
    write(store, Passage("1", "text", title="title"))
    assert write(store, Passage("1", "title\ntext")) == Written(metadata=1)
    assert store.get(["1"])["1"] == Passage("1", "title\ntext")


def test_the_log_is_reduced_to_what_each_passage_is_now(store: Store) -> None:
    write(store, *(Passage(id, f"text {id}") for id in "abcd"))
    start = store.last_seq()
    store.delete(["a", "b", "unknown"])
    write(store, Passage("b", "again"), Passage("c", "text c", metadata={"n": 1}), Passage("d", "new"))
    write(store, Passage("d", "new", metadata={"n": 2}))
    changes = store.changes(start, 100)
    assert changes is not None
    assert changes.deleted == ["a"]
    assert changes.metadata == [Passage("c", "text c", metadata={"n": 1})]
    assert changes.content == [Passage("b", "again"), Passage("d", "new", metadata={"n": 2})]
    assert changes.seq == store.last_seq() == start + 6
    assert store.changes(changes.seq, 100) is None


def test_changes_come_in_stretches(store: Store) -> None:
    write(store, *(Passage(str(i), "x") for i in range(5)))
    first = store.changes(0, 3)
    assert first is not None
    assert (len(first.content), first.seq) == (3, 3)
    rest = store.changes(3, 3)
    assert rest is not None
    assert [passage.id for passage in rest.content] == ["3", "4"]


def test_deleting_removes_the_content_and_a_passage_may_come_back(store: Store) -> None:
    write(store, Passage("1", "secret", title="secret"), Passage("2", "two"))
    assert store.delete(["1", "1", "nobody"]) == 1
    assert store.delete(["1"]) == 0
    with store.database.reading() as db:
        assert db.execute("SELECT text, title FROM passages WHERE id = '1'").fetchone() == ("", "")
    assert (store.get(["1"]), store.count()) == ({}, 1)
    assert write(store, Passage("1", "secret", title="secret")) == Written(added=1)
    assert store.count() == 2


def test_a_scan_leaves_out_what_was_written_later(store: Store) -> None:
    write(store, *(Passage(str(i), "x") for i in range(4)))
    until = store.last_seq()
    write(store, Passage("1", "changed"), Passage("2", "x", metadata={"n": 1}), Passage("9", "new"))
    store.delete(["0"])
    assert [passage.id for _, passage in store.scan(up_to_seq=until)] == ["2", "3"]
    assert [passage.id for _, passage in store.scan(limit=2)] == ["1", "2"]
    assert [passage.id for passage in store.passages()] == ["1", "2", "3", "9"]


def test_forgetting_keeps_what_is_still_needed_and_numbers_go_on(store: Store) -> None:
    write(store, Passage("1", "one"), Passage("2", "two"))
    store.delete(["1"])
    last = store.last_seq()
    store.forget(last)
    assert (store.changes(0, 10), store.last_seq(), store.count()) == (None, last, 1)
    write(store, Passage("3", "three"))
    assert store.last_seq() == last + 1


@pytest.mark.parametrize("id", ["a/b/../c", "日本", "nul\0inside", " ", "'; DROP TABLE passages; --", "x" * 5000])
def test_any_text_is_an_id_and_is_kept_exactly(store: Store, id: str) -> None:
    passage = Passage(id, "nul \0 byte\r\n", title="\u2028", metadata={"a": {"b": [1, None, "ü"]}})
    write(store, passage)
    assert store.get([id]) == {id: passage}


@pytest.mark.parametrize(
    ("passage", "said"),
    [
        (Passage("p7", "bad \ud800"), "'p7'.*'text' holds a lone surrogate"),
        (Passage("p\udfff", "text"), "'id' holds a lone surrogate"),
        (Passage("p7", "text", title="\ud800"), "'p7'.*'title'"),
        (Passage("p7", "text", metadata={"k": "\ud800"}), "'p7'.*'metadata' holds"),
        (Passage("", "text"), "non-empty"),
        (Passage(7, "text"), "'id' is int"),  # type: ignore[arg-type]
        (Passage("p7", None), "'p7'.*'text' is NoneType"),  # type: ignore[arg-type]
        (Passage("p7", "text", metadata={"k": {1, 2}}), "'p7'.*'k'"),
        (Passage("p7", "text", metadata={"k": float("nan")}), "'p7'.*'k'"),
        (Passage("p7", "text", metadata={1: "k"}), "'p7'.*not a string"),  # type: ignore[dict-item]
        (Passage("p7", "text", metadata=[1]), "'p7'.*list"),  # type: ignore[arg-type]
        ({"id": "p7"}, "no 'text'"),
        ({"text": "p7"}, "no 'id'"),
        ({"id": "p7", "txt": "x"}, "unknown field 'txt'; did you mean 'text'"),
        ("p7", "passage 1 is str"),
    ],
)
def test_what_no_index_can_hold_is_refused_by_name(store: Store, passage: Passage | dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        write(store, passage)
    assert store.count() == 0


def test_mappings_in_the_layouts_of_others(store: Store) -> None:
    write(
        store,
        {"_id": "1", "text": "x", "title": "t", "metadata": {"n": 1}},
        {"id": "2", "contents": "y", "title": None},
    )
    assert store.get(["1", "2"]) == {"1": Passage("1", "x", "t", {"n": 1}), "2": Passage("2", "y")}


def test_a_failed_write_leaves_nothing(store: Store) -> None:
    with pytest.raises(DataError):
        write(store, Passage("1", "one"), Passage("2", "\ud800"))
    assert (store.count(), store.last_seq()) == (0, 0)


def test_damage_is_named(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    write(store, *(Passage(str(i), f"some text {i}") for i in range(500)))
    store.close()
    path = tmp_path / DATABASE_FILE
    content = path.read_bytes()
    path.write_bytes(content.replace(b"some text 250", b"some tent 250"))
    with pytest.raises(IndexStateError, match=r"passages\.sqlite.*passage '250'.*checksum"):
        Store.open(tmp_path).get(["250"])
    path.write_bytes(content[: len(content) // 2 // 4096 * 4096])
    with pytest.raises(IndexStateError, match=r"passages\.sqlite.*(malformed|damaged)"):
        list(Store.open(tmp_path).passages())
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(IndexStateError, match=r"passages\.sqlite.*not a database"):
        Store.open(tmp_path)
    path.unlink()
    with pytest.raises(IndexStateError, match="holds no index"):
        Store.open(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    store.set_meta(format="99")
    store.close()
    with pytest.raises(IndexStateError, match="format 99"):
        Store.open(tmp_path)


def test_there_is_never_more_than_one_live_generation(store: Store) -> None:
    catalog = Catalog(store)
    ids = [catalog.add(f"f{n}", "numpy", ["dense"], "fp32", "ready", 0).id for n in range(3)]
    for id in ids:
        catalog.flip(id)
    assert [catalog.get(id).state for id in ids] == ["retired", "previous", "live"]
    catalog.flip(ids[1])  # as a rollback does
    assert [catalog.get(id).state for id in ids] == ["retired", "live", "previous"]
    with pytest.raises(IndexStateError, match="UNIQUE"):
        catalog.set_state(ids[0], "live", only_from=("retired",))
    assert catalog.live().id == ids[1]


def test_a_reader_in_the_midst_of_writes_sees_the_last_commit(store: Store, tmp_path: Path) -> None:
    write(store, Passage("1", "one"))
    reader = Store.open(tmp_path, read_only=True)
    with store.database.transaction() as db:
        db.execute("UPDATE passages SET text = 'half'")
        assert reader.get(["1"])["1"].text == "one"
        db.execute("UPDATE passages SET text = 'one'")
    with pytest.raises(IndexStateError, match="open for reading"):
        reader.delete(["1"])
    reader.close()


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from ultrarag.errors import IndexStateError
    from ultrarag.retrieve.passages.files import records
    from ultrarag.retrieve.passages.store import Store
    from ultrarag.types import Passage

    store = Store.open(Path(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    for batch in range(100):
        try:
            store.write(records(Passage(f"{batch}-{n}", "x" * 5000) for n in range(20)))
        except IndexStateError as error:
            print(batch, error)
            break
    print(store.count())
"""


def test_a_full_disk_is_a_clear_error_and_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    Store.create(tmp_path).close()
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)]
    told, count = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    batch, message = told.split(" ", 1)
    assert "passages.sqlite" in message
    assert "make room on the disk" in message
    store = Store.open(tmp_path)
    assert store.count() == int(count) == 20 * int(batch) > 0
    write(store, Passage("room again", "x"))
    store.close()


def test_the_file_is_written_durably(store: Store) -> None:
    with store.database.transaction() as db:
        assert isinstance(db, sqlite3.Connection)
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    for durable, synchronous in ((False, 1), (False, 1), (True, 2), (False, 1), (True, 2)):  # NORMAL, FULL
        with store.database.transaction(durable) as db:
            assert db.execute("PRAGMA synchronous").fetchone()[0] == synchronous


COUNTED = "SELECT count(*) FROM passages WHERE deleted = 0"


def counted(store: Store) -> int:
    with store.database.reading() as db:
        (wanted,) = db.execute(COUNTED).fetchone()
    assert store.count() == wanted
    return int(wanted)


def test_the_number_of_passages_is_kept_whatever_is_written(store: Store) -> None:
    assert counted(store) == 0
    write(store, *(Passage(str(n), f"text {n}", metadata={"n": n}) for n in range(10)))
    assert counted(store) == 10
    write(store, Passage("1", "another text"), Passage("2", "text 2", metadata={"n": 0}), Passage("new", "new"))
    assert counted(store) == 11
    store.delete(["1", "2", "no such"])
    assert counted(store) == 9
    write(store, Passage("1", "there again"))
    delete_matching(store, parse({"n": {"gte": 8}}))
    assert counted(store) == 8
    with pytest.raises(IndexStateError), store.database.transaction() as db:
        db.execute("UPDATE passages SET deleted = 1").execute("no SQL")
    assert counted(store) == 8
    store.forget(store.last_seq())
    assert counted(store) == 8


def test_counting_passages_does_not_read_them(store: Store) -> None:
    write(store, *(Passage(str(n), f"text {n}") for n in range(3)))
    steps: list[str] = []
    with store.database.reading() as db:
        db.set_trace_callback(steps.append)
        store.count()
        db.set_trace_callback(None)
    store.count()
    reader = Store.open(store.database.path.parent, read_only=True)
    with reader.database.reading() as db:
        db.set_trace_callback(steps.append)
    assert reader.count() == 3
    reader.close()
    assert steps
    assert not any("count(" in step or "FROM passages" in step for step in steps)


def test_an_older_file_gets_its_number_of_passages_when_it_is_opened(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    write(store, *(Passage(str(n), f"text {n}") for n in range(5)))
    store.delete(["3"])
    with store.database.transaction() as db:  # as it was before files counted
        for name in ("counted_new", "counted_changed", "counted_gone"):
            db.execute(f"DROP TRIGGER {name}")
        db.execute("DROP TABLE counted")
    store.close()
    reader = Store.open(tmp_path, read_only=True)
    assert reader.count() == 4
    store = Store.open(tmp_path)
    assert counted(store) == 4
    write(store, Passage("6", "six"))
    assert counted(store) == reader.count() == 5
    reader.close()
    store.close()


def test_words_and_vectors_read_the_log_once(store: Store) -> None:
    write(store, Passage("1", "one"), Passage("2", "two"))
    first = store.changes(0, 10)
    assert store.changes(0, 10) is first
    assert store.changes(0, 1) != first
    write(store, Passage("1", "eins"))
    found = store.changes(0, 10)
    assert found is not None
    assert {passage.text for passage in found.content} == {"eins", "two"}
