"""Our blocks of docs/coming-from.md, run as written on tiny models; those of others run in tests/doors/coming_from."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.finetune.test_run import ROWS
from tests.test_readme import ROOT
from ultrarag.checkpoint.manifest import read_manifest
from ultrarag.finetune.__main__ import main as finetune
from ultrarag.finetune.flags.aliases import old_flags
from ultrarag.finetune.flags.arguments import _settings

PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n# ultrarag\n(.*?)```", PAGE, flags=re.S)
WHOSE = ("ultrarag", "sentence-transformers", "FlagEmbedding", "RAG-Retrieval", "Tevatron")


@pytest.fixture(scope="module")
def reranker(tmp_path_factory, tiny_m3) -> str:
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    folder = tmp_path_factory.mktemp("reranker")
    shutil.copytree(
        tiny_m3, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.pt", "*.bin")
    )
    config = XLMRobertaConfig.from_pretrained(tiny_m3, num_labels=1)
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with the files that the page names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows").mkdir()
    shutil.copy("train.jsonl", "rows")
    return tmp_path


@pytest.mark.parametrize(("language", "block"), BLOCKS, ids=[f"block {number}" for number in range(len(BLOCKS))])
def test_our_blocks(language, block, folder, tiny_m3, reranker):
    text = block.replace("sentence-transformers/all-MiniLM-L6-v2", tiny_m3).replace("BAAI/bge-reranker-base", reranker)
    if language == "python":
        exec(compile(text, "docs/coming-from.md", "exec"), {})
        return
    words = shlex.split(text.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "ultrarag.finetune.bge"]
    assert finetune(words[3:], adapter="bge") == 0
    arguments = read_manifest(folder / words[words.index("--output_dir") + 1]).training.arguments
    assert (arguments["data"]["query_max_len"], arguments["data"]["train_group_size"]) == (32, 2)


def test_every_block_says_whose_it_is():
    first = re.findall(r"```(?:python|bash)\n(.*)\n", PAGE)
    assert set(first) == {f"# {name}" for name in WHOSE}


def test_every_flag_of_the_tables_is_taken():
    table = PAGE[PAGE.index("| theirs |") : PAGE.index("What a flag became")]
    flags = re.findall(r"`--(\w+)", table)
    assert len(flags) > 40
    assert [flag for flag in flags if flag not in {**_settings(), **old_flags(_settings())}] == []
