"""A refresh as others see it: how far it is, ended from another thread, and fine-tuned in a process of its own."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.finetune.test_run import QUICK, ROWS
from tests.retrieve.refresh.refresh_worker import QUERIES
from tests.retrieve.refresh.test_refresh import again, corpus, straight  # noqa: F401  fixtures
from ultrarag.errors import IndexStateError, StoppedError, UsageError
from ultrarag.retrieve.build import start
from ultrarag.retrieve.refresh import Refreshing, stages
from ultrarag.retrieve.refresh.child import finetune_apart

pytestmark = pytest.mark.usefixtures("quick_builds")


def stages_of(told: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(found["stage"] for found in told))


def test_progress_is_told_and_shown_by_status(corpus, again, monkeypatch) -> None:  # noqa: F811
    told: list[dict[str, Any]] = []
    seen: list[Any] = []
    swap = stages.swap

    def slow(*args: Any) -> Any:
        seen.append(corpus.status()["refresh"])
        time.sleep(1.2)
        return swap(*args)

    monkeypatch.setattr(stages, "swap", slow)
    assert corpus.status()["refresh"] is None
    assert corpus.cancel_refresh() is False
    again(on_progress=told.append)
    assert corpus.status()["refresh"] is None
    assert stages_of(told)[-1] == seen[0]["stage"] == "swap"
    assert json.loads(json.dumps(told)) == told
    assert told[0].keys() >= {"stage", "step", "total", "seconds", "seconds_left", "output_dir", "cancelled"}


def test_the_loss_is_that_of_the_run_that_goes_on(corpus, tmp_path: Path) -> None:  # noqa: F811
    refreshing = Refreshing(corpus._core, tmp_path)
    refreshing.enter("finetune")
    for step, loss in ((1, None), (1, 2.5), (2, None), (2, float("nan"))):
        refreshing.step(step, 10, loss)
    assert [refreshing.describe()[name] for name in ("step", "loss", "loss_step")] == [2, 2.5, 1]
    refreshing.step(1, 10)  # another rung begins
    assert refreshing.describe()["loss"] is None


def test_a_function_that_fails_stops_nothing(again, caplog) -> None:  # noqa: F811
    def fail(found: dict[str, Any]) -> None:
        raise RuntimeError("no screen")

    assert again(on_progress=fail).generation == 2
    assert "could not be told: RuntimeError: no screen" in caplog.text


@pytest.mark.parametrize("stage", ["finetune", "build"])
def test_a_cancelled_refresh_goes_on_to_the_same_end(stage, corpus, again, straight, monkeypatch) -> None:  # noqa: F811
    with monkeypatch.context() as patch:
        if stage == "finetune":
            patch.setattr(Refreshing, "step", lambda self, step, steps, loss=None: step == 3 and self.cancel())
        else:

            def cancelled(*args: Any, **options: Any) -> None:
                assert corpus.cancel_refresh() is True
                raise IndexStateError("the builder ended with exit status 143")

            patch.setattr(start, "run_builder", cancelled)
        with pytest.raises(StoppedError, match="refresh again with the same arguments"):
            again()
    assert corpus.search(next(iter(QUERIES.values())), heads=["dense"]).generation == 1
    assert again().lineage["fingerprint"] == straight


def test_an_isolated_refresh_comes_to_the_same_end(corpus, again, straight, monkeypatch) -> None:  # noqa: F811
    told: list[dict[str, Any]] = []
    losses: list[float] = []
    step = Refreshing.step

    def noted(self: Refreshing, *values: Any) -> bool:
        losses.extend(loss for loss in values[2:] if loss is not None)
        return step(self, *values)

    monkeypatch.setattr(Refreshing, "step", noted)
    report = again(isolate=True, on_progress=told.append)
    assert report.lineage["fingerprint"] == straight
    assert all(found["isolated"] for found in told)
    assert losses
    assert all(0 < loss < 100 for loss in losses)
    assert corpus.fingerprint == straight


def test_an_isolated_refresh_is_cancelled_and_goes_on(corpus, again, straight, tmp_path: Path) -> None:  # noqa: F811
    running: list[int] = []

    def cancel() -> None:
        while not running:
            child = getattr(corpus._core.running, "_child", None)
            if child is not None and corpus.status()["refresh"]["step"] >= 2:
                running.append(child.pid)
            time.sleep(0.02)
        assert corpus.cancel_refresh() is True

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(StoppedError):
        again(isolate=True)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(running[0], 0)
    assert list((tmp_path / "out").glob("checkpoint-*"))
    assert again().lineage["fingerprint"] == straight  # here or there is the same


def test_an_isolated_fine_tune_says_what_went_wrong(corpus, tmp_path: Path) -> None:  # noqa: F811
    refreshing = Refreshing(corpus._core, tmp_path / "out", isolate=True)
    with pytest.raises(UsageError, match="isolate=True sends rows and arguments"):
        finetune_apart(refreshing, "model", [], tmp_path / "out", {"argument": object()})
    with pytest.raises(UsageError, match="no_such_flag"):  # of the kind that was raised in the child
        finetune_apart(refreshing, str(tmp_path), [], tmp_path / "out", {"no_such_flag": 1, "adapter": "bge"})


def test_a_trial_in_a_process_of_its_own_leaves_its_metrics_alone(corpus, tiny_m3, tmp_path: Path) -> None:  # noqa: F811
    refreshing = Refreshing(corpus._core, tmp_path / "out", isolate=True)
    given = {**QUICK, "max_steps": 1, "eval_data": ROWS, "save_strategy": "no"}
    found = finetune_apart(refreshing, str(tiny_m3), ROWS, tmp_path / "out", given, trial=True)
    assert (list(found.metrics), found.steps, found.fingerprint) == (["after"], 1, "")
    assert not list((tmp_path / "out").iterdir())
