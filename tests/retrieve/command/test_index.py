"""`ultrarag index`: every command, its exit status, and what it says."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ultrarag.cli import main as ultrarag
from ultrarag.evaluation.formats import write_beir
from ultrarag.retrieve import LiveIndex, read_run, read_status
from ultrarag.retrieve.command.parser import finetune_flags, main
from ultrarag.types import Passage

TEXTS = ["a vector database", "a red apple", "the deep ocean", "an old castle", "a fast train", "the green forest"]


@pytest.fixture
def kb(tmp_path: Path, tiny) -> str:
    """An empty index."""
    LiveIndex.create(tmp_path / "kb", tiny, backend="numpy").close()
    return str(tmp_path / "kb")


@pytest.fixture
def full(kb: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """An index of TEXTS."""
    assert main(["add", kb, str(folder)]) == 0
    capsys.readouterr()
    return kb


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BEIR folder of TEXTS, each judged relevant to itself."""
    corpus = [Passage(f"p{n}", text, metadata={"n": n}) for n, text in enumerate(TEXTS)]
    queries = {f"q{n}": text for n, text in enumerate(TEXTS)}
    write_beir(tmp_path / "beir", corpus, queries, {"test": {f"q{n}": {f"p{n}": 1} for n in range(len(TEXTS))}})
    return tmp_path / "beir"


def said(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """The JSON that a command prints."""
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_create(tmp_path: Path, tiny_m3: str, tiny, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["create", tmp_path / "kb", "--model", tiny_m3, "--adapter", "bgem3", "--backend", "numpy"]
    live = said(capsys, *words, "--heads", "dense,sparse", "--no-bm25", "--passage-max-length", "9")["live"]
    assert (live["heads"], live["backend"]) == (["dense", "sparse"], "numpy")
    assert live["fingerprint"] != tiny.fingerprint  # the length is part of the identity
    assert not read_status(tmp_path / "kb")["bm25"]
    assert main([*map(str, words)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_add_and_status(kb: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = folder / "more.jsonl"
    more.write_text('{"id": "p0", "contents": "another text"}\n{"id": "x", "text": "new", "title": "T"}\n')
    assert main(["add", kb, str(folder), str(more)]) == 0
    assert capsys.readouterr().out == "7 added, 1 changed, 0 unchanged; the index holds 7 passages\n"
    assert said(capsys, "add", kb, folder)["unchanged"] == 5
    assert main(["status", kb]) == 0
    out = capsys.readouterr().out
    assert "7 passages, 9 writes" in out
    assert "owned by nobody" in out
    assert "dense,sparse,colbert" in out
    assert not any(line != line.rstrip() for line in out.splitlines())


def test_cut_texts_are_told_once(tmp_path: Path, tiny_m3: str, caplog, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["create", tmp_path / "kb", "--model", tiny_m3, "--adapter", "bgem3", "--backend", "numpy"]
    said(capsys, *words, "--passage-max-length", "4")
    caplog.clear()
    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(f'{{"id": "{n}", "text": "a text of more than four tokens"}}\n' for n in range(20)))
    assert main(["add", str(tmp_path / "kb"), str(lines)]) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "20 of 20 texts were longer than 4 tokens and were cut"
    ]


def test_status_while_another_process_owns_the_index(full: str, tiny, capsys: pytest.CaptureFixture[str]) -> None:
    with LiveIndex.open(full, tiny):
        assert said(capsys, "status", full)["owner"]["pid"] > 0
        assert main(["search", full, "apple"]) == 1
        assert "is in use by" in capsys.readouterr().err


def test_add_from_stdin_takes_all_or_nothing(kb: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"_id": n, "text": text}) for n, text in enumerate(TEXTS)]
    for rows, status in ((lines, 0), ([*lines, "nope", '{"id": "y"}'], 1)):
        stdin = io.TextIOWrapper(io.BytesIO("\n".join(rows).encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["add", kb, "-"]) == status
    error = capsys.readouterr().err
    assert "2 of 8 rows cannot be used; nothing was added" in error
    assert "stdin:7: not valid JSON" in error
    assert "stdin:8: no 'text'" in error
    assert read_status(kb)["writes"] == len(TEXTS)


def test_delete(full: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids").write_text("p1\np2\n")
    found = said(capsys, "delete", full, "p0", "nobody", "--ids-file", tmp_path / "ids")
    assert found == {"deleted": 3, "unknown": 1, "passages": 3}
    assert main(["delete", full]) == 2
    assert main(["delete", full, "--ids_file", str(tmp_path / "none")]) == 1


def test_search_prints_a_table_or_json(full: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", full, "red apple", "--weights", "dense=0.5,bm25=1", "--k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["score", "dense", "bm25", "id", "passage"]
    assert lines[2].split()[0] == "1"
    assert lines[2].endswith("p1  a red apple")
    assert len(lines) == 4
    found = said(capsys, "search", full, "red apple", "--heads", "bm25", "--filter", '{"n": {"gte": 2}}')
    assert found["hits"] == []
    found = said(capsys, "search", full, "deep", "--heads", "bm25", "--filter", '{"n": [2, 3]}')
    assert [(hit["id"], hit["passage"]["metadata"]) for hit in found["hits"]] == [("p2", {"n": 2})]


def test_a_file_of_queries_makes_a_run(full: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries, run = tmp_path / "q.tsv", tmp_path / "x.run"
    queries.write_text("a\tred apple\nb\tfast train\n")
    words = ["search", full, "--queries", str(queries), "--heads=bm25", "--k", "1"]
    assert main([*words, "--run", str(run)]) == 0
    assert capsys.readouterr().out == ""
    assert {id: list(hits) for id, hits in read_run(run).items()} == {"a": ["p1"], "b": ["p4"]}
    assert main(words) == 0
    assert capsys.readouterr().out.count("p1  a red apple") == 1
    assert [row["query"] for row in said(capsys, *words)] == ["red apple", "fast train"]


def test_evaluate_and_compare(full: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "x.run"
    found = said(capsys, "evaluate", full, folder, "--heads", "bm25", "--run", run, "--metrics", "nDCG@3,MRR@3")
    assert found == {"queries": 6, "metrics": {"nDCG@3": 1.0, "MRR@3": 1.0}, "notes": []}
    run.write_text("".join(line for line in run.read_text().splitlines(True) if " p0 " not in line))
    words = ["evaluate", full, str(folder), "--heads", "bm25", "--compare", str(run), "--per-query"]
    found = said(capsys, *words)
    assert found["compared"]["change"]["MRR@10"]["difference"] == pytest.approx(1 / 6)
    assert found["per_query"]["q3"]["nDCG@10"] == 1.0
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "+0.1667" in out
    assert "6 queries" in out
    assert main(["evaluate", full, str(folder), "--split", "dev"]) == 1
    assert "the splits there are: test" in capsys.readouterr().err


def test_evaluate_says_what_is_not_judged(full: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = [Passage(id, text) for id, text in (("p0", TEXTS[0]), ("p1#0", TEXTS[1]), ("p2#0", TEXTS[2]))]
    qrels = {"p1": {"p0": 1, "p1#0": 1}}
    write_beir(tmp_path / "part", corpus, {"p1": TEXTS[1]}, {"test": qrels, "none": {"p1": {"p1#0": 1}}})
    words = ["evaluate", full, str(tmp_path / "part"), "--heads", "dense"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "note: 1 of 2 relevant passages are not in the index, 'p1#0' for one" in out
    assert "note: 1 of 1 queries found the passage that has their own id" in out
    found = said(capsys, *words, "--ignore-identical-ids")
    assert "left out" in found["notes"][1]
    assert main([*words, "--split", "none"]) == 1
    assert "none of the 1 relevant passages is in the index" in capsys.readouterr().err


def test_blank_passages_of_a_file_are_left_out_and_counted(kb: str, tmp_path: Path, capsys) -> None:
    rows = [{"id": f"b{n}", "text": text} for n, text in enumerate(["", " \n", "\u200b"])]
    rows += [{"id": "t", "text": "", "title": "a title"}, {"id": "x", "text": "a text"}]
    (tmp_path / "some.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["add", kb, str(tmp_path / "some.jsonl")]) == 0
    assert "2 added, 0 changed, 0 unchanged, 3 blank passages left out" in capsys.readouterr().out
    (tmp_path / "void.jsonl").write_text(json.dumps(rows[0]))
    assert main(["add", kb, str(tmp_path / "void.jsonl")]) == 1
    assert "holds no passages but 1 blank ones" in capsys.readouterr().err


def test_a_corpus_of_ultrarag_gets_ids_of_its_own(kb: str, tmp_path: Path, capsys) -> None:
    corpus = tmp_path / "chunks.jsonl"
    corpus.write_text("".join(json.dumps({"id": "7", "contents": text}) + "\n" for text in ("one", "two", "three")))
    assert main(["add", kb, str(corpus)]) == 1
    assert "2 of 3 rows cannot be used" in capsys.readouterr().err
    assert main(["add", kb, str(corpus), "--layout", "ultrarag_v3", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["added"] == 3
    assert "chunks.jsonl: 2 rows repeat an id and are added under one of their own, such as '7#2'" in said.err


def test_build_swap_rollback_vacuum(
    full: str, checkpoint: Path, folder: Path, quick_builds, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["swap", full]) == 1
    assert "build one first" in capsys.readouterr().err
    assert main(["build", full, str(checkpoint)]) == 0
    assert "generation 2 is ready" in capsys.readouterr().out
    found = said(capsys, "swap", full, "--gate", folder, "--weights", "dense=1,bm25=1")
    assert (found["old"]["id"], found["new"]["id"], found["verdict"]["new"]) == (1, 2, 1.0)
    assert main(["rollback", full]) == 0
    assert "generation 1 is live in place of 2" in capsys.readouterr().out
    assert [entry["state"] for entry in said(capsys, "status", full)["generations"]] == ["live", "previous"]
    assert said(capsys, "vacuum", full).keys() == {"before", "after"}


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (["search"], 2, ""),
        (["sarch", "KB"], 2, ""),
        (["search", "KB"], 2, "a query, or --queries FILE"),
        (["search", "KB", "x", "--wieghts", "a=1"], 2, "--wieghts"),
        (["search", "KB", "x", "--weights", "dense=much"], 2, "not HEAD=NUMBER"),
        (["search", "KB", "x", "--weights", "dnse=1"], 2, "did you mean 'dense'"),
        (["search", "KB", "x", "--filter", "{"], 2, "not valid JSON"),
        (["search", "KB", "x", "--filter", "[]"], 2, "a filter is a JSON object"),
        (["search", "KB", "x", "--k", "0", "--heads", "dense"], 2, "k"),
        (["add", "KB", "none.jsonl"], 1, "cannot read"),
        (["status", "nowhere"], 1, "holds no index"),
        (["swap", "KB", "9"], 1, "no generation 9"),
        (["rollback", "KB"], 1, "no previous generation"),
        (["create", "KB", "--model", "x", "--adapter", "bge"], 2, "x"),
    ],
)
def test_what_cannot_be_done_is_said(
    kb: str, words: list[str], status: int, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [kb if word == "KB" else word for word in words]
    try:
        found = ultrarag(["index", *words])
    except SystemExit as stop:  # argparse's own
        found = stop.code
    assert found == status
    assert error in capsys.readouterr().err


def test_ctrl_c(full: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LiveIndex, "open", interrupted)
    assert main(["search", full, "x"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_flags_of_fine_tuning_are_handed_on(full: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {}

    class Report:
        def to_dict(self) -> dict[str, int]:
            return {"swapped": 1}

        def __str__(self) -> str:
            return "swapped"

    def refresh(live: LiveIndex, train_data: Any, eval_data: Any, **arguments: Any) -> Report:
        given.update(arguments, train_data=train_data, eval_data=eval_data)
        return Report()

    monkeypatch.setattr(LiveIndex, "refresh", refresh)
    words = ["refresh", full, "--train-data", "a.jsonl", "b.jsonl", "--output_dir", "out", "--learning-rate", "1e-5"]
    assert said(
        capsys, *words, "--bf16", "--heads", "dense", "sparse", "--seed=7", "--weights", "dense=1,bm25=1.5"
    ) == {"swapped": 1}
    flags = {"learning_rate": "1e-5", "bf16": True, "heads": ["dense", "sparse"], "seed": "7"}
    gate = {"gate": True, "force": False, "metric": "nDCG@10", "search": {"weights": {"dense": 1.0, "bm25": 1.5}}}
    fixed = {"train_data": ["a.jsonl", "b.jsonl"], "output_dir": "out", "eval_data": None, **gate}
    fixed |= {"effort": "full", "bridge": False}
    assert given == {**fixed, **flags}
    assert main([*words, "--no-gate"]) == 0
    assert capsys.readouterr().out == "swapped\n"
    assert not given["gate"]


def test_fine_tunings_flags_are_read_once() -> None:
    assert finetune_flags(["--no_packing", "--x", "-1"]) == {"packing": False, "x": "-1"}
    for words, error in ((["--x", "1", "--x=2"], "--x given twice"), (["y"], "'y' follows no flag")):
        with pytest.raises(Exception, match=error):
            finetune_flags(words)


@pytest.mark.parametrize("words", [["--help"], ["search", "--help"], ["refresh", "--help"]])
def test_help_is_quick(words: list[str]) -> None:
    code = (
        f"import sys\nfrom ultrarag.cli import main\ntry: main(['index', *{words}])\nexcept SystemExit as stop: print("
        "stop.code, [name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "usage: ultrarag index" in done.stdout
