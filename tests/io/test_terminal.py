"""The terminal: texts only show, whatever is in them; tables stay tables."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import ultrarag
from ultrarag.cli import main
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


@pytest.mark.parametrize(("text", "shown"), HOSTILE[:3])
def test_a_fine_tune_shows_them(text: str, shown: str, tiny_m3, tmp_path, capsys) -> None:
    """Its notes name files, and its checks quote rows."""
    row = {"query": f"why {text}", "pos": [f"for {text}"], "neg": ["no"]}
    train = tmp_path / f"rows {text.replace('/', '')}.jsonl"
    train.write_text("".join(json.dumps({**row, "query": f"{row['query']} {n}"}) + "\n" for n in range(4)))
    words = ["--model_name_or_path", tiny_m3, "--adapter", "bgem3", "--query_max_len", "8", "--passage_max_len", "8"]
    words += ["--train_data", str(train), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    assert main(["finetune", *words]) == 0
    printed = capsys.readouterr()
    for found in printed:
        assert found == visible(found)
    assert "fewer than 7 negatives" in printed.err


def test_nothing_is_printed_past_this_module() -> None:
    """A print of its own is a way for the characters of a text to the terminal; these print what is ours."""
    root = Path(ultrarag.__file__).parent
    own = {"io/command.py", "data/cli.py", "demo/__main__.py", "retrieve/build/child.py", "retrieve/refresh/child.py"}
    printing = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    }
    assert printing <= own, f"use print_result or print_error of ultrarag.io: {sorted(printing - own)}"


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_json_on_a_terminal(text: str, shown: str) -> None:
    line = json_line({"text": text, "kept": "東京"})
    assert line == visible(line, keep="")
    assert json.loads(line) == {"text": text, "kept": "東京"}
    assert "東京" in line
