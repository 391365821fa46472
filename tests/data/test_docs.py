"""docs/data.md: its commands and code run as written, in the order of the page; every command and finding is in it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.data.files import write
from tests.finetune.test_run import ROWS
from ultrarag.cli import main
from ultrarag.data.cli import COMMANDS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", PAGE, flags=re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with the files that the page names."""
    path = tmp_path_factory.mktemp("data")
    scored = [{**row, "pos_scores": [0.9], "neg_scores": [0.3, 0.85]} for row in ROWS]
    write(path / "train.jsonl", *scored[:17])
    write(path / "held_out.jsonl", *({**row, "query": f"held out {n}"} for n, row in enumerate(ROWS[17:])))
    write(path / "pairs.csv", "question,answer", "what is bread?,baked dough", '"and, steam?",water')
    return path


@pytest.mark.parametrize(("language", "block"), BLOCKS, ids=lambda text: text.strip().splitlines()[0][:50])
def test_block(language, block, folder, tiny_m3, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if language == "python":
        exec(block, {})
        return
    for line in block.replace("\\\n", " ").replace("BAAI/bge-m3", tiny_m3).splitlines():
        program, *words = shlex.split(line)
        assert program == "ultrarag"
        assert main(words) == 0, capsys.readouterr()


def test_every_command_is_described():
    for name in COMMANDS:
        assert f"| `{name}` |" in PAGE


def test_every_finding_is_described():
    sources = Path(__file__).parents[2] / "ultrarag"
    files = [
        sources / "finetune" / "check.py",
        *(sources / "rows" / "checks").glob("*.py"),
        sources / "data" / "checking.py",
    ]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    names = set(re.findall(r'"(?:error|warning)", "([a-z_]+)"|self\.level, "([a-z_]+)"', code))
    names |= {(name, "") for name in re.findall(r'_rows_of\(\s*[\w.]+,\s*"([a-z_]+)"', code)}
    found = {a or b for a, b in names}
    assert len(found) >= 10
    assert [name for name in sorted(found) if f"`{name}`" not in PAGE] == []
