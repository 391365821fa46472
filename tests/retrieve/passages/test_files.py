"""Files of passages and queries: what is read, and how what cannot be is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from ultrarag.errors import DataError
from ultrarag.retrieve.passages.files import passage_file, read_queries
from ultrarag.types import Passage


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_every_spelling_of_the_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl",
        {"_id": 7, "title": None, "text": "one", "metadata": None},
        "",
        {"id": "b/c", "contents": "二", "title": "T", "metadata": {"lang": ["zh"]}},
    )
    with passage_file(path) as source:
        assert (source.count, source.name) == (2, str(path))
        wanted = [Passage("7", "one"), Passage("b/c", "二", "T", {"lang": ["zh"]})]
        assert list(source) == wanted
        assert list(source) == wanted  # as often as one likes


def test_a_beir_folder_a_json_list_and_stdin(tmp_path: Path) -> None:
    row = {"_id": "1", "title": "", "text": "one"}
    write(tmp_path / "corpus.jsonl", row)
    listed = write(tmp_path / "list.json", [row])
    stdin = io.BytesIO(json.dumps(row).encode())
    for source in (tmp_path, listed, "-"):
        with passage_file(source, stdin) as found:
            assert list(found) == [Passage("1", "one")]
    assert found.name == "stdin"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("nope", r"not valid JSON: Expecting value"),
        ([1], r"list instead of a JSON object"),
        ({"text": "x"}, r"no 'id' \(known as id or _id\)"),
        ({"id": "2"}, r"no 'text' \(known as text or contents\)"),
        ({"id": "2", "txt": "x"}, r"unknown field 'txt'; did you mean 'text'"),
        ({"id": "2", "text": "x", "url": "u"}, r"unknown field 'url'; put what else you have into metadata"),
        ({"id": True, "text": "x"}, r"'id' is bool, not a string"),
        ({"id": "2", "text": 5}, r"'text' is int, not a string"),
        ({"id": "", "text": "x"}, r"non-empty"),
        ('{"id": "2", "text": "\\ud800"}', r"lone surrogate"),
        ('{"id": "2", "text": "x", "metadata": {"a": NaN}}', r"metadata"),
        ({"id": "2", "text": "x", "metadata": []}, r"'metadata' is list"),
        ({"id": "1", "text": "again"}, r"id '1' was used before, at .*x\.jsonl:1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: object, said: str) -> None:
    row = json.dumps(row) if isinstance(row, list) else row
    path = write(tmp_path / "x.jsonl", {"id": "1", "text": "fine"}, row)
    with pytest.raises(DataError, match=rf"(?s)1 of 2 row.*x\.jsonl:2: .*{said}"), passage_file(path):
        pass


def test_the_first_20_bad_lines_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *[{"id": str(n)} for n in range(25)], {"id": "z", "text": "fine"})
    with pytest.raises(DataError) as error, passage_file(path):
        pass
    lines = str(error.value).splitlines()
    assert lines[0] == "25 of 26 rows cannot be used; nothing was added:"
    assert (lines[1], lines[20], lines[21:]) == (
        f"{path}:1: no 'text' (known as text or contents)",
        f"{path}:20: no 'text' (known as text or contents)",
        ["... and 5 more"],
    )


def test_files_without_passages(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.jsonl").write_bytes(b'{"id": "1", "text": "\xff"}')
    for source, said in (
        (tmp_path / "none.jsonl", "cannot read"),
        (tmp_path / "empty", "no corpus.jsonl"),
        (tmp_path / "x.jsonl", "x.jsonl:1: not UTF-8"),
        (write(tmp_path / "blank.jsonl", ""), "holds no passages"),
    ):
        with pytest.raises(DataError, match=said), passage_file(source):
            pass


def test_queries_as_jsonl_or_with_tabs(tmp_path: Path) -> None:
    wanted = {"1": "what is milvus?", "二": "a\tb"}
    rows = [{"_id": 1, "text": "what is milvus?", "metadata": {}}, {"id": "二", "query": "a\tb"}]
    assert read_queries(write(tmp_path / "q.jsonl", *rows)) == wanted
    assert read_queries(write(tmp_path / "q.tsv", "1\twhat is milvus?", "二\ta\tb")) == wanted


@pytest.mark.parametrize("header", ["id\ttext", "query-id\tquery", "_id\tText", "qid\tquestion", "Query_ID\tQUERY"])
def test_a_header_of_queries_is_no_query(tmp_path: Path, header: str) -> None:
    assert read_queries(write(tmp_path / "q.tsv", header, "1\tquery")) == {"1": "query"}
    assert read_queries(write(tmp_path / "q.tsv", "1\tquery", header)) == {"1": "query", header[: header.find("\t")]: (
        header.partition("\t")[2])}  # fmt: skip
    with pytest.raises(DataError, match="holds no queries"):
        read_queries(write(tmp_path / "q.tsv", header))


@pytest.mark.parametrize("blank", ["", "  ", "\u200b"])
def test_blank_passages_of_a_file_are_left_out_and_counted(tmp_path: Path, blank: str) -> None:
    rows = [{"id": "a", "text": blank}, {"id": "b", "text": blank, "title": "T"}, {"id": "c", "text": "x"}]
    with passage_file(write(tmp_path / "p.jsonl", *rows)) as found:
        assert ([passage.id for passage in found], found.count, found.blank) == (["b", "c"], 2, 1)
    with (
        pytest.raises(DataError, match="holds no passages but 1 blank ones"),
        passage_file(write(tmp_path / "p.jsonl", rows[0])),
    ):
        pass


@pytest.mark.parametrize(
    ("row", "said"),
    [("no tab", "not valid JSON"), ("1\t ", "'text' is empty"), ("\tx", "'id' is empty"), ("q\tx", "was there before")],
)
def test_bad_queries_are_named(tmp_path: Path, row: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"q\.tsv:2: .*{said}"):
        read_queries(write(tmp_path / "q.tsv", "q\tfirst", row))


CHUNKS = [
    {"id": 7, "doc_id": "a", "title": "Seven", "contents": "one"},
    {"id": "7#2", "contents": "two"},
    {"id": "7", "contents": "three", "metadata": {"lang": "en"}},
    {"id": "7", "contents": "four"},
]


def test_rows_of_a_corpus_of_ultrarag_get_ids_of_their_own(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in CHUNKS))
    with passage_file(path, layout="ultrarag_v3") as source:
        found = list(source)
        assert [passage.id for passage in found] == ["7", "7#2", "7#3", "7#4"]
        assert [passage.content for passage in found] == ["one", "two", "three", "four"]
        assert [dict(passage.metadata) for passage in found[:3]] == [
            {"doc_id": "a", "title": "Seven"},
            {},
            {"lang": "en"},
        ]
        assert (source.count, source.renamed, source.example) == (4, 2, "7#3")
        assert list(source) == found


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"contents": "x"}, "no 'id'"),
        ({"id": True, "contents": "x"}, "'id' is bool"),
        ({"id": "1", "image_path": "x.png"}, "no 'text' \\(known as text or contents\\)"),
        ({"id": "1", "contents": "x", "metadata": 1}, "'metadata' is int"),
    ],
)
def test_a_bad_row_of_such_a_corpus_is_refused(tmp_path, row, said):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=said), passage_file(path, layout="ultrarag_v3"):
        pass
