"""Reading rows: every fault is named with file and line, nothing is passed over, the cache is right or rebuilt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ultrarag.errors import DataError, UsageError
from ultrarag.finetune import json_rows
from ultrarag.finetune.data import TrainData
from ultrarag.finetune.rows import read_eval_rows, read_rows

GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The default cache, out of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "ultrarag" / "data"


def write(path: Path, *rows: object) -> str:
    """Write rows as JSON lines; str and bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def numbered(count: int, name: str = "", **more: object) -> list[dict[str, object]]:
    return [{"query": f"{name}q{i}", "pos": [f"{name}p{i}"], "neg": [f"{name}n{i}"], **more} for i in range(count)]


# ---- reasons


REASONS = {
    "not JSON": ('{"query": "q",', "not valid JSON: Expecting property name"),
    "trailing": ('{"query": "q", "pos": ["p"]} {}', "not valid JSON: Extra data (column 30)"),
    "python's None": ('{"query": None, "pos": ["p"]}', "not valid JSON: Expecting value (column 11)"),
    "too deep": ("[" * 100_000, "not valid JSON"),
    "list": ("[1]", "not a JSON object, but a list"),
    "text": ('"q"', "not a JSON object, but text"),
    "no query": ({"pos": ["p"]}, "'query' is missing"),
    "null query": ({"query": None, "pos": ["p"]}, "'query' must be text, not null"),
    "empty query": ({"query": " \n", "pos": ["p"]}, "'query' is empty"),
    "number query": ({"query": 3, "pos": ["p"]}, "'query' must be text, not the number 3"),
    "no pos": ({"query": "q"}, "'pos' is missing"),
    "empty pos": ({"query": "q", "pos": []}, "'pos' is empty"),
    "text pos": ({"query": "q", "pos": "p"}, "'pos' must be a list, not text; write it in brackets"),
    "empty positive": ({"query": "q", "pos": ["p", ""]}, "'pos[1]' is empty"),
    "null positive": ({"query": "q", "pos": [None]}, "'pos[0]' must be text, not null"),
    "object neg": ({**GOOD, "neg": {}}, "'neg' must be a list, not an object"),
    "boolean negative": ({**GOOD, "neg": ["n", "n", True]}, "'neg[2]' must be text, not true"),
    "surrogate": ('{"query": "\\ud83d", "pos": ["p"]}', "'query' holds half of a character"),
    "not UTF-8": (b'{"query": "q", "pos": ["caf\xe9"]}', "'pos[0]' holds half of a character"),
    "short scores": ({**GOOD, "pos_scores": [1, 2]}, "'pos_scores' has 2 numbers for 1 texts in 'pos'"),
    "scores without neg": (
        {"query": "q", "pos": ["p"], "neg_scores": [1]},
        "'neg_scores' has 1 numbers for 0 texts in 'neg'",
    ),
    "text score": ({**GOOD, "neg_scores": ["1"]}, "'neg_scores[0]' must be a number, not text"),
    "boolean score": ({**GOOD, "neg_scores": [True]}, "'neg_scores[0]' must be a number, not true"),
    "NaN": ('{"query": "q", "pos": ["p"], "pos_scores": [NaN]}', "'pos_scores[0]' must be a finite number, not nan"),
    "infinity": (
        '{"query": "q", "pos": ["p"], "pos_scores": [1e999]}',
        "'pos_scores[0]' must be a finite number, not inf",
    ),
    "type": ({**GOOD, "type": "symetric_sts"}, "did you mean 'symmetric_sts'?"),
    "batch_size": ({**GOOD, "batch_size": 0}, "'batch_size' is 0; it must be a whole number above 0"),
    "group size": (
        {**GOOD, "train_group_size": 2.5},
        "'train_group_size' must be a whole number above 0, not the number 2.5",
    ),
    "prompt": ({**GOOD, "prompt": 1}, "'prompt' must be text, not the number 1"),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_bad_row_is_named_with_file_line_and_reason(tmp_path, name):
    row, reason = REASONS[name]
    path = write(tmp_path / "rows.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(DataError) as caught:
        read_rows([path])
    assert f"{path}:3: " in str(caught.value)
    assert reason in str(caught.value)
    assert str(caught.value).startswith("1 of 3 rows cannot be used")


def test_all_faults_of_a_row_are_named_at_once(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, {"query": "", "pos": [], "neg": [1]})
    with pytest.raises(DataError, match=r"'query' is empty; 'pos' is empty; 'neg\[0\]' must be text"):
        read_rows([path])


def test_twenty_bad_rows_are_shown_and_the_rest_counted(tmp_path):
    path = write(tmp_path / "rows.jsonl", *[{"query": ""}] * 25, GOOD)
    with pytest.raises(DataError) as caught:
        read_rows([path])
    assert f"{path}:20: " in str(caught.value)
    assert f"{path}:21: " not in str(caught.value)
    assert "and 5 more" in str(caught.value)


def test_drop_leaves_bad_rows_out_and_counts_them_per_file(tmp_path):
    one = write(tmp_path / "one.jsonl", GOOD, {"query": ""})
    two = write(tmp_path / "two.jsonl", GOOD, GOOD)
    data = TrainData.load([one, two], on_bad_rows="drop")
    assert [data[i].source for i in range(len(data))] == [f"{one}:1", f"{two}:1", f"{two}:2"]
    assert f"1 of 2 rows of '{one}' cannot be used and are left out" in data.notes
    assert any(f"{one}:2: 'query' is empty" in note for note in data.notes)
    assert TrainData.load([one, two], on_bad_rows="drop").notes == data.notes  # from the cache too
    with pytest.raises(DataError):
        TrainData.load([one, two])  # what was dropped before is not forgiven now


def test_drop_does_not_accept_that_nothing_is_left(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"query": ""})
    with pytest.raises(DataError, match="1 of 1 rows"):
        TrainData.load([path], on_bad_rows="drop")


def test_an_empty_file_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", "", "  ")
    with pytest.raises(DataError, match=r"rows\.jsonl' holds no rows"):
        read_rows([path])
    with pytest.raises(DataError, match="no training data was given"):
        TrainData.from_rows([])


def test_settings_of_a_file_must_agree(tmp_path):
    path = write(tmp_path / "rows.jsonl", {**GOOD, "type": "normal", "batch_size": 4}, GOOD, {**GOOD, "batch_size": 8})
    with pytest.raises(DataError, match=rf"{path}:3: 'batch_size' is 8, but 4 at {path}:1"):
        read_rows([path])


# ---- what is read


def test_null_and_missing_fields_are_absent_and_numbers_align(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        {"query": "a", "pos": ["p"], "neg": None, "prompt": None, "type": None, "id": 3},
        {"query": "b", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [1], "neg_scores": [2.5, 3], "id": "x"},
    )
    first, second = read_rows([path])
    assert (first.neg, first.prompt, first.pos_scores, first.type) == ((), None, None, "normal")
    assert (second.pos_scores, second.neg_scores) == ((1.0,), (2.5, 3.0))
    assert TrainData.load(path)[1] == second


def test_teacher_needs_scores_in_every_row(tmp_path):
    scored = {**GOOD, "pos_scores": [1], "neg_scores": [0]}
    path = write(tmp_path / "rows.jsonl", scored, {**GOOD, "pos_scores": [1]}, GOOD)
    with pytest.raises(DataError) as caught:
        TrainData.load(path, teacher=True)
    assert f"{path}:2: 'neg_scores' is missing" in str(caught.value)
    assert f"{path}:3: 'pos_scores' is missing" in str(caught.value)
    assert len(TrainData.load(path)) == 3


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_json_list_is_read_like_lines(tmp_path, monkeypatch, indent, bom):
    monkeypatch.setattr(json_rows, "_PIECE", 7)  # so that rows, escapes and characters cross the pieces
    rows = [{"query": f'ä {i} " ] \\', "pos": ["😀" * i]} for i in range(1, 30)]
    path = tmp_path / "rows.json"
    path.write_bytes(bom + b" \n" + json.dumps(rows, indent=indent, ensure_ascii=bool(bom)).encode())
    read = read_rows([path])
    assert [(row.query, list(row.pos)) for row in read] == [(row["query"], row["pos"]) for row in rows]
    assert [row.source for row in read][:2] == [f"{path}:row 1", f"{path}:row 2"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"query": "q", "pos": ["p"]}, {"query": "", "pos": ["p"]}]', "row 2: 'query' is empty"),
        ('[{"query": "q", "pos": ["p"]}, {"query": }]', "row 2: not valid JSON"),
        ('[{"query": "q", "pos": ["p"]} {}]', "row 2: not valid JSON: expected ',' or ']', found '{'"),
        ('[{"query": "q", "pos": ["p"]}', "row 2: the file ends before the list does"),
        ('[{"query": "q", "pos": ["p"]}] x', "row 2: text after the end of the list"),
        ("[]", "holds no rows"),
    ],
)
def test_a_bad_json_list_is_named_with_its_row(tmp_path, text, reason):
    path = write(tmp_path / "rows.json", text)
    with pytest.raises(DataError) as caught:
        read_rows([path])
    assert reason in str(caught.value)


def test_a_broken_list_is_never_cut_short_silently(tmp_path):
    path = write(tmp_path / "rows.json", '[{"query": "q", "pos": ["p"]}, {"query": }, {"query": "lost", "pos": ["p"]}]')
    with pytest.raises(DataError, match="the rest of the list cannot be read"):
        read_rows([path], on_bad_rows="drop")


@pytest.mark.parametrize(
    ("head", "reason"), [(b"\x1f\x8b\x08\x00", "gzip"), (b"PAR1", "Parquet"), (b"\xff\xfe{\x00", "UTF-16")]
)
def test_other_formats_are_named(tmp_path, head, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(head)
    with pytest.raises(DataError, match=reason):
        read_rows([path])


def test_windows_line_ends_and_a_missing_last_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"query": "a", "pos": ["p"]}\r\n\r\n{"query": "b", "pos": ["p"]}')
    assert [row.source for row in read_rows([path])] == [f"{path}:1", f"{path}:3"]


def test_unused_keys_and_contradictions_are_counted(tmp_path):
    rows = [{**GOOD, "titel": "x"}, {"query": "q", "pos": ["p"], "neg": ["n", "p"], "neg_scores": [1, 2], "titel": 1}]
    data = TrainData.from_rows(rows)
    assert "keys of rows that training does not use: 'titel' (2 rows)" in data.notes
    assert (data[1].neg, data[1].neg_scores) == (("n",), (1.0,))
    assert any("1 rows name a text as positive and as negative" in note and "<rows>:2" in note for note in data.notes)


def test_rows_in_memory(tmp_path):
    data = TrainData.from_rows([{"query": "q", "pos": ("p",)}, GOOD])
    assert [data[0].source, data[1].source] == ["<rows>:1", "<rows>:2"]
    with pytest.raises(DataError, match="<rows>:2: not a JSON object, but a list"):
        TrainData.from_rows([GOOD, []])
    with pytest.raises(DataError, match="<rows>:1: 'query' holds half of a character"):
        TrainData.from_rows([{"query": "\ud83d", "pos": ["p"]}])


# ---- directories


def test_directories_are_read_in_order_of_names_and_all_suffixes(tmp_path, monkeypatch):
    for name in ("b.JSONL", "a.txt", "c.json", "A.jsonl"):
        write(tmp_path / "d" / name, {"query": name, "pos": ["p"]})
    (tmp_path / "d" / "qrels").mkdir()
    (tmp_path / "d" / "README.md").write_text("x")
    listed = sorted(os.listdir(tmp_path / "d"), reverse=True)
    monkeypatch.setattr(os, "listdir", lambda path: list(listed))
    data = TrainData.load(f"{tmp_path}/d/")
    assert [data[i].query for i in range(4)] == ["A.jsonl", "a.txt", "b.JSONL", "c.json"]
    assert [dataset.name for dataset in data.datasets] == ["A", "a", "b", "c"]
    assert any("2 entries" in note and "'README.md', 'qrels/'" in note for note in data.notes)


def test_data_that_cannot_be_read_is_not_passed_over(tmp_path):
    write(tmp_path / "d" / "a.jsonl", GOOD)
    write(tmp_path / "d" / "b.jsonl.gz", "x")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz' looks like data"):
        TrainData.load(tmp_path / "d")


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"no file ending in \.jsonl.*'notes\.md'"):
        TrainData.load(tmp_path / "empty")
    with pytest.raises(DataError, match="does not exist"):
        TrainData.load(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="neither a file nor a directory"):
        TrainData.load("/dev/null")


def test_a_file_given_twice_is_said(tmp_path):
    path = write(tmp_path / "d" / "a.jsonl", GOOD)
    data = TrainData.load([path, tmp_path / "d"])
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
    (dataset,) = TrainData.load(given).datasets
    assert not dataset.in_batch_negatives


def test_an_argument_switches_in_batch_negatives_off(tmp_path):
    write(tmp_path / "d" / "one.jsonl", GOOD)
    write(tmp_path / "d" / "two.jsonl", GOOD)
    three = write(tmp_path / "three.json", GOOD)

    def on(*names: str) -> list[bool]:
        data = TrainData.load([tmp_path / "d", three], no_in_batch_neg=names)
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
    data = TrainData.load([tmp_path / "d", tmp_path / "e", alone], same_dataset_within_batch=True, **settings)
    assert [(item.name, item.stop - item.start) for item in data.datasets] == [("b", 10), ("d", 5)]
    assert [data[i].query for i in range(10, 15)] == ["aq0", "aq1", "aq2", "cq0", "cq1"]
    assert list(data.negatives) == [1] * 15
    notes = "\n".join(data.notes)
    assert "2 small files" in notes
    assert "2 rows are not trained on, fewer than drop_threshold 3: 'x' (1), 'y' (1)" in notes
    assert "1 rows are not trained on, fewer than small_threshold 5: 'alone' (1)" in notes
    assert len(TrainData.load([tmp_path / "d", tmp_path / "e", alone], **settings)) == 18  # as the peer: one mode only


def test_small_files_of_different_kinds_are_not_merged(tmp_path):
    write(tmp_path / "d" / "a.jsonl", *numbered(2, type="only_1neg"))
    write(tmp_path / "d" / "b.jsonl", *numbered(2))
    data = TrainData.load(tmp_path / "d", same_dataset_within_batch=True, small_threshold=5)
    assert [(item.name, item.type) for item in data.datasets] == [("a", "only_1neg"), ("b", "normal")]


def test_nothing_left_after_thresholds_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no rows are left.*small_threshold"):
        TrainData.load(path, same_dataset_within_batch=True, small_threshold=5)


def test_a_choice_of_rows_is_a_function_of_the_seed(tmp_path):
    write(tmp_path / "d" / "a.jsonl", *numbered(50, "a"))
    write(tmp_path / "d" / "b.jsonl", *numbered(5, "b"))

    def queries(seed: int) -> list[str]:
        data = TrainData.load(tmp_path / "d", max_example_num_per_dataset=10, seed=seed)
        assert any("10 of 50 rows" in note for note in data.notes)
        return [data[i].query for i in range(len(data))]

    assert queries(1) == queries(1)
    assert queries(1) != queries(2)
    assert len(set(queries(1))) == 15


# ---- the cache


def test_the_cache_is_used_and_is_keyed_by_content(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", *numbered(3))
    first = TrainData.load(path)
    made = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert sorted(name.split(".")[-1] for name in made) == ["arrow", "json"]
    again = TrainData.load(path)
    assert {file.name: file.stat().st_mtime_ns for file in cache.iterdir()} == made
    assert [again[i] for i in range(3)] == [first[i] for i in range(3)]
    os.utime(path, (1, 1))
    write(tmp_path / "a.jsonl", *numbered(3, "other"))
    changed = TrainData.load(path)
    assert changed[0].query == "otherq0"
    assert changed.digest != first.digest


def test_the_digest_is_of_content_not_of_names(tmp_path):
    one, two = write(tmp_path / "a.jsonl", *numbered(3)), write(tmp_path / "b.jsonl", *numbered(3))
    assert TrainData.load(one).digest == TrainData.load(two).digest
    assert TrainData.load(two)[0].source == f"{two}:1"
    assert TrainData.from_rows(numbered(3)).digest == TrainData.from_rows(numbered(3)).digest
    assert TrainData.from_rows(numbered(3)).digest != TrainData.from_rows(numbered(4)).digest


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
    expected = TrainData.load(path)
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
    data = TrainData.load(path)
    assert [data[i] for i in range(4)] == rows
    if damage is not _flip or suffix == "arrow":
        assert data.notes == notes
        assert victim.read_bytes() == whole


KILLED = """
import os, signal, sys
from ultrarag.finetune import arrow_rows, row_cache
from ultrarag.finetune.data import TrainData
point = sys.argv[2]
def die(*args, **kw): os.kill(os.getpid(), signal.SIGKILL)
if point == "rows":
    original = arrow_rows._grouped
    def grouped(examples):
        for number, rows in enumerate(original(examples)):
            if number == 1: die()
            yield rows
    arrow_rows._grouped = grouped
    arrow_rows._ROWS = 2
elif point == "sync": row_cache._sync = die
elif point == "manifest": row_cache._write_manifest = die
TrainData.load(sys.argv[1])
"""


@pytest.mark.parametrize("point", ["rows", "sync", "manifest"])
def test_a_killed_write_leaves_a_cache_that_works(tmp_path, cache, point):
    path = write(tmp_path / "a.jsonl", *numbered(9))
    killed = subprocess.run([sys.executable, "-c", KILLED, path, point], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert any(cache.iterdir())
    assert not list(cache.glob("*.json"))
    data = TrainData.load(path)
    assert [data[i].query for i in range(9)] == [f"q{i}" for i in range(9)]
    for left in cache.glob(".*.stage"):
        os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    TrainData.load(write(tmp_path / "b.jsonl", GOOD))
    assert not list(cache.glob(".*.stage"))


def test_two_runs_may_build_the_same_cache_at_once(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", *numbered(3000))
    code = (
        "import sys; from ultrarag.finetune.data import TrainData; "
        "data = TrainData.load(sys.argv[1]); print(len(data), data[2999].query)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [process.communicate(timeout=60)[0] for process in running] == ["3000 q2999\n"] * 3
    assert sorted(file.suffix for file in cache.iterdir()) == [".arrow", ".json"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=r"a\.jsonl': .*; name another directory with --cache_path"):
        TrainData.load(path, cache_path=path)


def test_cache_path_is_where_the_cache_goes(tmp_path, cache):
    TrainData.load(write(tmp_path / "a.jsonl", GOOD), cache_path=tmp_path / "here")
    assert list((tmp_path / "here").glob("*.arrow"))
    assert not cache.exists()


def test_no_torch_is_needed(tmp_path):
    path = write(tmp_path / "a.jsonl", *numbered(4))
    code = (
        "import sys; from ultrarag.finetune.batches import BatchPlan; from ultrarag.finetune.data import TrainData; "
        "BatchPlan(TrainData.load(sys.argv[1]), 2).batch(0, 0, 0); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, path], timeout=60, check=True)


# ---- evaluation rows


def test_eval_rows_become_a_retrieval_task(tmp_path):
    path = write(
        tmp_path / "dev.jsonl",
        {"query": "a", "pos": ["x", "y"], "neg": ["z"]},
        {"query": "b", "pos": ["z"], "neg": ["x"]},
        {"query": "a", "pos": ["w"]},
    )
    corpus, queries, qrels = read_eval_rows([path])
    assert sorted(corpus.values()) == ["w", "x", "y", "z"]
    assert sorted(queries.values()) == ["a", "b"]
    judged = {queries[q]: {corpus[p]: value for p, value in found.items()} for q, found in qrels.items()}
    assert judged == {"a": {"x": 1, "y": 1, "w": 1}, "b": {"z": 1}}
    assert read_eval_rows([{"query": "a", "pos": ["x"]}])[1] == {"q0": "a"}
    with pytest.raises(DataError, match=r"dev\.jsonl:4"):
        read_eval_rows([write(tmp_path / "dev.jsonl", GOOD, GOOD, GOOD, {"query": ""})])
