"""Conversions: both ways round gives the same rows again; what cannot be converted is named or counted."""

from __future__ import annotations

import pytest

from tests.data.files import read, write
from ultrarag.data import convert
from ultrarag.errors import DataError, UsageError
from ultrarag.evaluation.formats import read_beir, write_beir
from ultrarag.types import Passage

ROWS = [
    {"query": "what is bread?", "pos": ["dough, baked", "a food\nof flour"], "neg": ["water", '"steel", hot']},
    {"query": "面包是什么", "pos": ["面粉做的食物"], "neg": ["水"]},
]
SCORED = [
    {"query": "q1", "pos": ["a"], "pos_scores": [0.9], "neg": ["b", "c"], "neg_scores": [0.2, 0.1]},
    {"query": "q2", "pos": ["d", "e"], "pos_scores": [0.8, 0.7]},
]


def round_trip(tmp_path, rows, middle, back, **to):
    path = write(tmp_path / "in.jsonl", *rows)
    report = convert(path, tmp_path / middle, source_format="rows", **to)
    convert(tmp_path / middle, tmp_path / "back.jsonl", source_format=back)
    return read(tmp_path / "back.jsonl"), report


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.jsonl"])
@pytest.mark.parametrize(("layout", "rows"), [("triplet", ROWS), ("scored", SCORED)])
def test_columns_and_back(tmp_path, name, layout, rows):
    found, _ = round_trip(tmp_path, rows, name, "columns", target_format="columns", layout=layout)
    assert found == rows


def test_pairs_and_n_tuples(tmp_path):
    path = write(tmp_path / "in.jsonl", *ROWS)
    convert(path, tmp_path / "pairs.jsonl", source_format="rows", target_format="columns", layout="pair")
    assert read(tmp_path / "pairs.jsonl")[1] == {"anchor": "what is bread?", "positive": "a food\nof flour"}
    options = {"target_format": "columns", "layout": "n-tuple", "negatives": 2}
    report = convert(path, tmp_path / "n.jsonl", source_format="rows", **options)
    assert list(read(tmp_path / "n.jsonl")[0]) == ["anchor", "positive", "negative_1", "negative_2"]
    assert report.left_out == {"rows without enough negatives": 1}
    convert(tmp_path / "n.jsonl", tmp_path / "back.jsonl", source_format="columns")
    assert read(tmp_path / "back.jsonl") == ROWS[:1]


def test_columns_are_named_or_an_error_says_how(tmp_path):
    path = write(tmp_path / "in.csv", "frage,antwort,falsch", "q,a,b")
    with pytest.raises(DataError, match=r"which of the columns frage, antwort, falsch.*--columns"):
        convert(path, tmp_path / "out.jsonl")
    convert(path, tmp_path / "out.jsonl", columns=("frage", "antwort", "falsch"))
    assert read(tmp_path / "out.jsonl") == [{"query": "q", "pos": ["a"], "neg": ["b"]}]


@pytest.mark.parametrize(
    ("line", "options", "expected"),
    [
        (
            {"question": "q", "answer": ["a", "b", "c"], "labels": [1, 0, 0]},
            {"columns": ("question", "answer")},
            {"query": "q", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [1], "neg_scores": [0, 0]},
        ),
        (
            {"query": "q", "passage": ["a", "b"], "scores": [0.2, 0.9]},
            {},
            {"query": "q", "pos": ["b"], "neg": ["a"], "pos_scores": [0.9], "neg_scores": [0.2]},
        ),
        (
            {"query": "q", "document": ["a", "b"], "label": [False, True], "negative": "c"},
            {},
            {"query": "q", "pos": ["b"], "neg": ["a", "c"]},
        ),
        (
            {"anchor": "q", "positive": "a", "negative_1": "b", "negative_2": "c", "score": [3.0, 1.0, 0.5]},
            {},
            {"query": "q", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [3.0], "neg_scores": [1.0, 0.5]},
        ),
    ],
)
def test_labels_and_scores_split_a_list(tmp_path, line, options, expected):
    report = convert(write(tmp_path / "in.jsonl", line), tmp_path / "out.jsonl", source_format="columns", **options)
    assert read(tmp_path / "out.jsonl") == [expected]
    assert report.left_out == {}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"labels": [1, 0]}, "'labels' has 2 numbers for 3 texts"),
        ({"labels": [1, 0, "no"]}, "'labels' is .* not a number or a list of numbers"),
        ({"is_selected": [0, 1, 0]}, "'is_selected' has a number from 0 to 1 for each text of 'answer'"),
    ],
)
def test_labels_that_split_nothing_are_named(tmp_path, more, said):
    path = write(tmp_path / "in.jsonl", {"question": "q", "answer": ["a", "b", "c"], **more})
    with pytest.raises(DataError, match=said):
        convert(path, tmp_path / "out.jsonl", source_format="columns")


def test_labels_of_rag_retrieval_split_a_list_too(tmp_path):
    path = write(tmp_path / "in.jsonl", {"query": "q", "pos": ["a", "b"], "labels": [1, 0], "url": "x"})
    report = convert(path, tmp_path / "out.jsonl", source_format="rag-retrieval")
    assert (read(tmp_path / "out.jsonl")[0]["pos"], read(tmp_path / "out.jsonl")[0]["neg"]) == (["a"], ["b"])
    assert report.left_out == {"values of 'url', which is not read": 1}


def test_what_is_not_read_or_has_no_place_is_named_and_counted(tmp_path):
    lines = [
        {"query": "q", "positive": "a", "answer": "b", "url": "x", "negative_ids": ["n"]},
        {"query": "r", "positive": "a", "negative": "c", "score": 0.2, "url": "y"},
        {"query": "s", "positive": "a", "url": None},
    ]
    report = convert(write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl", source_format="columns")
    counted = {"url": 2, "answer": 1, "negative_ids": 1, "score": 1}
    assert report.left_out == {f"values of '{name}', which is not read": count for name, count in counted.items()}
    assert "left out: 2 values of 'url', which is not read" in str(report)
    path = write(tmp_path / "rows.jsonl", {**ROWS[0], "id": 7, "pos_scores": [1, 1], "neg_scores": [0, 0]})
    for to, lost in (("beir", ["id", "pos_scores", "neg_scores"]), ("rag-retrieval", ["id"])):
        report = convert(path, tmp_path / to, source_format="rows", target_format=to)
        assert report.left_out == {f"values of '{name}', for which {to} has no place": 1 for name in lost}


def test_every_line_has_its_own_columns(tmp_path):
    lines = [
        {"query": "q", "positive": "a"},
        {"query": "r", "positive": "b", "negative": "c"},
        {"question": "s", "answer": "d", "negative_1": "e", "negative_2": "f"},
        {"query": "t", "positive": ["g", "h"], "labels": [1, 0]},
        {"query": "t", "positive": "i"},
    ]
    report = convert(write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl", source_format="columns")
    assert read(tmp_path / "out.jsonl") == [
        {"query": "q", "pos": ["a"]},
        {"query": "r", "pos": ["b"], "neg": ["c"]},
        {"query": "s", "pos": ["d"], "neg": ["e", "f"]},
        {"query": "t", "pos": ["g", "i"], "neg": ["h"]},
    ]
    assert report.left_out == {}
    given = {"source_format": "columns", "columns": ("query", "positive", "negative"), "overwrite": True}
    convert(write(tmp_path / "in.jsonl", *lines[:2]), tmp_path / "out.jsonl", **given)
    assert read(tmp_path / "out.jsonl")[1]["neg"] == ["c"]
    with pytest.raises(DataError, match="no line up to here has the column 'negative'"):
        convert(write(tmp_path / "in.jsonl", lines[0]), tmp_path / "out.jsonl", **given)


def test_lines_of_rag_retrieval_may_be_of_every_kind(tmp_path):
    lines = [
        {"query": "q", "pos": ["a"], "neg": ["b"]},
        {"query": "r", "content": "c", "label": 1},
        {"query": "r", "content": "d", "label": 0},
        {"query": "s", "hits": [{"content": "e", "label": 1}]},
    ]
    convert(write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl", source_format="rag-retrieval")
    assert [(row["pos"], row.get("neg")) for row in read(tmp_path / "out.jsonl")] == [
        (["a"], ["b"]),
        (["c"], ["d"]),
        (["e"], None),
    ]


@pytest.mark.parametrize(("name", "mark"), [("in.tsv", "\t"), ("in.csv", ",")])
def test_a_table_without_a_header(tmp_path, caplog, name, mark):
    path = write(tmp_path / name, *(mark.join(line) for line in (("q", "a", "1"), ("q", "b", "0"), ("r", "c", "1.0"))))
    convert(path, tmp_path / "out.jsonl")
    assert [(row["query"], row["pos"], row.get("neg")) for row in read(tmp_path / "out.jsonl")] == [
        ("q", ["a"], ["b"]),
        ("r", ["c"], None),
    ]
    assert "there is no header; the columns are read as query, passage, label" in caplog.text
    with pytest.raises(DataError, match="a table without a header needs one"):
        convert(write(tmp_path / name, mark.join(("q", "a")), mark.join(("r", "b"))), tmp_path / "2.jsonl")
    with pytest.raises(DataError, match="the header names 'positive' twice"):
        convert(write(tmp_path / name, mark.join(("query", "positive", "positive"))), tmp_path / "2.jsonl")


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.jsonl"])
def test_a_file_without_a_line_is_an_error_and_is_not_left(tmp_path, name):
    path = write(tmp_path / "in.csv", "query,positive", "q,a", "r,b")
    for layout in ({}, {"layout": "n-tuple", "negatives": 2}):
        with pytest.raises(DataError, match="none of the 2 rows has the negatives that a line of the layout"):
            convert(path, tmp_path / name, target_format="columns", **layout)
    report = convert(path, tmp_path / name, target_format="columns", layout="pair")  # nothing is in the way
    assert report.files[str(tmp_path / name)] == 2 + (not name.endswith("jsonl"))
    scored = write(tmp_path / "scored.csv", "query,passage,score", "q,a,0.1")
    with pytest.raises(DataError, match=r"there is no row in .*\(1 queries without a positive\)"):
        convert(scored, tmp_path / "2.jsonl")


@pytest.mark.parametrize("blank", ["", " \n", "\u200b"])
def test_a_beir_folder_in_the_spellings_of_others_and_with_blank_passages(tmp_path, blank):
    corpus = [{"id": "1", "contents": "baked"}, {"id": "2", "text": blank}, {"_id": "3", "text": blank, "title": "Hot"}]
    write(tmp_path / "beir" / "corpus.jsonl", *corpus)
    write(tmp_path / "beir" / "queries.jsonl", {"id": 7, "query": "what?"}, {"id": 8, "text": "void?"})
    (tmp_path / "beir" / "qrels").mkdir()
    write(tmp_path / "beir" / "qrels" / "train.tsv", "7\t1\t1.0", "7\t2\t1", "7\t3\t0", "8\t2\t1")
    report = convert(tmp_path / "beir", tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [{"query": "what?", "pos": ["baked"], "neg": [f"Hot\n{blank}"], "id": "7"}]
    assert report.left_out == {"judgements of blank passages": 2, "queries without a relevant passage": 1}


def test_ids_that_name_documents_are_kept_for_the_split(tmp_path):
    corpus = [Passage("book#1", "baked"), Passage("book#2", "wet"), Passage("3", "hot")]
    splits = {"train": {"q1": {"book#2": 0, "book#1": 1}, "q2": {"3": 1}}}
    write_beir(tmp_path / "beir", corpus, {"q1": "what?", "q2": "who?"}, splits)
    convert(tmp_path / "beir", tmp_path / "out.jsonl")
    assert [row.get("pos_ids") for row in read(tmp_path / "out.jsonl")] == [["book#1"], None]


def test_a_short_line_of_a_table_is_named(tmp_path):
    path = write(tmp_path / "in.csv", "query,positive", "q,a", "q2")
    with pytest.raises(DataError, match=r"in\.csv:3: not 2 fields"):
        convert(path, tmp_path / "out.jsonl")


def test_beir_to_rows(tmp_path):
    corpus = [Passage("1", "baked", "Bread"), Passage("2", "wet"), Passage("3", "hot")]
    splits = {"train": {"q1": {"1": 2, "2": 0}, "q2": {"3": -1}}}
    write_beir(tmp_path / "beir", corpus, {"q1": "what?", "q2": "who?", "q3": "never judged"}, splits)
    report = convert(tmp_path / "beir", tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [{"query": "what?", "pos": ["Bread\nbaked"], "neg": ["wet"], "id": "q1"}]
    assert report.left_out == {"queries without a relevant passage": 1}


def test_rows_to_beir_and_back(tmp_path):
    again = {"query": "what is bread?", "pos": ["dough, baked", "another"]}
    path = write(tmp_path / "in.jsonl", *ROWS, again)
    report = convert(path, tmp_path / "beir", source_format="rows", target_format="beir", split="test")
    found = read_beir(tmp_path / "beir", "test")
    assert len(found.corpus) == 7  # equal texts are one passage
    assert len(found.queries) == 2
    assert report.files[str(tmp_path / "beir" / "qrels" / "test.tsv")] == 5  # a header, and four judgements
    convert(tmp_path / "beir", tmp_path / "back.jsonl", split="test")
    assert [row["pos"] for row in read(tmp_path / "back.jsonl")] == [[*ROWS[0]["pos"], "another"], ROWS[1]["pos"]]


def test_rag_retrieval(tmp_path):
    found, _ = round_trip(tmp_path, SCORED[:1], "rr.jsonl", "rag-retrieval", target_format="rag-retrieval")
    assert found == SCORED[:1]
    points = [{"query": "q", "content": text, "label": label} for text, label in (("a", 2), ("b", 0), ("c", 1))]
    groups = {"query": "q", "hits": [{"content": point["content"], "label": point["label"]} for point in points]}
    graded = {"query": "q", "pos": ["a", "b", "c"], "scores": [2, 0, 1]}
    expected = [{"query": "q", "pos": ["a", "c"], "neg": ["b"], "pos_scores": [2, 1], "neg_scores": [0]}]
    for name, lines in (("points", points), ("groups", [groups]), ("graded", [graded])):
        path = write(tmp_path / f"{name}.jsonl", *lines)
        convert(path, tmp_path / f"{name}.out", source_format="rag-retrieval", threshold=1)
        assert read(tmp_path / f"{name}.out") == expected


def test_a_stopped_conversion_goes_on_and_knows_the_passages_before(tmp_path, monkeypatch):
    from ultrarag.data import converting

    rows = [{"query": f"q{i}", "pos": ["shared", f"p{i}"]} for i in range(6)]
    path = write(tmp_path / "in.jsonl", *rows)

    def stop(out, lines, written, real=converting._write):
        if out.done == 3:
            raise KeyboardInterrupt
        real(out, lines, written)

    options = {"source_format": "rows", "target_format": "beir"}
    monkeypatch.setattr(converting, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "beir", **options)
    monkeypatch.undo()
    report = convert(path, tmp_path / "beir", **options)
    assert len(read_beir(tmp_path / "beir", "train").corpus) == 7
    assert list(report.files.values()) == [7, 6, 13]


def test_a_run_killed_when_it_had_published_is_done_by_the_same_call(tmp_path, killed_when_published):
    path, out = write(tmp_path / "in.jsonl", *ROWS), tmp_path / "beir"
    killed_when_published(lambda: convert(path, out, target_format="beir", source_format="rows"))
    before = {file: file.read_bytes() for file in out.rglob("*.*") if ".part" not in file.name}
    report = convert(path, out, target_format="beir", source_format="rows")
    assert {file: file.read_bytes() for file in out.rglob("*.*")} == before
    assert report.rows == len(ROWS)
    assert all(report.files.values())


def test_what_cannot_be_told_is_asked_for(tmp_path):
    path = write(tmp_path / "in.jsonl", *ROWS)
    with pytest.raises(UsageError, match=r"--from, one of rows, beir"):
        convert(path, tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match="both rows"):
        convert(path, tmp_path / "out.jsonl", source_format="rows")
    with pytest.raises(UsageError, match="did you mean 'columns'"):
        convert(path, tmp_path / "out.jsonl", source_format="column")
