"""Reading rows: every fault is named with file and line, as JSON lines, as a list, in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.finetune.batches.planning import train_data
from tests.rows.row_files import GOOD, write
from ultrarag.errors import DataError
from ultrarag.rows import files
from ultrarag.rows.files import find_files
from ultrarag.rows.reader import read_eval_rows, read_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The default cache, out of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "ultrarag" / "data"


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


@pytest.mark.parametrize("blank", [" \n", "\u200b\ufeff", "\u3164", "\u2028\u200e"])
def test_a_text_without_a_visible_character_is_empty(tmp_path, blank):
    for row, name in (({**GOOD, "query": blank}, "query"), ({**GOOD, "neg": ["n", blank]}, r"neg\[1\]")):
        with pytest.raises(DataError, match=f"'{name}' is empty"):
            read_rows([write(tmp_path / "rows.jsonl", row)])
    assert read_rows([write(tmp_path / "rows.jsonl", {**GOOD, "query": f"क्\u200d{blank}"})])


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
    data = train_data([one, two], on_bad_rows="drop")
    assert [data[i].source for i in range(len(data))] == [f"{one}:1", f"{two}:1", f"{two}:2"]
    assert f"1 of 2 rows of '{one}' cannot be used and are left out" in data.notes
    assert any(f"{one}:2: 'query' is empty" in note for note in data.notes)
    assert train_data([one, two], on_bad_rows="drop").notes == data.notes  # from the cache too
    with pytest.raises(DataError):
        train_data([one, two])  # what was dropped before is not forgiven now


def test_drop_does_not_accept_that_nothing_is_left(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"query": ""})
    with pytest.raises(DataError, match="1 of 1 rows"):
        train_data([path], on_bad_rows="drop")


def test_an_empty_file_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", "", "  ")
    with pytest.raises(DataError, match=r"rows\.jsonl' holds no rows"):
        read_rows([path])
    with pytest.raises(DataError, match="no training data was given"):
        find_files([])


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
    assert train_data(path)[1] == second


def test_teacher_needs_scores_in_every_row(tmp_path):
    scored = {**GOOD, "pos_scores": [1], "neg_scores": [0]}
    path = write(tmp_path / "rows.jsonl", scored, {**GOOD, "pos_scores": [1]}, GOOD)
    with pytest.raises(DataError) as caught:
        train_data(path, knowledge_distillation=True)
    assert f"{path}:2: 'neg_scores' is missing" in str(caught.value)
    assert f"{path}:3: 'pos_scores' is missing" in str(caught.value)
    assert len(train_data(path)) == 3


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_json_list_is_read_like_lines(tmp_path, monkeypatch, indent, bom):
    monkeypatch.setattr(files, "_CHUNK_BYTES", 7)  # so that rows, escapes and characters cross the chunks
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
    data = train_data(rows)
    assert "keys of rows that training does not use: 'titel' (2 rows)" in data.notes
    assert (data[1].neg, data[1].neg_scores) == (("n",), (1.0,))
    assert any("1 rows name a text as positive and as negative" in note and "<rows>:2" in note for note in data.notes)


def test_rows_in_memory(tmp_path):
    data = train_data([{"query": "q", "pos": ("p",)}, GOOD])
    assert [data[0].source, data[1].source] == ["<rows>:1", "<rows>:2"]
    with pytest.raises(DataError, match="<rows>:2: not a JSON object, but a list"):
        read_rows([GOOD, []])
    with pytest.raises(DataError, match="<rows>:1: 'query' holds half of a character"):
        train_data([{"query": "\ud83d", "pos": ["p"]}])


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
