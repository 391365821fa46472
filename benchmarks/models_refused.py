"""What is refused, with the words of the refusal: the second table of docs/models.md, which `models.py` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ultrarag import Encoder
from ultrarag.errors import UltraragError
from ultrarag.finetune import finetune
from ultrarag.hookspecs import LoadOptions
from ultrarag.testing import tiny
from ultrarag.testing.tiny_causal import tiny_causal_reranker
from ultrarag.testing.tiny_colbert import tiny_colbert

ROWS = [{"query": "seals", "pos": ["Seals sleep under water."], "neg": ["Bread needs an oven."]}]
#: A chat template that writes a user's words, and nothing of a pair.
CHAT = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"


def change(folder: Path, name: str, **values: Any) -> None:
    """Set values in a JSON file of a model."""
    file = folder / name
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**held, **values}), encoding="utf-8")


def changed(folder: Path, make: Callable[[Path], object], name: str, **values: Any) -> None:
    """A model with other values in one of its JSON files."""
    make(folder)
    change(folder, name, **values)


def with_a_token_more(folder: Path) -> None:
    """A BERT whose tokenizer knows a token that it does not."""
    from transformers import AutoTokenizer

    tiny.tiny_bert(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[NEW]"])
    tokenizer.save_pretrained(folder)


def causal(folder: Path, chat: str = "", layout: str = "qwen3-original") -> None:
    """A Qwen3 without a card that says what it is for, with a chat template."""
    tiny_causal_reranker(folder, layout)
    (folder / "README.md").unlink(missing_ok=True)
    if chat:
        (folder / "chat_template.jinja").write_text(chat, encoding="utf-8")


def lora(folder: Path) -> None:
    """LoRA matrices whose base is nowhere."""
    folder.mkdir(exist_ok=True)
    change(folder, "adapter_config.json", base_model_name_or_path="/models/base", peft_type="LORA")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def without_queries(folder: Path) -> None:
    """A Router of which no route is for queries."""
    tiny.tiny_router(folder, "dense")
    file = folder / "router_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"query"', '"left"'), encoding="utf-8")


def load(folder: Path, adapter: str | None = None, pooling: str | None = None) -> None:
    """Read a model."""
    Encoder.load(folder, adapter, device="cpu", options=LoadOptions(pooling=pooling))


def train(folder: Path, **options: Any) -> None:
    """Fine-tune a model for a step."""
    run = {"use_cpu": True, "max_steps": 1, "train_group_size": 2, "skip_data_check": True, "disable_tqdm": True}
    finetune(folder, ROWS, folder.with_name("out"), **{**run, **options})


@dataclass(frozen=True)
class Refused:
    """A model, and what cannot be done with it."""

    write: Callable[[Path], object]
    ask: Callable[[Path], object] = load


_LABELS = partial(
    changed,
    make=tiny.tiny_masked_lm,
    name="config.json",
    architectures=["BertForSequenceClassification"],
    id2label={"0": "no", "1": "yes"},
)

_FROZEN = partial(changed, make=tiny.tiny_router, name="query_0_SparseStaticEmbedding/config.json", frozen=True)
REFUSED = {
    "SPLADE with `bge`": Refused(tiny.tiny_splade, partial(load, adapter="bge")),
    "late interaction with `bge`": Refused(partial(tiny_colbert, layout="stanford"), partial(load, adapter="bge")),
    "a reranker in an embedder's place": Refused(tiny.tiny_cross_encoder, partial(load, adapter="bgem3")),
    "an embedder in a reranker's place": Refused(tiny.tiny_splade, partial(load, adapter="bge-reranker")),
    "Qwen3-Reranker with `bge-reranker-gemma`": Refused(
        partial(tiny_causal_reranker, layout="qwen3"), partial(load, adapter="bge-reranker-gemma")
    ),
    "a classifier with several labels": Refused(_LABELS),
    "a classifier with a general chat template": Refused(
        partial(causal, chat=CHAT, layout="qwen3-classifier-original")
    ),
    "a language model that says nothing more": Refused(partial(causal, chat=CHAT)),
    "cls pooling of a causal model": Refused(partial(causal, chat=CHAT), partial(load, adapter="bge", pooling="cls")),
    "T5 with `bge`": Refused(
        partial(
            changed,
            make=tiny.tiny_bert,
            name="config.json",
            architectures=["T5EncoderModel"],
            model_type="t5",
            is_encoder_decoder=True,
        ),
        partial(load, adapter="bge"),
    ),
    "max pooling with `bge`": Refused(
        partial(changed, make=tiny.tiny_bert, name="1_Pooling/config.json", pooling_mode="max"),
        partial(load, adapter="bge"),
    ),
    "a tokenizer with more tokens than the model": Refused(with_a_token_more),
    "LoRA matrices without their base": Refused(lora),
    "code of its own without consent": Refused(tiny.tiny_remote_code),
    "inference-free SPLADE without modules.json": Refused(
        partial(changed, make=tiny.tiny_masked_lm, name="idf.json", water=1.5)
    ),
    "a Router without a way for queries": Refused(without_queries),
    "training queries that are read by a frozen table": Refused(_FROZEN, partial(train, train_side="query")),
    "LoRA of a static model": Refused(tiny.tiny_static, partial(train, use_lora=True)),
    "fewer lexical weights of a dense model": Refused(tiny.tiny_bert, partial(train, document_regularizer_weight=1e-3)),
}


def words(refused: Refused, place: Path) -> str:
    """What is said, the model's folder called MODEL; empty where nothing was refused."""
    folder = place / "model"
    folder.mkdir()
    refused.write(folder)
    try:
        refused.ask(folder)
    except UltraragError as error:
        return str(error).replace(str(folder), "MODEL").replace("\n", " ")
    return ""


def table(found: dict[str, str]) -> str:
    """The page's table, one line for each."""
    cells = {what: said.replace("|", "\\|").replace("`", "'") for what, said in found.items()}
    lines = [f"| {what} | `{said}` |" if said else f"| {what} | **not refused** |" for what, said in cells.items()]
    return "\n".join(["| what | words |", "|---|---|", *lines])
