"""The terminal: texts only show, whatever is in them; tables stay tables."""

from __future__ import annotations

import json

import pytest

from ultrarag.io.terminal import json_line, table, visible, width
from ultrarag.retrieve.command.printing import hits
from ultrarag.types import Hit, Passage

#: What a terminal would act upon, and how it is shown.
HOSTILE = [
    ("\x1b]0;owned\x07\x1b[2J", r"\x1b]0;owned\x07\x1b[2J"),
    ("paid\rfree\b\b\b", r"paid\rfree\x08\x08\x08"),
    ("\x9b31m\u202etxt.exe\u2066", r"\x9b31m\u202etxt.exe\u2066"),
    ("half \ud83d", r"half \ud83d"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_unsafe_characters_are_shown(text: str, shown: str) -> None:
    assert visible(text) == visible(visible(text)) == shown
    visible(text).encode()


def test_lines_and_other_scripts_stay() -> None:
    text = "one\n\ttwo 東京 שלום é \u200d 👩\u200d🔬"
    assert visible(text) == text
    assert visible("a\nb", keep="") == r"a\nb"


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_a_table_shows_them(text: str, shown: str) -> None:
    lines = table(("id", "n"), [(text, 1), ("a\nb\tc", 22)]).splitlines()
    assert lines[2].split("  ")[0] == shown
    assert lines[3].startswith(r"a\nb\tc")
    assert len({width(line) for line in lines[1:]}) == 1


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_hits_show_them(text: str, shown: str) -> None:
    passage = Passage(f"id{text}", f"{text} words", "title")
    found = hits([Hit(passage.id, 0.5, passage, {"dense": 0.5})], f"query {text}")
    assert shown in found
    assert found == visible(found, keep="\n")


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_json_on_a_terminal(text: str, shown: str) -> None:
    line = json_line({"text": text, "kept": "東京"})
    assert line == visible(line, keep="")
    assert json.loads(line) == {"text": text, "kept": "東京"}
    assert "東京" in line
