"""Refreshing: searches go on, the gate decides, and a refresh killed in any stage is carried on to the same end."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests import forked
from tests.retrieve.refresh.refresh_worker import ARGUMENTS, GATE, IDS, QRELS, QUERIES, ROWS, TEXTS
from ultrarag.checkpoint.manifest import read_manifest
from ultrarag.errors import DataError, GateError, IndexStateError, UltraragError, UsageError
from ultrarag.evaluation import write_beir
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.refresh import stages
from ultrarag.retrieve.refresh.judging import leak_checks, questions
from ultrarag.retrieve.refresh.report import RefreshReport
from ultrarag.types import Passage

ROOT = Path(__file__).parents[3]
PASSAGES = [Passage(IDS[text], text) for text in TEXTS]

pytestmark = pytest.mark.usefixtures("quick_builds")


def filled(root: Path, encoder) -> LiveIndex:
    live = LiveIndex.create(root, encoder, backend="numpy")
    live.add(PASSAGES)
    return live


@pytest.fixture
def corpus(tmp_path, tiny):
    live = filled(tmp_path / "kb", tiny)
    yield live
    live.close()


@pytest.fixture
def again(corpus, tmp_path):
    """The call, the same each time; arguments may be changed."""

    def call(**changes) -> RefreshReport:
        asked = {"output_dir": tmp_path / "out", "cache_path": str(tmp_path / "cache"), "gate": GATE, **ARGUMENTS}
        return corpus.refresh(changes.pop("rows", ROWS), **{**asked, **changes})

    return call


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """The fingerprint that an uninterrupted refresh comes to."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch, filled(folder / "kb", tiny) as live:
        from ultrarag.retrieve.build import start
        from ultrarag.retrieve.build.child import Build

        patch.setattr(start, "run_builder", lambda root, generation, **_: Build(root, generation, None).run(False))
        report = live.refresh(ROWS, output_dir=folder / "out", gate=GATE, cache_path=str(folder / "cache"), **ARGUMENTS)
    return report.lineage["fingerprint"]


def test_searches_go_on_while_the_model_is_exchanged(corpus, again, tmp_path):
    old, stop = corpus.fingerprint, threading.Event()
    answered, failures = [], []

    def search() -> None:
        while not stop.wait(0.01):
            try:
                answered.append(len(corpus.search(ROWS[0]["query"], k=3, heads=["dense"])))
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=search)
    thread.start()
    try:
        report = again()
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert set(answered) == {3}
    assert (report.outcome, report.generation, corpus.generation(2).state) == ("swapped", 2, "live")
    assert report.lineage["parent"] == old
    assert report.lineage["fingerprint"] == corpus.fingerprint == read_manifest(tmp_path / "out").fingerprint
    measured = corpus.evaluate(*GATE, heads=["dense"]).metrics
    assert report.metrics["after"] == pytest.approx(measured)
    assert report.metrics["before"] != report.metrics["after"]
    assert len(report.gained) + len(report.lost) > 0
    assert report.queries == {id: QUERIES[id] for id in (*report.gained, *report.lost)}
    assert (report.overlap["split"], report.overlap["share"]) == ("no split", 1)
    assert any("the gain promises too much: no split: 100.0% of 20 evaluation queries" in note for note in report.notes)
    assert "split       no split: 100.0%" in str(report)
    assert report.seconds.keys() == {"finetune", "build", "swap"}
    assert RefreshReport.read(tmp_path / "out" / "refresh.json") == report
    html = (tmp_path / "out" / "refresh.html").read_text(encoding="utf-8")
    assert "<polyline" in html
    assert f"{report.metrics['after']['nDCG@10']:.4f}" in html


@pytest.mark.parametrize("stages", [["finetune", "published", "build", "flipped"]])
def test_killed_in_every_stage_it_ends_as_if_nothing_had_been(stages, corpus, again, straight, tmp_path):
    corpus.close()
    for stage in stages:
        words = [str(tmp_path / "kb"), str(tmp_path / "out"), str(tmp_path / "cache"), stage]
        done = forked.run(["-m", "tests.retrieve.refresh.refresh_worker", *words], cwd=ROOT)
        assert done.returncode == -9, f"{stage}: {done.stderr[-2000:]}"
        assert bool(list(tmp_path.glob(".out.*.tmp"))) == (stage == "published")
        LiveIndex.open(tmp_path / "kb").close()
        assert list(tmp_path.glob(".*.tmp")) == []  # whether or not it is ever refreshed again
    with LiveIndex.open(tmp_path / "kb") as live:
        assert live.fingerprint == straight  # the last was killed behind the flip
        report = live.refresh(
            ROWS, output_dir=tmp_path / "out", gate=GATE, cache_path=str(tmp_path / "cache"), **ARGUMENTS
        )
        states = [generation["state"] for generation in live.status()["generations"]]
        assert states == ["previous", "live"]
        assert report.lineage["fingerprint"] == live.fingerprint
        assert report.metrics["after"] == pytest.approx(live.evaluate(*GATE, heads=["dense"]).metrics)
        assert live.rollback().new.id == 1


def test_the_same_call_after_the_end_returns_the_report_and_does_nothing(corpus, again):
    report = again()
    assert again() == report
    assert len(corpus.status()["generations"]) == 2
    corpus.rollback()
    with pytest.raises(IndexStateError, match="generation 2 is not the live one any more"):
        again()


def test_a_worse_model_is_refused_with_the_numbers_and_can_be_forced(corpus, again, tmp_path):
    old = corpus.fingerprint
    hits = {query_id: corpus.search(query, k=1, heads=["dense"]) for query_id, query in QUERIES.items()}
    perfect = QUERIES, {query_id: {found[0].id: 1} for query_id, found in hits.items()}
    with pytest.raises(GateError, match=r"significantly worse.*nDCG@10 1\.0000 -> 0\..*refresh\.html"):
        again(gate=perfect)
    assert corpus.fingerprint == old
    refused = RefreshReport.read(tmp_path / "out" / "refresh.json")
    assert (refused.outcome, refused.metrics["before"]["nDCG@10"]) == ("refused", 1)
    assert "Refused" in (tmp_path / "out" / "refresh.html").read_text(encoding="utf-8")
    report = again(gate=perfect, force=True)
    assert (report.outcome, report.forced, corpus.generation(2).forced) == ("swapped", True, True)
    assert report.lineage["fingerprint"] == refused.lineage["fingerprint"] == corpus.fingerprint


def test_a_gate_about_some_other_passages_says_so_in_the_report(again, tmp_path):
    queries, qrels = GATE
    first = next(iter(qrels))
    report = again(gate=(queries, {**qrels, first: {**qrels[first], "elsewhere#1": 1}}), force=True)
    assert any("relevant passages are not in the index, 'elsewhere#1' for one" in note for note in report.notes)
    assert "elsewhere#1" in (tmp_path / "out" / "refresh.html").read_text(encoding="utf-8")


def test_other_arguments_in_the_same_folder_are_an_error_that_names_them(again):
    perfect_before = QUERIES, {query_id: {"p0": 1} for query_id in QUERIES}
    again(gate=perfect_before, force=True)
    with pytest.raises(UsageError, match="a refresh that was asked for differently"):
        again(learning_rate=5e-4)


def test_an_unfinished_refresh_with_other_arguments_is_an_error(again, monkeypatch):
    monkeypatch.setattr(stages, "build_generation", lambda *_, **__: (_ for _ in ()).throw(IndexStateError("no disk")))
    with pytest.raises(IndexStateError, match="no disk"):
        again()
    with pytest.raises(UsageError, match="begun with other train_data, learning_rate: give the same"):
        again(rows=ROWS[:-1], learning_rate=5e-4)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"learning_rat": 1}, UsageError, "learning_rate"),
        ({"adapter": "bge"}, UsageError, "'adapter' cannot be given"),
        ({"search": {"weights": {"dens": 1}}}, UsageError, "'dense'"),
        ({"shared_eval_data": "refuse"}, DataError, r"no split: 100.0% of 20 .*\n  <rows>:1: the query, 'why does"),
        ({"rows": "nothing.jsonl"}, UsageError, "'nothing.jsonl' does not exist"),
        ({"eval_data": iter(ROWS)}, UltraragError, "eval_data|read more than once"),
        ({"gate": ({"q": "x"}, {"q": {"elsewhere": 1}})}, DataError, "none of the 1 relevant passages is in the index"),
        ({"gate": ({"q": "x"}, {"q": {IDS[TEXTS[0]]: 0}})}, DataError, "no passage is relevant"),
        ({"gate": ({"q": "x"}, {"q": {IDS[TEXTS[0]]: 0.5}})}, UsageError, "for query 'q': 0.5 is not a whole number"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(changes, error, message, again, tmp_path):
    with pytest.raises(error, match=message):
        again(**changes)
    assert not (tmp_path / "out").exists()


def test_a_beir_folder_about_the_index_is_asked_of_the_index(corpus, again, tmp_path):
    write_beir(tmp_path / "beir", PASSAGES, QUERIES, {"test": QRELS})
    report = again(gate=True, eval_data=tmp_path / "beir")
    assert report.measured_on == "20 queries on the index"


@pytest.mark.parametrize(
    ("ids", "metadata", "split"),
    [
        (("book#1", "book#2"), ({}, {}), "by query"),
        (("book#1", "book $#2"), ({}, {}), "by document"),
        (("a", "b"), ({"document": "book"}, {"document": "book"}), "by query"),
        (("a", "b"), ({"document": "book"}, {}), "by document"),
        (("a", "b"), ({}, {}), "unknown"),
    ],
)
def test_passages_of_the_index_that_are_of_an_answers_document_are_found_among_rows(corpus, ids, metadata, split):
    corpus.add([Passage(ids[0], "the oven", "", metadata[0]), Passage(ids[1], "the crust", "", metadata[1])])
    store = corpus._core.store
    checks = leak_checks(questions(store, ({"q": "what is hot"}, {"q": {ids[0]: 1}}), None), store)
    checks.add("f:1", "what sets", ["The crust"])
    assert checks.overlap(1).split == split


def test_other_evaluation_data_is_searched_in_its_own_corpus(again, tiny, tmp_path):
    elsewhere = [Passage(passage.id, f"once {passage.text}") for passage in PASSAGES]  # the same ids by chance
    write_beir(tmp_path / "beir", elsewhere, QUERIES, {"test": QRELS})
    report = again(gate=True, eval_data=tmp_path / "beir")
    assert report.measured_on == f"20 queries on the {len(PASSAGES)} passages of the evaluation data"
    assert report.verdict["new"] == pytest.approx(report.metrics["after"]["nDCG@10"])
    with LiveIndex.create(tmp_path / "elsewhere", tiny, backend="numpy") as other:
        other.add(elsewhere)
        assert report.verdict["old"] == pytest.approx(other.evaluate(*GATE, heads=["dense"]).metrics["nDCG@10"])


def test_without_a_gate_the_page_shows_what_the_fine_tuning_measured(corpus, again, tmp_path):
    held_out = [{"query": row["query"], "pos": row["pos"]} for row in ROWS]
    report = again(gate=False, eval_data=held_out, learning_rate=5e-3)
    assert report.outcome == "swapped"
    assert report.verdict is None
    assert report.measured_on is not None
    assert report.gained or report.lost
    page = (tmp_path / "out" / "refresh.html").read_text(encoding="utf-8")
    assert "no gate was asked" in page
    assert "<h3>Before</h3>" in page
    assert 'class="hits"' in page


def test_data_that_the_model_has_seen_is_refused_unless_asked_for(corpus, again, tmp_path):
    again(gate=False)
    before = corpus.fingerprint
    with pytest.raises(DataError, match=r"100% of the rows were trained on before.*allow_seen_data=True"):
        again(gate=False, output_dir=tmp_path / "2")
    assert not (tmp_path / "2").exists()
    grown = [*ROWS, {"query": "what is new here", "pos": ["the long sleep of seals"], "neg": ["hot bread"]}]
    with pytest.raises(DataError, match="of the rows were trained on before"):
        again(gate=False, output_dir=tmp_path / "2", rows=grown)
    report = again(gate=False, output_dir=tmp_path / "2", allow_seen_data=True)
    assert report.lineage["parent"] == before


def test_ctrl_c_says_how_to_go_on(again, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt("stopped after step 3; continue with --resume_from_checkpoint True")

    monkeypatch.setattr("ultrarag.finetune.finetune", stop)
    with pytest.raises(KeyboardInterrupt, match="refresh again with the same arguments to go on"):
        again()
