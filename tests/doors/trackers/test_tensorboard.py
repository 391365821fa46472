"""tensorboard: what the event files of a fine-tune and of a refresh hold"""

from __future__ import annotations

import pytest

from tests.doors.trackers.conftest import Reported


def value(events, tag: str) -> float:
    return events.Scalars(tag)[-1].value


def test_a_fine_tunes_figures_stand_beside_its_steps(reported: Reported) -> None:
    events, result = reported.tensorboard("tuned", "runs"), reported.result
    assert "train/loss" in events.Tags()["scalars"]
    for metric, after in result.metrics["after"].items():
        tag = metric.replace("@", "_at_")
        assert value(events, f"result/{tag}/after") == pytest.approx(after)
        assert value(events, f"guard/{tag}/after") == pytest.approx(result.metrics["guard_after"][metric])
        assert value(events, f"result/{tag}/low") <= value(events, f"result/{tag}/high")
    assert events.Scalars("result/steps")[-1].step == result.steps
    assert "result/fingerprint/text_summary" in events.Tags()["tensors"]


def test_a_refreshs_figures_have_its_generation_as_their_step(reported: Reported) -> None:
    events, report = reported.tensorboard("refreshed", "runs", "refresh"), reported.report
    verdict = report.verdict
    metric = verdict["metric"].replace("@", "_at_")
    assert events.Scalars(f"gate/{metric}/after")[-1].step == report.generation
    assert value(events, f"gate/{metric}/difference") == pytest.approx(verdict["change"]["difference"])
    for step in report.ladder:
        assert value(events, f"ladder/{step['rung']}/seconds") == pytest.approx(step["seconds"])
        assert f"ladder/{step['rung']}/decision/text_summary" in events.Tags()["tensors"]
    assert value(events, "refresh/passages_encoded") >= 0


def test_a_tracker_that_fails_ends_nothing(tmp_path, caplog) -> None:
    from ultrarag.finetune import send_figures

    (tmp_path / "file").write_text("")
    send_figures(["tensorboard"], {"a": 1.0}, tmp_path / "file" / "below", None, 0)
    assert "tensorboard did not take the figures: NotADirectoryError" in caplog.text or "FileExists" in caplog.text
