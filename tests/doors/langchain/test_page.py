"""our own: docs/doors.md and examples/langchain, as written"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda

from ultrarag.retrieve import LiveIndex

ROOT = Path(__file__).parents[3]
SECTION = (ROOT / "docs" / "doors.md").read_text(encoding="utf-8").split("\n## LangChain\n")[1].split("\n## ")[0]
ROW = {"query": "vector database", "pos": ["Milvus is a vector database."], "neg": ["Die Oper beginnt um acht."]}


def test_the_page(tiny_m3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_builds) -> None:
    """Its model and language model are tiny ones, and a refresh is short and has no gate."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(ROW) + "\n")
    refresh = LiveIndex.refresh
    quick = {"gate": False, "max_steps": 1, "train_group_size": 2, "learning_rate": 1e-3, "cache_path": "cache"}
    monkeypatch.setattr(LiveIndex, "refresh", lambda live, rows, _, **more: refresh(live, rows, **more, **quick))
    llm = RunnableLambda(lambda asked: asked.to_string())
    names = {"model": tiny_m3, "llm": llm, "prompt": ChatPromptTemplate.from_template("{context} {question}")}
    [block] = re.findall(r"```python\n(.*?)```", SECTION, flags=re.S)
    exec(compile(block, "docs/doors.md", "exec"), names)
    try:
        assert names["found"][0].metadata["ultrarag"]["generation"] == 2
        assert [one.id for one in names["found"]] == ["milvus"]
    finally:
        names["store"].index.close()


@pytest.mark.long
def test_the_example(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "examples" / "langchain" / "chain.py"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    before, refresh, after, added = done.stdout.splitlines()[-4:]
    assert before.startswith("before: generation 1 answers")
    assert refresh.startswith("refresh: swapped")
    assert after == "after: generation 2 answers 8 of 8"
    assert int(before.split()[4]) < 8
    assert "coffee machine is cleaned on Fridays" in added
