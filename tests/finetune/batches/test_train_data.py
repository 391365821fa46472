"""Files become datasets: in a fixed order, nothing passed over; and the cache of their rows is right or rebuilt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked
from tests.finetune.batches.planning import train_data
from tests.rows.row_files import GOOD, numbered, write
from ultrarag.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The default cache, out of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "ultrarag" / "data"


# ---- directories


def test_directories_are_read_in_order_of_names_and_all_suffixes(tmp_path, monkeypatch):
    for name in ("b.JSONL", "a.txt", "c.json", "A.jsonl"):
        write(tmp_path / "d" / name, {"query": name, "pos": ["p"]})
    (tmp_path / "d" / "qrels").mkdir()
    (tmp_path / "d" / "README.md").write_text("x")
    listed = sorted(os.listdir(tmp_path / "d"), reverse=True)
    monkeypatch.setattr(os, "listdir", lambda path: list(listed))
    data = train_data(f"{tmp_path}/d/")
    assert [data[i].query for i in range(4)] == ["A.jsonl", "a.txt", "b.JSONL", "c.json"]
    assert [dataset.name for dataset in data.datasets] == ["A", "a", "b", "c"]
    assert any("2 entries" in note and "'README.md', 'qrels/'" in note for note in data.notes)


def test_data_that_cannot_be_read_is_not_passed_over(tmp_path):
    write(tmp_path / "d" / "a.jsonl", GOOD)
    write(tmp_path / "d" / "b.jsonl.gz", "x")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz' looks like data"):
        train_data(tmp_path / "d")


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"no file ending in \.jsonl.*'notes\.md'"):
        train_data(tmp_path / "empty")
    with pytest.raises(UsageError, match="does not exist"):
        train_data(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="neither a file nor a directory"):
        train_data("/dev/null")


def test_a_file_given_twice_is_said(tmp_path):
    path = write(tmp_path / "d" / "a.jsonl", GOOD)
    data = train_data([path, tmp_path / "d"])
    assert len(data) == 2
    assert any("is given 2 times" in note for note in data.notes)


# ---- datasets


@pytest.mark.parametrize(
    "name",
    [
        "web_no_in_batch_neg.jsonl",
        "web_no_in_batch_neg.v2.jsonl",
        "v1.web_no_in_batch_neg.json",
        "web_no_in_batch_neg/rows.jsonl",
        "web.v2_no_in_batch_neg/rows.jsonl",
    ],
)
@pytest.mark.parametrize("end", ["", "/", "/."])
def test_a_name_switches_in_batch_negatives_off(tmp_path, name, end):
    path = write(tmp_path / "x.y" / name, GOOD)
    given = str(Path(path).parent) + end if "/" in name else path
    (dataset,) = train_data(given).datasets
    assert not dataset.in_batch_negatives


def test_an_argument_switches_in_batch_negatives_off(tmp_path):
    write(tmp_path / "d" / "one.jsonl", GOOD)
    write(tmp_path / "d" / "two.jsonl", GOOD)
    three = write(tmp_path / "three.json", GOOD)

    def on(*names: str) -> list[bool]:
        data = train_data([tmp_path / "d", three], no_in_batch_neg=names)
        return [dataset.in_batch_negatives for dataset in data.datasets]

    assert on() == [True, True, True]
    assert on("two") == [True, False, True]
    assert on("d") == [False, False, True]
    assert on("three.json", "one") == [False, True, False]
    assert on(f"{tmp_path}/d/") == [False, False, True]
    assert on("*") == [False, False, False]
    with pytest.raises(UsageError, match="names 'thre', which is no dataset; did you mean 'three'"):
        on("thre")


def test_small_files_are_merged_or_left_out_loudly(tmp_path):
    for name, count in {"a": 3, "b": 10, "c": 2}.items():
        write(tmp_path / "d" / f"{name}.jsonl", *numbered(count, name))
    for name in "xy":
        write(tmp_path / "e" / f"{name}.jsonl", *numbered(1, name))
    alone = write(tmp_path / "alone.jsonl", *numbered(1))
    settings = {"small_threshold": 5, "drop_threshold": 3}
    data = train_data([tmp_path / "d", tmp_path / "e", alone], same_dataset_within_batch=True, **settings)
    assert [(item.name, item.stop - item.start) for item in data.datasets] == [("b", 10), ("d", 5)]
    assert [data[i].query for i in range(10, 15)] == ["aq0", "aq1", "aq2", "cq0", "cq1"]
    assert list(data.negatives) == [1] * 15
    notes = "\n".join(data.notes)
    assert "2 small files" in notes
    assert "2 rows are not trained on, fewer than drop_threshold 3: 'x' (1), 'y' (1)" in notes
    assert "1 rows are not trained on, fewer than small_threshold 5: 'alone' (1)" in notes
    assert len(train_data([tmp_path / "d", tmp_path / "e", alone], **settings)) == 18  # as the peer: one mode only


def test_small_files_of_different_kinds_are_not_merged(tmp_path):
    write(tmp_path / "d" / "a.jsonl", *numbered(2, type="only_1neg"))
    write(tmp_path / "d" / "b.jsonl", *numbered(2))
    data = train_data(tmp_path / "d", same_dataset_within_batch=True, small_threshold=5)
    assert [(item.name, item.type) for item in data.datasets] == [("a", "only_1neg"), ("b", "normal")]


def test_nothing_left_after_thresholds_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no rows are left.*small_threshold"):
        train_data(path, same_dataset_within_batch=True, small_threshold=5)


def test_a_choice_of_rows_is_a_function_of_the_seed(tmp_path):
    write(tmp_path / "d" / "a.jsonl", *numbered(50, "a"))
    write(tmp_path / "d" / "b.jsonl", *numbered(5, "b"))

    def queries(seed: int) -> list[str]:
        data = train_data(tmp_path / "d", max_example_num_per_dataset=10, seed=seed)
        assert any("10 of 50 rows" in note for note in data.notes)
        return [data[i].query for i in range(len(data))]

    assert queries(1) == queries(1)
    assert queries(1) != queries(2)
    assert len(set(queries(1))) == 15


# ---- the cache


def test_the_cache_is_used_and_is_keyed_by_content(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", *numbered(3))
    first = train_data(path)
    made = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert sorted(name.split(".")[-1] for name in made) == ["arrow", "json"]
    again = train_data(path)
    assert {file.name: file.stat().st_mtime_ns for file in cache.iterdir()} == made
    assert [again[i] for i in range(3)] == [first[i] for i in range(3)]
    os.utime(path, (1, 1))
    write(tmp_path / "a.jsonl", *numbered(3, "other"))
    changed = train_data(path)
    assert changed[0].query == "otherq0"
    assert changed.digest != first.digest


def test_the_digest_is_of_content_not_of_names(tmp_path):
    one, two = write(tmp_path / "a.jsonl", *numbered(3)), write(tmp_path / "b.jsonl", *numbered(3))
    assert train_data(one).digest == train_data(two).digest
    assert train_data(two)[0].source == f"{two}:1"
    assert train_data(numbered(3)).digest == train_data(numbered(3)).digest
    assert train_data(numbered(3)).digest != train_data(numbered(4)).digest


def _shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.find(b"q1")] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_shorten, _flip, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("suffix", ["arrow", "json"])
def test_a_damaged_cache_is_rebuilt(tmp_path, cache, damage, suffix):
    path = write(tmp_path / "a.jsonl", *numbered(3), {**GOOD, "q1": 1})
    expected = train_data(path)
    rows, notes = [expected[i] for i in range(4)], expected.notes
    (victim,) = cache.glob(f"*.{suffix}")
    whole = victim.read_bytes()
    # a copy is damaged and put in place: `expected` has the old file mapped
    copy = victim.with_suffix(".copy")
    copy.write_bytes(whole)
    damage(copy)
    victim.unlink()
    if copy.exists():
        copy.rename(victim)
    data = train_data(path)
    assert [data[i] for i in range(4)] == rows
    if damage is not _flip or suffix == "arrow":
        assert data.notes == notes
        assert victim.read_bytes() == whole


KILLED = """
import os, signal, sys
from ultrarag.rows import cache
from tests import forked
from tests.finetune.batches.planning import train_data
point = sys.argv[2]
def die(*args, **kw): os.kill(os.getpid(), signal.SIGKILL)
if point == "rows":
    original = cache._chunks
    def grouped(examples):
        for number, rows in enumerate(original(examples)):
            if number == 1: die()
            yield rows
    cache._chunks = grouped
    cache._CHUNK_ROWS = 2
elif point == "sync": cache._sync = die
elif point == "manifest": cache._write_manifest = die
train_data(sys.argv[1])
"""


@pytest.mark.parametrize("point", ["rows", "sync", "manifest"])
def test_a_killed_write_leaves_a_cache_that_works(tmp_path, cache, point):
    path = write(tmp_path / "a.jsonl", *numbered(9))
    killed = forked.run(["-c", KILLED, path, point])
    assert killed.returncode == -signal.SIGKILL
    assert any(cache.iterdir())
    assert not list(cache.glob("*.json"))
    data = train_data(path)
    assert [data[i].query for i in range(9)] == [f"q{i}" for i in range(9)]
    for left in cache.glob(".*.stage"):
        os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    train_data(write(tmp_path / "b.jsonl", GOOD))
    assert not list(cache.glob(".*.stage"))


def test_two_runs_may_build_the_same_cache_at_once(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", *numbered(3000))
    code = (
        "import sys; from tests.finetune.batches.planning import train_data; "
        "data = train_data(sys.argv[1]); print(len(data), data[2999].query)"
    )
    running = [forked.Popen(["-c", code, path]) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["3000 q2999\n"] * 3
    assert sorted(file.suffix for file in cache.iterdir()) == [".arrow", ".json"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=r"a\.jsonl': .*; name another directory with --cache_path"):
        train_data(path, cache_path=path)


def test_cache_path_is_where_the_cache_goes(tmp_path, cache):
    train_data(write(tmp_path / "a.jsonl", GOOD), cache_path=tmp_path / "here")
    assert list((tmp_path / "here").glob("*.arrow"))
    assert not cache.exists()


def test_no_torch_is_needed(tmp_path):
    path = write(tmp_path / "a.jsonl", *numbered(4))
    code = (
        "import sys; from tests.finetune.batches.planning import batch_plan, train_data; "
        "batch_plan(train_data(sys.argv[1]), 2).batch(0, 0, 0); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, path], timeout=60, check=True)
