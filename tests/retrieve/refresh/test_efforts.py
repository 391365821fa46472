"""Refreshes that encode no passage again, from the rows to the generation that is live."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.retrieve.refresh.refresh_worker import ARGUMENTS, IDS, QRELS, QUERIES, ROWS, TEXTS
from ultrarag.checkpoint import read_manifest
from ultrarag.encoder import LowRank
from ultrarag.errors import DataError, GateError, UltraragError, UsageError
from ultrarag.evaluation import Evaluation, Verdict
from ultrarag.retrieve.bridge import crossing
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.refresh import RefreshReport, apart, ladder, rates
from ultrarag.retrieve.swap import compare
from ultrarag.rows import read_rows
from ultrarag.types import Passage

pytestmark = pytest.mark.usefixtures("quick_builds")

GATE = (QUERIES, QRELS)
#: without what goes with several heads alone
SETTINGS = {name: value for name, value in ARGUMENTS.items() if name != "unified_finetuning"}


@pytest.fixture
def dense(tmp_path: Path, tiny_m3: Any) -> Iterator[LiveIndex]:
    from ultrarag import Encoder

    live = LiveIndex.create(tmp_path / "kb", Encoder.load(tiny_m3, "bge", device="cpu"), backend="numpy")
    live.add([Passage(IDS[text], text) for text in TEXTS])
    yield live
    live.close()


@pytest.fixture
def refresh(dense: LiveIndex, tmp_path: Path) -> Callable[..., RefreshReport]:
    def call(**changes: Any) -> RefreshReport:
        asked = {"output_dir": tmp_path / "out", "cache_path": str(tmp_path / "cache"), "gate": GATE, **SETTINGS}
        asked |= {"shared_eval_data": "warn", **changes}
        return dense.refresh(ROWS, **{name: value for name, value in asked.items() if value is not None})

    return call


def test_a_refresh_of_the_query_side_encodes_no_passage(dense, refresh, tmp_path) -> None:
    before = dense.search(TEXTS[0], k=3)
    report = refresh(effort="query")
    assert report.outcome == "swapped"
    live = dense.generation(report.generation)
    assert (live.shares, live.encodes) == (True, False)
    assert dense.encoder.asymmetric
    assert not (tmp_path / "out" / "ladder").exists()
    dense.add([Passage("new", TEXTS[0] + " and more")])
    assert "new" in [hit.id for hit in dense.search(TEXTS[0] + " and more", k=100)]
    dense.delete(["new"])
    dense.rollback()
    assert dense.search(TEXTS[0], k=3) == before


def test_what_a_refresh_left_that_was_asked_for_differently_is_not_used(refresh, tmp_path) -> None:
    with pytest.raises(UltraragError, match=r"too few to say whether a map gains|gains anything"):
        refresh(effort="query-map", map_regularization=0.01)
    with pytest.raises(UltraragError, match=r"give another effort, such as 'query' or 'auto'$"):
        refresh(effort="query-map", map_regularization=0.01)
    assert not (tmp_path / "out").exists()  # a rung that cannot be trained leaves nothing behind
    stale = tmp_path / "out" / "ladder" / "corpus" / "ids.jsonl"
    stale.parent.mkdir(parents=True, exist_ok=True)
    (stale.parent / "stale").touch()
    with pytest.raises(UltraragError, match=r"too few to say whether a map gains|gains anything"):
        refresh(effort="query-map")
    assert not (stale.parent / "stale").exists()


def test_it_is_refreshed_again_from_there(dense, refresh, tmp_path) -> None:
    refresh(effort="query")
    second = refresh(effort="query", output_dir=tmp_path / "second", allow_seen_data=True)
    assert dense.generation(second.generation).shares
    third = refresh(effort="full", output_dir=tmp_path / "third", allow_seen_data=True)
    assert dense.generation(third.generation).encodes


def test_auto_takes_a_rung_and_says_why(dense, refresh, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ladder, "FEWEST", 1)
    monkeypatch.setattr("ultrarag.retrieve.refresh.plan.FEWEST", 1)
    report = refresh(effort="auto")
    assert report.outcome == "swapped"
    (taken,) = [step for step in report.ladder if step["taken"]]
    assert all(step["decision"] for step in report.ladder)
    assert dense.generation(report.generation).encodes == (taken["rung"] == "full")
    page = (tmp_path / "out" / "refresh.html").read_text(encoding="utf-8")
    assert "The ladder" in page
    assert taken["rung"] in page
    assert not (tmp_path / "out" / "ladder").exists()
    assert refresh(effort="auto") == report  # it is done


def test_what_encodes_nothing_and_measures_lower_is_refused(dense, refresh, tmp_path, monkeypatch) -> None:
    def fallen(*asked: Any) -> Verdict:
        """One of the queries loses a little: no significant fall."""
        before = compare(*asked).before
        values = {query_id: dict(found) for query_id, found in before.per_query.items()}
        values[next(id for id, found in values.items() if found["nDCG@10"])]["nDCG@10"] -= 0.1
        mean = sum(found["nDCG@10"] for found in values.values()) / len(values)
        return Verdict.of("nDCG@10", before, Evaluation({**before.metrics, "nDCG@10": mean}, values, before.run))

    monkeypatch.setattr("ultrarag.retrieve.swap.compare", fallen)
    fingerprint = dense.fingerprint
    with pytest.raises(GateError, match="measures lower than the live one, not significantly"):
        refresh(effort="query")
    assert dense.fingerprint == fingerprint
    assert refresh(effort="full", output_dir=tmp_path / "full").outcome == "swapped"  # every passage was looked at
    dense.rollback()
    forced = refresh(effort="query", output_dir=tmp_path / "forced", force=True)
    assert dense.generation(forced.generation).forced


def test_auto_asks_for_a_passage_map_that_gains(dense, refresh, monkeypatch) -> None:
    from ultrarag.retrieve.refresh.plan import Plan, RefreshTerms

    given = {**SETTINGS, "shared_eval_data": "warn"}
    plan = Plan(dense._core, ROWS, None, Path("out"), RefreshTerms(gate=False, effort="passage-map"), given)
    assert "require_map" not in plan.for_finetune("passage-map", Path("out"), None)
    monkeypatch.setattr("ultrarag.retrieve.refresh.plan.FEWEST", 1)
    plan = Plan(dense._core, ROWS, None, Path("out"), RefreshTerms(gate=GATE, effort="auto"), given)
    assert plan.for_finetune("passage-map", Path("out"), None)["require_map"]
    assert "require_map" not in plan.for_finetune("query", Path("out"), None)


def test_the_guards_corpus_is_encoded_once_for_a_passage_side(dense, refresh, tmp_path, monkeypatch) -> None:
    guard = [{"query": "how do cats sleep", "pos": ["cats sleep on the roof"], "neg": ["dogs bark", "rain falls"]}] * 2
    refresh(effort="query", guard_data=guard, max_forgetting=1.0)
    (kept,) = (dense.path / "guard").glob("*.npy")
    monkeypatch.setattr("ultrarag.encode.CorpusVectors.of", lambda *_: pytest.fail("encoded again"))
    more = {"guard_data": guard, "max_forgetting": 1.0, "allow_seen_data": True}
    refresh(effort="query", output_dir=tmp_path / "second", **more)
    monkeypatch.undo()
    kept.write_bytes(b"damaged")
    refresh(effort="query", output_dir=tmp_path / "third", **more)
    assert len(np.load(kept)) == 3


def test_the_report_says_what_was_decided_of_a_bridge(refresh, monkeypatch) -> None:
    monkeypatch.setattr(crossing, "FEWEST", 10)
    report = refresh(effort="full", bridge=True)
    assert report.bridge is not None
    assert {"raw", "mapped"} <= set(report.bridge["measured"])
    assert f"bridge      bridge to generation {report.generation}: " in str(report)
    assert RefreshReport.read(Path(report.checkpoint) / "refresh.json") == report


def test_an_index_without_some_of_the_models_heads_is_refreshed_in_full(tmp_path, tiny) -> None:
    with LiveIndex.create(tmp_path / "m3", tiny, backend="numpy", heads=["dense"]) as live:
        live.add([Passage(IDS[text], text) for text in TEXTS])
        with pytest.raises(UsageError, match="the live generation has none of sparse, colbert: give effort='full'"):
            live.refresh(ROWS, output_dir=tmp_path / "out", gate=GATE, effort="query", **SETTINGS)


def test_auto_refuses_held_out_queries_that_training_shares(refresh, monkeypatch) -> None:
    monkeypatch.setattr("ultrarag.retrieve.refresh.plan.FEWEST", 1)
    with pytest.raises(DataError, match=r"effort='auto' is chosen by the held-out queries.*Hold out by document"):
        refresh(effort="auto", shared_eval_data=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"effort": "most"}, "unknown effort 'most'"),
        ({"effort": "auto", "gate": True}, "chooses by held-out queries"),
        ({"effort": "auto", "gate": ({"q": "x"}, {"q": {IDS[TEXTS[0]]: 1}})}, "1 queries tell no gain from chance"),
        ({"effort": "query", "corpus": "somewhere"}, "'corpus' cannot be given"),
        ({"effort": "query", "merge_with": "base"}, r"an average with the live query side alone \(merge_weight"),
        ({"effort": "query", "merge_weight": "auto"}, "'auto' is measured by a fine-tune of both sides"),
        ({"effort": "auto", "merge_weight": "auto"}, "'auto' is measured by a fine-tune of both sides"),
        (
            {"effort": "passage-map", "merge_weight": 0.5},
            "effort='passage-map' averages no weights: leave merge_weight",
        ),
        ({"effort": "query", "early_stopping_patience": 1}, "none are held out .too few"),
        (
            {"effort": "query-map", "early_stopping_patience": 1},
            "fits a map at once: leave early_stopping_patience out",
        ),
        ({"effort": "query-map", "evaluation_strategy": "epoch"}, "fits a map at once: leave eval_strategy out"),
        (
            {"effort": "query", "metric_for_best_model": "MRR@10"},
            "nDCG@10 of rows held out here: leave metric_for_best",
        ),
        (
            {"effort": "query", "eval_strategy": "epoch", "save_strategy": "steps"},
            "eval_strategy and save_strategy alike",
        ),
        ({"bridge": True, "gate": False}, "bridge=True measures on queries"),
        (
            {"effort": "query", "shuffle_ratio": 0.1},
            "^effort='query': the rung 'query' does not go with --shuffle_ratio: .*; leave it out, or give",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_written(changes, message, refresh, tmp_path) -> None:
    with pytest.raises(UsageError, match=message):
        refresh(**changes)
    assert not (tmp_path / "out").exists()


def test_auto_holds_out_documents_itself_where_no_queries_are_given(dense, refresh, monkeypatch) -> None:
    monkeypatch.setattr(ladder, "FEWEST", 1)
    monkeypatch.setattr("ultrarag.retrieve.refresh.plan.FEWEST", 1)
    report = refresh(effort="auto", gate=True, shared_eval_data=None)
    assert report.overlap is not None
    assert report.overlap["split"] == "by document"
    assert any("training rows, with their documents, were held out to choose by" in note for note in report.notes)
    assert report.verdict is not None


def test_a_query_side_finds_its_rate_and_learns_its_upper_layers(refresh, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(apart, "FEWEST_STOP", 1)
    monkeypatch.setattr("ultrarag.retrieve.refresh.plan.FROZEN", 2)
    report = refresh(effort="query", learning_rate=None, save_steps=None, num_train_epochs=4)
    (found,) = [note for note in report.notes if note.startswith("query: learning rate")]
    assert found.count("0.") >= 2
    assert any("held out to say when a query side has learned enough" in note for note in report.notes)
    assert "the first 1 of 2 layers, and the embeddings, stay as they are" in report.notes
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.training is not None
    assert manifest.training.arguments["model"]["freeze_layers"] == 1
    assert manifest.training.arguments["evaluation"]["save_min_seconds"] == rates.BETWEEN_CHECKPOINTS


def test_switches_that_are_off_and_older_spellings_change_nothing(dense, refresh, monkeypatch, tmp_path) -> None:
    def trained(name: str, **changes: Any) -> dict[str, Any]:
        refresh(effort="query", output_dir=tmp_path / name, max_steps=2, **changes)
        dense.rollback()
        manifest = read_manifest(tmp_path / name)
        assert manifest is not None
        assert manifest.training is not None
        return manifest.training.arguments

    monkeypatch.setattr(apart, "FEWEST_STOP", 1)
    monkeypatch.setattr("ultrarag.retrieve.refresh.plan.FROZEN", 2)
    for number, off in enumerate(({"use_lora": False}, {"fix_encoder": "false"})):
        found = trained(f"off-{number}", **off)
        assert (found["model"]["freeze_layers"], found["training"]["eval_strategy"]) == (1, "steps")
    assert trained("all", evaluation_strategy="no")["training"]["eval_strategy"] == "no"
    patient = trained("patient", early_stopping_patience=1, save_steps=None, save_on_epoch_end=True)
    assert patient["evaluation"]["early_stopping_patience"] == 1
    assert patient["training"]["eval_strategy"] == "epoch"
    by_epoch = trained("by epoch", save_steps=None, eval_strategy="epoch")["training"]
    assert (by_epoch["eval_strategy"], by_epoch["save_strategy"]) == ("epoch", "epoch")
    by_steps = trained("by steps", save_steps=None, eval_steps=1)["training"]
    assert (by_steps["eval_strategy"], by_steps["eval_steps"], by_steps["save_steps"]) == ("steps", 1, 1)


def test_of_what_a_query_side_learned_a_part_is_kept(dense, refresh, tmp_path, monkeypatch) -> None:
    from ultrarag import Encoder
    from ultrarag.retrieve.refresh.plan import Plan, RefreshTerms

    def query_side(name: str, **changes: Any) -> tuple[dict[str, Any], list[str]]:
        report = refresh(effort="query", output_dir=tmp_path / name, **changes)
        dense.rollback()
        side = Encoder.load(tmp_path / name, device="cpu").side("query")
        return dict(side.model.state_dict()), [note for note in report.notes if note.startswith("merged: ")]

    before = dict(dense.encoder.side("query").model.state_dict())
    part, told = query_side("part")
    whole, _ = query_side("whole", merge_weight=1)
    moved = [name for name in before if not whole[name].equal(before[name])]
    assert moved
    assert all(np.allclose(part[name], before[name].lerp(whole[name], rates.KEPT), atol=1e-6) for name in moved)
    assert told[0].startswith("merged: 0.9 of the trained weights, the rest those of the parent")
    monkeypatch.setattr("ultrarag.retrieve.refresh.plan.FEWEST", 1)
    given = {**SETTINGS, "shared_eval_data": "warn", "merge_weight": 0.9}
    plan = Plan(dense._core, ROWS, None, Path("out"), RefreshTerms(gate=GATE, effort="auto"), given)
    weights = {rung: plan.for_finetune(rung, Path("out"), None).get("merge_weight") for rung in ladder.RUNGS}
    assert weights == {"query-map": None, "query": 0.9, "passage-map": None, "full": None}


def test_a_low_rank_query_side_is_kept_in_part_too(refresh, tmp_path) -> None:
    pytest.importorskip("peft")
    report = refresh(effort="query", use_lora=True, lora_rank=4, lora_alpha=8.0)
    assert report.outcome == "swapped"
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.training is not None
    assert manifest.training.merge is not None
    assert manifest.training.merge["weight"] == rates.KEPT
    assert [path.parent.name for path in (tmp_path / "out").glob("*/model.safetensors")] == ["passage"]
    assert LowRank.load(tmp_path / "out" / "query_low_rank").scaling == pytest.approx(rates.KEPT * 8 / 4)


def test_a_query_side_is_trained_on_more_queries_at_a_time_unless_it_is_said(dense) -> None:
    from ultrarag.retrieve.refresh.plan import Plan, RefreshTerms

    def trained(**given: Any) -> tuple[Any, Any, int, int | None]:
        kept = {name: value for name, value in SETTINGS.items() if name not in rates.DEFAULTS}
        plan = Plan(dense._core, ROWS, None, Path("out"), RefreshTerms(gate=False, effort="query"), {**kept, **given})
        training = plan.settings.training
        of_query = (training.num_train_epochs, training.per_device_train_batch_size)
        return *of_query, plan.steps("query"), plan.for_finetune("query", Path("out"), 1).get("max_steps")

    rows = len(ROWS)
    assert trained() == (2, 64, 1, None)  # a pilot of one step is no shorter
    assert trained(batch_size=1, epochs=3) == (3, 1, 3 * rows, 1)  # older spellings say it too


@pytest.mark.parametrize(
    ("usual", "twice", "third", "found", "tried"),
    [
        (0.5, 0.6, 0.7, 6e-5, ["3e-05", "6e-05"]),  # where a higher rate is better, no lower one is tried
        (0.6, 0.5, 0.7, 1e-5, ["3e-05", "6e-05", "1e-05"]),
        (0.6, 0.5, 0.5, 3e-5, ["3e-05", "6e-05", "1e-05"]),
        (0.6, 0.6, 0.5, 3e-5, ["3e-05", "6e-05", "1e-05"]),  # of equal worth the lowest is taken
        (0.6, 0.6, 0.6, 1e-5, ["3e-05", "6e-05", "1e-05"]),
    ],
)
def test_a_lower_rate_is_tried_where_a_higher_one_is_no_better(usual, twice, third, found, tried) -> None:
    worth = {"3e-05": usual, "6e-05": twice, "1e-05": third}
    result = rates.find_rate(3e-5, 400, lambda rate, steps: worth[rates.named(rate)])
    assert result["learning_rate"] == pytest.approx(found)
    assert list(result["tried"]) == tried


@pytest.mark.parametrize(("steps", "part"), [(3, 3), (16, 4), (89, 14), (400, 50)])
def test_a_rate_is_tried_for_a_sixth_of_the_steps(steps, part) -> None:
    asked: list[int] = []
    rates.find_rate(3e-5, steps, lambda rate, steps: float(asked.append(steps) or rate))
    assert asked == [part] * 2


def test_a_trial_of_a_rate_writes_no_checkpoint(refresh, monkeypatch) -> None:
    from ultrarag.finetune import FinetuneResult, run

    monkeypatch.setattr(apart, "FEWEST_STOP", 1)
    done: list[tuple[FinetuneResult, list[str], bool]] = []

    def trial(arguments: Any) -> FinetuneResult:
        result = run.FinetuneRun(arguments).trial()
        left = [path.name for path in Path(arguments.training.output_dir).iterdir()]
        done.append((result, left, arguments.skip_data_check))
        return result

    monkeypatch.setattr(run, "trial", trial)
    refresh(effort="query", learning_rate=None, save_steps=None, num_train_epochs=4)
    assert len(done) in (2, 3)
    assert all(list(result.metrics) == ["after"] for result, _, _ in done)  # nothing that decides nothing
    assert not any(left for _, left, _ in done)
    assert [skipped for _, _, skipped in done] == [False, True, True][: len(done)]


def test_a_refresh_that_stops_in_the_search_for_a_rate_goes_on_in_it(dense, refresh, monkeypatch, tmp_path) -> None:
    from ultrarag.finetune import run

    monkeypatch.setattr(apart, "FEWEST_STOP", 1)
    train, asked = run.trial, []

    def trial(arguments: Any) -> Any:
        asked.append(rates.named(arguments.training.learning_rate))
        if len(asked) == 2:
            (Path(arguments.training.output_dir) / "half").mkdir(parents=True)
            raise KeyboardInterrupt
        return train(arguments)

    settings = {"effort": "query", "learning_rate": None, "save_steps": None, "num_train_epochs": 4}
    straight = refresh(**settings, output_dir=tmp_path / "straight")
    dense.rollback()
    monkeypatch.setattr(run, "trial", trial)
    with pytest.raises(KeyboardInterrupt):
        refresh(**settings)
    report = refresh(**settings)
    assert asked[0] not in asked[1:]
    assert asked[1] == asked[2]
    found, other = ([note for note in each.notes if "learning rate" in note] for each in (report, straight))
    assert found == other
    fingerprints = {dense.generation(each.generation).fingerprint for each in (report, straight)}
    assert len(fingerprints) == 1


def test_auto_passes_over_rungs_whose_search_for_a_rate_finds_no_map(refresh, monkeypatch) -> None:
    from ultrarag.finetune import NoMap
    from ultrarag.retrieve.refresh.learning import Learning

    monkeypatch.setattr(apart, "FEWEST_STOP", 1)
    monkeypatch.setattr(ladder, "FEWEST", 1)
    monkeypatch.setattr("ultrarag.retrieve.refresh.plan.FEWEST", 1)
    finetune = Learning._finetune

    def without_maps(self: Learning, folder: Path, given: dict[str, Any], trial: bool = False) -> Any:
        if given.get("train_side") == "query":
            raise NoMap("no map gains anything", "leave it out")
        return finetune(self, folder, given, trial)

    monkeypatch.setattr(Learning, "_finetune", without_maps)
    report = refresh(effort="auto", learning_rate=None, save_steps=None)
    assert [step["rung"] for step in report.ladder if step["taken"]] == ["full"]
    assert not [note for note in report.notes if "learning rate" in note]


def test_held_out_rows_share_no_document_with_those_that_are_trained_on(tmp_path) -> None:
    rows = [
        {"query": f"question {n}", "pos": [f"Title {n // 2}\npart {n}"], "neg": ["Title 0\npart 0"]} for n in range(60)
    ]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    (tmp_path / "two.json").write_text(json.dumps(rows[40:]))
    parts = apart.Apart([tmp_path / "a", str(tmp_path / "two.json")], [apart.JUDGE, apart.STOP])
    held = {row.query for name in parts.names for row in parts.rows(name)}
    assert len(held) == parts.count(apart.JUDGE) + parts.count(apart.STOP) >= 10
    given = parts.write(tmp_path / "out")
    assert [Path(path).is_dir() for path in given] == [True, False]
    kept = read_rows(given)
    assert {row.query for row in kept} == {row["query"] for row in rows} - held
    titles = {row["pos"][0].split("\n")[0] for row in rows if row["query"] in held}
    assert not any(row.pos[0].split("\n")[0] in titles for row in kept)
    assert all(row.neg == () for row in kept) == ("Title 0" in titles)
