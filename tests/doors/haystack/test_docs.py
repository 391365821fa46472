"""The page's block and the example: a refresh under a pipeline"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SECTION = (ROOT / "docs" / "doors.md").read_text(encoding="utf-8").split("\n## Haystack\n", 1)[1].split("\n## ", 1)[0]


def test_the_block_of_the_page(tmp_path: Path, minilm: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.S)
    (tmp_path / "page.py").write_text(block.replace('"sentence-transformers/all-MiniLM-L6-v2"', repr(minilm)))
    names = runpy.run_path(str(tmp_path / "page.py"))
    names["pipeline"].close()
    names["store"].close()
    assert capsys.readouterr().out == "Milvus is a vector database. 1\n"


@pytest.mark.long
def test_the_example(tmp_path: Path):
    """Isolated from this process, as people run it."""
    script = ROOT / "examples" / "haystack" / "pipelines.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    before, after, copy = re.findall(r"generation (\d) knows (\d) of 8", done.stdout)
    assert before[0] == "1"
    assert after[0] == copy[0] == "2"
    assert int(before[1]) < int(after[1]) == int(copy[1])
    assert "Pancakes. Three, with maple syrup beside them." in done.stdout
