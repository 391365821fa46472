"""docs/data-mining.md and docs/data-synthesize.md: their commands and code run as written, in order."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.data.test_synthesize import NAMES, StandIn
from ultrarag.cli import main
from ultrarag.testing.tiny import tiny_cross_encoder

PAGES = {
    name: (Path(__file__).parents[2] / "docs" / f"{name}.md").read_text() for name in ("data-mining", "data-synthesize")
}
BLOCKS = [
    (name, *block) for name, page in PAGES.items() for block in re.findall(r"```(bash|python)\n(.*?)```", page, re.S)
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_m3):
    """The folder that the pages stand in, and what their names of models and servers stand for."""
    folder, server = tmp_path_factory.mktemp("docs"), StandIn()
    (folder / "reranker").mkdir()
    tiny_cross_encoder(folder / "reranker")
    passages = [{"_id": str(n), "title": name, "text": f"All about {name} and more."} for n, name in enumerate(NAMES)]
    texts = [{"_id": f"w{n}", "text": f"All about {NAMES[n % 5]}, number {n}. And more."} for n in range(25)]
    rows = [{"query": f"what is {row['title']}?", "pos": [f"{row['title']}\n{row['text']}"]} for row in passages]
    for name, lines in (("corpus", passages + texts), ("train", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    yield (
        folder,
        {
            "BAAI/bge-m3": tiny_m3,
            "BAAI/bge-reranker-v2-m3": str(folder / "reranker"),
            "http://localhost:8000/v1": server.url,
        },
    )
    server.close()


@pytest.mark.parametrize(("page", "language", "block"), BLOCKS, ids=lambda text: text.strip().splitlines()[0][:60])
def test_block(page, language, block, places, monkeypatch, capsys):
    folder, names = places
    monkeypatch.chdir(folder)
    for name, place in names.items():
        block = block.replace(name, place)
    if language == "python":
        exec(block, {})
        return
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("python -m ultrarag.retrieve.mine", "ultrarag data mine"))
        assert words[0] == "ultrarag"
        assert main(words[1:]) == 0, capsys.readouterr()


def test_every_reason_is_described():
    from ultrarag.mining.choice import REASONS

    assert [name for name in REASONS if f"`{name}`" not in PAGES["data-mining"]] == []
