"""Generations and checkpoints, and the way back."""

from __future__ import annotations

from tests.service.console.conftest import Browser
from ultrarag.service.console import lineage


def record(fingerprint: str, parent: str, rate: float, **more: object) -> dict:
    return {
        "fingerprint": fingerprint * 64,
        "created": f"2026-01-0{fingerprint}T10:00:00+00:00",
        "parent": parent * 64,
        "parent_name": "<i>model</i>",
        "data": [{"name": "train", "rows": 320, "sha256": "c" * 64}],
        "arguments": {"training": {"learning_rate": rate, "bf16": True}},
        "metrics": {"before": {"nDCG@10": 0.5}, "after": {"nDCG@10": 0.6}},
        "steps": 10,
        "loss": 0.25,
        "merge": None,
        **more,
    }


def test_an_encoder_without_a_record_is_said(browser: Browser) -> None:
    page = browser.get("/console/lineage")
    assert "was not trained here" in page
    assert "There is no previous generation." in page
    assert "no checkpoint with a record" in browser.get("/console/lineage?old=1&new=2", 404)


def test_the_chain_and_what_two_differ_in(browser: Browser, monkeypatch) -> None:
    chain = [record("2", "1", 3e-5), record("1", "0", 1e-5)]
    monkeypatch.setattr(lineage, "checkpoint_log", lambda path: chain)
    page = browser.get("/console/lineage")
    assert page.index("2" * 12) < page.index("1" * 12)
    assert "nDCG@10 0.5000 → 0.6000" in page
    assert "&lt;i&gt;model&lt;/i&gt;" in page
    page = browser.get("/console/lineage", params={"old": "1" * 64, "new": "2" * 64})
    assert "arguments.training.learning_rate</th><td>1e-05</td><td>3e-05</td>" in page
    assert "bf16" not in page


def test_rolling_back_is_asked_twice(browser: Browser, minilm_encoder, quick_builds) -> None:
    live = browser.client.app.state.service.live
    live.swap(live.build(minilm_encoder))
    assert "Roll back to generation 1" in browser.get("/console/lineage")
    assert "tick the box" in browser.send("/console/rollback", 400)
    browser.send("/console/rollback", 403, sure="1", form_token="x")
    assert live.status()["live"]["id"] == 2
    assert "the previous generation is live again" in browser.send("/console/rollback", sure="1")
    assert live.status()["live"]["id"] == 1


def test_what_cannot_be_rolled_back_is_said(browser: Browser) -> None:
    page = browser.send("/console/rollback", 409, sure="1")
    assert 'role="alert"' in page
