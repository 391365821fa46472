"""What trackers are told of a refresh and of a fine-tune, as plain figures; tests/doors/trackers asks the trackers."""

from __future__ import annotations

from typing import Any

import pytest

from ultrarag.evaluation import evaluate_run
from ultrarag.finetune import FinetuneResult
from ultrarag.finetune.tracking import run_figures, send
from ultrarag.retrieve.refresh.report import RefreshReport
from ultrarag.retrieve.refresh.tracking import refresh_figures

CHANGE = {"difference": 0.1, "low": 0.05, "high": 0.15, "p_value": 0.01, "queries": 40}
COMPARED = {"metric": "nDCG@10", "old": 0.5, "new": 0.6, "change": CHANGE}
STEP = {"rung": "query", "gain": COMPARED, "guard": None, "guard_holds": True, "seconds": 2.5, "encoded": 30}
STEP |= {"taken": True, "decision": "it is enough", "promise": None}


def report(**changes: Any) -> RefreshReport:
    values: dict[str, Any] = dict.fromkeys(RefreshReport.__dataclass_fields__)
    values |= {"outcome": "swapped", "forced": False, "old_generation": 1, "generation": 2, "passages": 100, "steps": 8}
    values |= {"metrics": {"before": {"MRR@10": 0.4}, "after": {"MRR@10": 0.5}}, "verdict": COMPARED, "ladder": [STEP]}
    values |= {"seconds": {"finetune": 3.0, "build": 1.0}, "lineage": {"fingerprint": "f", "parent": "p"}}
    return RefreshReport(**{**values, **changes})


def test_a_refresh_is_told_with_its_gate_and_its_rungs() -> None:
    found = refresh_figures(report(), encodes=False)
    assert (found["gate/nDCG@10/before"], found["gate/nDCG@10/after"], found["gate/queries"]) == (0.5, 0.6, 40)
    assert (found["gate/nDCG@10/low"], found["gate/nDCG@10/high"]) == (0.05, 0.15)
    assert found["ladder/query/gain/difference"] == 0.1
    assert (found["ladder/query/decision"], found["ladder/query/taken"]) == ("it is enough", 1)
    assert "ladder/query/guard/difference" not in found
    assert (found["refresh/seconds"], found["refresh/seconds/build"]) == (4.0, 1.0)
    assert (found["refresh/passages_encoded"], found["refresh/swapped"]) == (30, 1)
    assert found["metrics/MRR@10/after"] == 0.5


def test_a_refresh_without_gate_and_ladder_tells_what_there_is() -> None:
    found = refresh_figures(report(verdict=None, ladder=[], outcome="refused", refused="worse"), encodes=True)
    assert (found["refresh/outcome"], found["refresh/reason"], found["refresh/swapped"]) == ("refused", "worse", 0)
    assert found["refresh/passages_encoded"] == 100
    assert not [name for name in found if name.startswith(("gate/", "ladder/"))]


def test_a_fine_tune_is_told_before_and_after_with_the_interval() -> None:
    qrels = {f"q{n}": {"a": 1} for n in range(4)}
    before = evaluate_run(qrels, {id: {"b": 2.0, "a": 1.0} for id in qrels})
    after = evaluate_run(qrels, {id: {"a": 2.0, "b": 1.0} for id in qrels})
    result = FinetuneResult("out", "base", "f" * 64, 3, 0.5, 1.5)
    found = run_figures(result, {"before": before, "after": after, "guard_before": after, "guard_after": before})
    assert (found["result/MRR@10/before"], found["result/MRR@10/after"]) == (0.5, 1.0)
    assert found["result/MRR@10/low"] == found["result/MRR@10/high"] == pytest.approx(0.5)
    assert found["guard/MRR@10/difference"] == pytest.approx(-0.5)
    assert (found["result/steps"], found["result/loss"], found["result/parent"]) == (3, 0.5, "base")


def test_nobody_is_told_where_nobody_asked(tmp_path: Any) -> None:
    for reporters in (None, [], "none", ["mlflow"]):
        send(reporters, {"a": 1.0}, tmp_path / "runs", None, 0)
    assert not (tmp_path / "runs").exists()
