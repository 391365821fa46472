"""The check before training: every finding on rows made for it, leaks, lengths, estimates, and the dry run."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.finetune.test_run import QUICK, ROWS
from ultrarag.errors import DataError
from ultrarag.finetune import finetune
from ultrarag.finetune.__main__ import main
from ultrarag.finetune.check import DataReport, note_findings
from ultrarag.rows.checks.documents import near_pairs, signature
from ultrarag.rows.checks.leaks import Judged, LeakChecks
from ultrarag.rows.checks.lengths import Lengths, Sample, measure, steps_of
from ultrarag.rows.checks.rows import Finding, RowChecks, guessed_tokens, nearly_same, script, shingles

LONG = "The oven is hot, and the dough rises once under the steam before the crust sets for a long time tonight."
CHINESE = "面包在热烤箱里发酵之前需要揉面并且静置很长时间才能成功地烤出金黄色的外壳"


def checked(*rows: dict, group_size: int = 2) -> dict[str, Finding]:
    checks = RowChecks(group_size)
    for number, row in enumerate(rows, 1):
        row = {"query": f"query {number}", "pos": [f"positive {number}"], "neg": [], **row}
        checks.add(f"f.jsonl:{number}", **row)
    return {finding.name: finding for finding in checks.findings()}


@pytest.mark.parametrize(
    ("name", "rows", "places"),
    [
        ("duplicate_rows", [{"query": "Q", "pos": ["a", "b"]}, {"query": " q ", "pos": ["B", "a"], "neg": ["n"]}], [2]),
        ("query_again", [{"query": "q", "pos": ["a"]}, {}, {"query": "q", "pos": ["b"]}], [1, 3]),
        ("conflicting_rows", [{"query": "q", "pos": ["a"]}, {"query": "q", "pos": ["b"], "neg": ["A"]}], [2]),
        ("positive_is_negative", [{}, {"pos": ["some text"], "neg": ["Some  TEXT"]}], [2]),
        ("positive_is_nearly_negative", [{"pos": [LONG], "neg": [LONG.replace("tonight", "today")]}], [1]),
        ("positive_is_nearly_negative", [{"pos": [CHINESE], "neg": [f"{CHINESE}。"]}], [1]),
        ("teacher_disagrees", [{"neg": ["n"], "pos_scores": [0.2], "neg_scores": [0.3]}], [1]),
    ],
)
def test_findings(name, rows, places):
    found = checked(*rows)[name]
    assert found.places == [f"f.jsonl:{place}" for place in places]
    assert found.rows == len(places)


def test_rows_in_order_have_no_finding():
    texts = [f"{LONG} {word}" for word in ("bread", "water")]
    assert (
        checked({"neg": ["n"]}, {"neg": ["n"]}, {"query": "q", "pos": [texts[0]], "neg": ["other words entirely"]})
        == {}
    )


def test_the_same_text_may_be_a_negative_of_another_query():
    assert "conflicting_rows" not in checked({"query": "a", "pos": ["t"]}, {"query": "b", "pos": ["x"], "neg": ["t"]})


def test_repeats_that_fill_a_group_are_counted_by_distinct_negatives():
    found = checked({"neg": ["a", "A", "b"]}, {"neg": ["a", "b", "c", "d"]}, {}, group_size=5)["few_negatives"]
    assert (found.rows, found.places) == (1, ["f.jsonl:1"])
    assert "2 repeats" in found.text


def test_a_few_rows_of_crossing_scripts_are_counted():
    rows = [{"query": "warum", "pos": ["darum"]}] * 30
    assert "scripts_differ" not in checked(*rows)
    assert checked(*rows, {"query": "warum", "pos": ["因为"]})["scripts_differ"].rows == 1


def test_memory_does_not_depend_on_the_length_of_texts():
    checks = RowChecks(8)
    tracemalloc.start()
    for number in range(300):
        text = f"{number} " + "long text " * 2000
        checks.add(f"f:{number}", text, [f"{text} positive"], [f"negative {text}"])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 300 * 200  # the texts have 60 kB a row


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "Latin"),
        ("Größe", "Latin"),
        ("хлеб", "Cyrillic"),
        ("面包 bread", "Latin"),
        ("面包是一种食物 (bread)", "Han"),
        ("パンは食べ物です", "Han and Kana"),
        ("빵", "Hangul"),
        ("خبز", "Arabic"),
        ("→ 12", "other"),
    ],
)
def test_scripts(text, expected):
    assert script(text) == expected


def test_short_texts_are_never_nearly_the_same():
    assert not nearly_same(shingles("why does bread rise"), shingles("why does bread rise"))
    assert nearly_same(shingles(LONG), shingles(LONG.lower()))


def test_leaks_are_found_whatever_case_and_punctuation():
    leaks = LeakChecks([Judged("Why does bread rise?", [("a", "Dough, baked.", {})]), Judged("and steam", [])])
    leaks.add("f:1", "why does bread rise", ["other"])
    leaks.add("f:2", "new", ["dough baked"])
    leaks.add("f:3", "new", ["dough"])
    query, passage = leaks.findings()
    assert (query.level, query.rows, query.places) == ("error", 1, ["f:1"])
    assert query.text.startswith("1 of 2 evaluation queries")
    assert (passage.level, passage.rows, passage.places) == ("warning", 1, ["f:2"])
    overlap = leaks.overlap(rows=3)
    assert (overlap.split, overlap.touched, overlap.shared) == (
        "no split", 1, {"query": 1, "passage": 0, "document": 0},
    )  # fmt: skip


SENTENCE = "dough rises when yeast eats sugar and gives off gas that the gluten holds in many small bubbles"
WORDS = SENTENCE.split()
NEAR = " ".join([*WORDS[:-1], "pockets"])


@pytest.mark.parametrize(
    ("answer", "metadata", "sibling", "trained", "how"),
    [
        ("Baking\nDough rises.", {}, None, "baking\nOvens are hot.", "title 1"),
        (" ".join(WORDS), {}, None, NEAR, "near 1"),
        ("Dough rises.", {}, ("book#7", "Ovens are hot.", {}), "ovens are hot", "id 1"),
        ("Dough rises.", {"document": "b"}, ("x", "Ovens are hot.", {"source": "b"}), "ovens are hot", "id 1"),
        ("Dough rises.", {}, ("other#7", "Ovens are hot.", {}), "ovens are hot", None),
        ("Baking\nDough rises.", {}, None, "Steaming\nOvens are hot.", None),
    ],
)
def test_another_passage_of_an_answers_document_is_a_leak(answer, metadata, sibling, trained, how):
    judged = [Judged("Why does bread rise?", [("book#2", answer, metadata)])]
    leaks = LeakChecks(judged, [sibling] if sibling else [])
    leaks.add("f:1", "new", ["far from it"])
    leaks.add("f:2", "what is hot", [trained])
    overlap = leaks.overlap(rows=2)
    found = list(leaks.findings())
    if how is None:
        assert found == []
        assert (overlap.split, overlap.share) == ("by document", 0)
    else:
        (document,) = found
        assert (document.name, document.places) == ("eval_documents_in_train", ["f:2"])
        assert f"known by {how}:" in document.text
        assert (overlap.split, overlap.share, overlap.too_much) == ("by query", 1, True)
        assert overlap.examples[0].startswith("f:2: ")
        assert overlap.examples[0].endswith("'Why does bread rise?'")


def test_data_that_names_no_documents_is_of_an_unknown_split():
    leaks = LeakChecks([Judged("Why does bread rise?", [("p1", "Dough rises.", {})])])
    leaks.add("f:1", "new", ["Ovens are hot."])
    assert leaks.overlap(1).split == "unknown"
    assert str(leaks.overlap(3)).startswith("unknown: no passage is shared, in 1 of 3 rows")


def test_signatures_find_what_is_nearly_the_same_and_are_the_same_everywhere():
    texts = [" ".join(WORDS), NEAR, " ".join(reversed(WORDS)), "一二三四五六七八九十百千万" * 2]
    found = [signature(text) for text in texts]
    assert set(near_pairs(np.stack(found))) == {(1, 0)}
    assert [int(item[0]) for item in found] == [975022407, 975022407, 133113955, 1515793754]
    assert signature("too short") is None
    assert list(near_pairs(np.empty((0, 32), np.uint32))) == []


def test_lengths_and_cuts():
    found = Lengths.of("passage", [4, 8, 9, 16, 17], limit=9, counted=True)
    assert found.histogram == [(8, 2), (16, 2), (32, 1)]
    assert (found.longest, found.median, found.cut) == (17, 9, 0.4)
    (warning,) = found.findings()
    assert (warning.name, warning.rows) == ("passage_cut", 2)
    assert Lengths.of("passage", [4, 8, 9, 9, 17], limit=9, counted=True).findings() == []


def test_pairs_are_measured_as_pairs():
    rows = [("a b", ["c d e", "f"])]
    query, pair = measure(
        rows, lambda texts, kind: [len(t.split()) for t in texts], {"query": 1, "pair": 4}, pairs=True
    )
    assert (query.kind, pair.kind, pair.longest, pair.texts) == ("query", "pair", 4, 2)


def test_a_sample_is_even_and_within_its_size():
    sample = Sample(50)
    for number in range(1000):
        sample.add(str(number), ["p" * 10])
    numbers = [int(query) for query, _ in sample.rows]
    assert len(set(numbers)) == 50
    assert 350 < sum(numbers) / 50 < 650
    assert 1 <= len(sample.within(100)) < 12


def test_steps():
    assert steps_of(rows=100, batch_size=8, accumulation=1, epochs=2) == (13, 26)
    assert steps_of(rows=100, batch_size=8, accumulation=4, epochs=0.5) == (4, 2)
    assert steps_of(rows=100, batch_size=8, accumulation=4, epochs=3, max_steps=7) == (4, 7)


def test_guessed_lengths_are_near_the_tokenizers(minilm_encoder):
    texts = [LONG, "why does bread rise", "The enzyme's thermostability was measured at 37 degrees."]
    counted = minilm_encoder.tokenize(texts, "passage").ids
    for text, ids in zip(texts, counted, strict=True):
        assert 0.6 < guessed_tokens(text) / len(ids) < 1.7


def test_an_error_stops_and_a_warning_is_noted():
    notes: list[str] = []
    note_findings(
        DataReport(5, 5, findings=[Finding("warning", "duplicate_rows", 1, "once more", ["f:2"])]), notes.append
    )
    assert "duplicate_rows" in notes[0]
    with pytest.raises(DataError, match="--skip_data_check"):
        note_findings(DataReport(5, 5, findings=[Finding("error", "x", 1, "bad")]), notes.append)


def words(tmp_path: Path, model: str, rows: list[dict], adapter: str, **more: object) -> list[str]:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "adapter": adapter,
        "model_name_or_path": model,
        "train_data": path,
        "output_dir": tmp_path / "out",
        **more,
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def test_a_run_notes_what_is_wrong_with_its_rows(tiny_m3, tmp_path):
    rows = [*ROWS, ROWS[0], {**ROWS[1], "neg": ROWS[1]["pos"]}]
    run = {**QUICK, "passage_max_len": 5, "max_steps": 1, "adapter": "bgem3", "train_group_size": 2}
    result = finetune(tiny_m3, rows, tmp_path / "out", eval_data=ROWS[:2], **run)
    (note,) = [note for note in result.notes if note.startswith("data check")]
    assert {"duplicate_rows", "eval_queries_in_train", "passage_cut"} <= set(note.split())
    assert "2 of 2 evaluation queries" in note
    assert (result.overlap["split"], result.overlap["share"], result.overlap["checked"]) == ("no split", 1, 22)
    assert "split       no split: 100.0% of 2 evaluation queries" in str(result)
    assert "evaluation split" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"--shared_eval_data refuse: no split: 100.0%.*\n  <rows>:1: the query, "):
        finetune(tiny_m3, rows, tmp_path / "no", eval_data=ROWS[:2], shared_eval_data="refuse", **run)
    assert not (tmp_path / "no").exists()
    quiet = finetune(tiny_m3, rows, tmp_path / "quiet", skip_data_check=True, **run)
    assert not [note for note in quiet.notes if note.startswith("data check")]


def test_dry_run_shows_the_batch_and_writes_nothing(tiny_m3, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{**row, "prompt": "steam:", "pos_scores": [0.75], "neg_scores": [0.25, 0.125]} for row in ROWS]
    more = {"train_group_size": 2, "query_max_len": 6, "passage_max_len": 24, "per_device_train_batch_size": 3}
    more |= {"query_instruction_for_retrieval": "bread:", "knowledge_distillation": True}
    assert main([*words(tmp_path, tiny_m3, rows, "bgem3", **more), "--dry_run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl"]
    assert (len(found["queries"]), found["group_size"], found["steps_per_epoch"]) == (3, 2, 7)
    first = found["queries"][0]
    row = rows[int(first["source"].rpartition(":")[2]) - 1]
    assert first["query"]["text"] == row["query"]
    assert (first["prompt"], first["query"]["cut"], len(first["query"]["ids"])) == ("steam:", True, 6)
    assert "".join(first["query"]["tokens"]).startswith("<s>▁ste")
    positive, negative = first["group"]
    assert (positive["role"], positive["teacher"], positive["text"]) == ("positive", 0.75, row["pos"][0])
    assert (negative["role"], negative["text"] in row["neg"], positive["cut"]) == ("negative", True, False)
    assert main([*words(tmp_path, tiny_m3, rows, "bgem3", **more), "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "query: 6 tokens, cut" in text
    assert "teacher 0.75" in text


def test_dry_run_is_what_training_sees(tiny_m3, tmp_path):
    """The ids are those of the first batch of the loader of a real run."""
    from ultrarag.finetune.batches import make_collator, make_loader, make_plan, read_data
    from ultrarag.finetune.flags import parse_command_line
    from ultrarag.finetune.run import dry_run
    from ultrarag.finetune.step import load_encoder

    given = words(tmp_path, tiny_m3, ROWS, "bgem3", train_group_size=3, per_device_train_batch_size=4, seed=7)
    arguments = parse_command_line([*given, "--cache_path", str(tmp_path / "cache")], None)
    rendered = dry_run(arguments)
    encoder = load_encoder(arguments, print)
    plan = make_plan(arguments, read_data(arguments), pairs=False)
    loader = make_loader(plan, make_collator(arguments.data, encoder), 0, arguments.training)
    batch = next(iter(loader))
    ids = [[int(i) for i in row[mask.bool()]] for row, mask in zip(*_arrays(batch["passages"]), strict=True)]
    assert [text.ids for item in rendered.queries for text in item.group] == ids
    assert [item.source for item in rendered.queries] == batch["sources"]


def _arrays(features):
    return features["input_ids"], features["attention_mask"]


def test_dry_run_of_a_reranker_shows_pairs(tmp_path, capsys, tiny_m3):
    more = {"train_group_size": 2, "max_len": 12, "per_device_train_batch_size": 2}
    assert main([*words(tmp_path, tiny_m3, ROWS, "bge-reranker", **more), "--dry_run", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["queries"][0]
    assert first["query"] is None
    assert first["group"][0]["tokens"].count("</s>") == 3
    assert [(len(text["ids"]), text["cut"]) for text in first["group"]] == [(12, True)] * 2
