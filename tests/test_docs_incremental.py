"""The commands of docs/incremental.md, run as written on a tiny model, in the order of the page."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from tests.finetune.test_run import ROWS
from tests.test_readme import ROOT, small
from ultrarag.checkpoint.manifest import read_manifest
from ultrarag.cli import main
from ultrarag.finetune.__main__ import main as finetune

PAGE = (ROOT / "docs" / "incremental.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
FILES = {"train": ROWS, "held_out": ROWS[:8], "guard": ROWS[8:16], "new": [{"query": "q", "pos": ["a"]}, *ROWS[:3]]}


def call(words: list[str]) -> int:
    """Run a command in this process: starting Python anew for each takes seconds."""
    if words[0] == "ultrarag":
        return main(words[1:])
    assert words[:3] == ["python", "-m", "ultrarag.finetune.bgem3"]
    return finetune(words[3:], adapter="bgem3")


def test_commands_of_the_page(tiny_m3, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, rows in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    passages = [{"_id": f"p{n}", "text": row["pos"][0]} for n, row in enumerate(ROWS)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").strip().splitlines():
            assert call(shlex.split(small(line, tiny_m3))) == 0, capsys.readouterr().err
    assert read_manifest(tmp_path / "checkpoints" / "2").training.merge["with"] == "parent"
    assert "replay" in capsys.readouterr().out


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`--(\w+)", PAGE))))
def test_every_flag_of_the_page_exists(flag):
    from ultrarag.finetune.flags.arguments import _settings

    assert flag in _settings()
