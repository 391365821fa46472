"""`ultrarag evaluate` where MTEB is not installed: its help, its own mistakes, and what to install."""

from __future__ import annotations

import sys

import pytest

from ultrarag.cli import main
from ultrarag.packages import TESTED


@pytest.fixture(autouse=True)
def without_mteb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.delitem(sys.modules, "ultrarag.doors.mteb.framework", raising=False)


def test_help_needs_no_mteb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "--help"])
    assert left.value.code == 0
    assert "--mteb [TASK ...]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model", "--mteb"], "say what to evaluate: --mteb TASK ..., or --mteb --data FOLDER"),
        (["model", "--mteb", "SciFact", "--precision", "int8"], f"pip install mteb=={TESTED['mteb']}"),
    ],
)
def test_what_is_missing_is_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *words]) == 2
    assert said in capsys.readouterr().err
