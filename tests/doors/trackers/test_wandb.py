"""wandb, offline: what the run files of a fine-tune and of a refresh hold"""

from __future__ import annotations

import pytest

from tests.doors.trackers.conftest import Reported


def run_of(reported: Reported, name: str) -> dict:
    (found,) = [run for run in reported.wandb() if run["name"] == name]
    return found


def test_a_fine_tune_is_one_finished_run_with_its_figures(reported: Reported) -> None:
    run = run_of(reported, "tuned")
    assert (run["project"], run["exit"]) == ("ours", 0)
    assert any("train/loss" in row for row in run["history"])
    result = reported.result
    for metric, value in result.metrics["after"].items():
        assert run["summary"][f"result/{metric}/after"] == pytest.approx(value)
        assert run["summary"][f"result/{metric}/before"] == pytest.approx(result.metrics["before"][metric])
        assert run["summary"][f"guard/{metric}/after"] == pytest.approx(result.metrics["guard_after"][metric])
        assert run["summary"][f"result/{metric}/low"] <= run["summary"][f"result/{metric}/high"]
    assert run["summary"]["result/fingerprint"] == result.fingerprint
    assert run["summary"]["result/steps"] == result.steps


def test_a_refresh_is_a_run_of_its_own_beside_those_of_its_rungs(reported: Reported) -> None:
    report = reported.report
    run = run_of(reported, "refreshed refresh")
    assert (run["job"], run["exit"]) == ("refresh", 0)
    trained = {r["name"] for r in reported.wandb()} - {"tuned", "refreshed refresh"}
    assert {f"refreshed {step['rung']}" for step in report.ladder if step["taken"]} <= trained
    summary, verdict = run["summary"], report.verdict
    assert summary["refresh/outcome"] == report.outcome
    assert summary[f"gate/{verdict['metric']}/after"] == pytest.approx(verdict["new"])
    for name in ("difference", "low", "high", "p_value"):
        assert summary[f"gate/{verdict['metric']}/{name}"] == pytest.approx(verdict["change"][name])
    for step in report.ladder:
        assert summary[f"ladder/{step['rung']}/decision"] == step["decision"]
        assert summary[f"ladder/{step['rung']}/passages_encoded"] == step["encoded"]
        if gain := step["gain"]:
            found = summary[f"ladder/{step['rung']}/gain/difference"]
            assert found == pytest.approx(gain["change"]["difference"])
    for stage, seconds in report.seconds.items():
        assert summary[f"refresh/seconds/{stage}"] == pytest.approx(seconds)
    assert summary["refresh/passages"] == report.passages
    assert summary["refresh/passages_encoded"] >= 0


def test_a_run_of_the_callers_own_gets_the_figures_and_stays_open(tiny_m3, tmp_path) -> None:
    import wandb

    from tests.doors.trackers.conftest import SETTINGS, read_wandb
    from tests.retrieve.refresh.refresh_worker import ROWS
    from ultrarag.finetune import finetune

    with wandb.init(project="mine", name="mine", mode="offline", dir=tmp_path) as run:
        finetune(tiny_m3, ROWS, tmp_path / "out", "bge", **SETTINGS, report_to="wandb", cache_path=str(tmp_path / "c"))
        assert wandb.run is run
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert "result/fingerprint" in read_wandb(file)["summary"]
