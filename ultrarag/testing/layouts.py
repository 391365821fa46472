"""Tiny random copies of the embedding models that people use, in the files and with the prompts of the published ones.

Each is a body with the folders of sentence-transformers around it. `LAYOUTS` names them by family.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.testing.tiny import MAX_LENGTH, random_model, tiny_config, tiny_tokenizer, write_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Hidden size of all bodies.
WIDTH = 32
_INSTRUCT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
#: transformers' class and the special tokens of its tokenizer -> what its configuration says beside the sizes.
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Layout:
    """A family: its body, and what sentence-transformers' files say of it."""

    #: transformers' class, without "Model"
    body: str
    #: of the tokenizer's special tokens: bert, roberta or decoder
    style: str = "bert"
    #: sentence-transformers' name of the pooling; empty: the folder has no modules.json
    pooling: str = "mean"
    normalize: bool = True
    #: output sizes of Dense projections
    dense: Sequence[int] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str | None = "cosine"
    truncate_dim: int | None = None
    #: of the body's configuration
    config: Mapping[str, Any] = field(default_factory=dict)
    #: the tokenizer ends texts with this token, which is not its end token
    closing: str = ""
    padding_side: str = "right"
    #: of config.json, where it is not the body's own name
    architecture: str = ""
    #: the adapter that runs it best
    adapter: str = "bge"
    #: the one that is chosen where none is named; None: the same, empty: one has to be named
    chosen: str | None = None
    #: a published model of the family
    example: str = ""


def write_layout(folder: Path, layout: Layout, seed: int = 0) -> None:
    """Write a tiny copy into `folder`."""
    import transformers

    tokenizer = _tokenizer(layout)
    kind = getattr(transformers, f"{layout.body}Model")
    config = tiny_config(kind.config_class, tokenizer, **layout.config)
    write_model(folder, random_model(kind, config, seed), tokenizer)
    if layout.architecture:
        _change(folder / "config.json", {"architectures": [layout.architecture]})
    if layout.pooling:
        _write_modules(folder, layout, seed)


def _tokenizer(layout: Layout) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(layout.style)
    tokenizer.padding_side = layout.padding_side
    tokenizer.init_kwargs["padding_side"] = layout.padding_side  # what is saved
    if layout.closing:
        from tokenizers.processors import TemplateProcessing

        tokenizer.add_special_tokens({"additional_special_tokens": [layout.closing]})
        number = tokenizer.convert_tokens_to_ids(layout.closing)
        template = TemplateProcessing(
            single=f"$A {layout.closing}",
            pair=f"$A {layout.closing} $B {layout.closing}",
            special_tokens=[(layout.closing, number)],
        )
        tokenizer.backend_tokenizer.post_processor = template
        tokenizer.pad_token = layout.closing
    return tokenizer


def _write_modules(folder: Path, layout: Layout, seed: int) -> None:
    pooling = {"embedding_dimension": WIDTH, "pooling_mode": layout.pooling, "include_prompt": True}
    parts: list[tuple[str, str, dict[str, Any]]] = [("Transformer", "", {}), ("Pooling", "1_Pooling", pooling)]
    widths = [WIDTH, *layout.dense]
    for number, (before, after) in enumerate(zip(widths, layout.dense, strict=False)):
        path = f"{len(parts)}_Dense"
        _write_dense(folder / path, before, after, seed + number)
        parts.append(("Dense", path, _dense_config(before, after)))
    if layout.normalize:
        parts.append(("Normalize", f"{len(parts)}_Normalize", {}))
    rows = []
    for number, (kind, path, config) in enumerate(parts):
        row = {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        rows.append(row)
        if path:
            (folder / path).mkdir(exist_ok=True)
            _dump(folder / path / "config.json", config)
    _dump(folder / "modules.json", rows)
    _dump(folder / "sentence_bert_config.json", {"max_seq_length": MAX_LENGTH, "do_lower_case": False})
    declared: dict[str, Any] = {
        "prompts": dict(layout.prompts),
        "default_prompt_name": layout.default_prompt,
        "similarity_fn_name": layout.similarity,
    }
    if layout.truncate_dim is not None:
        declared["truncate_dim"] = layout.truncate_dim
    _dump(folder / "config_sentence_transformers.json", declared)


def _dense_config(before: int, after: int) -> dict[str, Any]:
    activation = "torch.nn.modules.linear.Identity"
    return {"in_features": before, "out_features": after, "bias": False, "activation_function": activation}


def _write_dense(folder: Path, before: int, after: int, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    weight = torch.randn(after, before, generator=torch.Generator().manual_seed(seed)) * before**-0.5
    save_file({"linear.weight": weight}, folder / "model.safetensors", {"format": "pt"})


def _change(path: Path, changes: Mapping[str, Any]) -> None:
    _dump(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_QWEN3 = Layout(
    "Qwen3",
    style="decoder",
    pooling="lasttoken",
    prompts={"query": _INSTRUCT, "document": ""},
    config=_GROUPED,
    closing="<|endoftext|>",
    padding_side="left",
    architecture="Qwen3ForCausalLM",
    adapter="icl",
    chosen="bge",
    example="Qwen/Qwen3-Embedding-0.6B",
)

#: Family -> its layout.
LAYOUTS: dict[str, Layout] = {
    "MiniLM": Layout("Bert", example="sentence-transformers/all-MiniLM-L6-v2"),
    "bge": Layout(
        "Bert",
        pooling="cls",
        prompts={"query": "Represent this sentence for searching passages: "},
        example="BAAI/bge-base-en-v1.5",
    ),
    "e5": Layout(
        "XLMRoberta",
        style="roberta",
        prompts={"query": "query: ", "passage": "passage: "},
        example="intfloat/multilingual-e5-base",
    ),
    "mpnet": Layout("MPNet", style="roberta", example="sentence-transformers/all-mpnet-base-v2"),
    "multi-qa-dot": Layout(
        "Bert",
        pooling="cls",
        normalize=False,
        similarity="dot",
        example="sentence-transformers/multi-qa-mpnet-base-dot-v1",
    ),
    "Qwen3-Embedding": _QWEN3,
    "harrier-oss": Layout(
        **{
            **{name: getattr(_QWEN3, name) for name in _QWEN3.__dataclass_fields__},
            "prompts": {"web_search_query": f"{_INSTRUCT} ", "sts_query": "Instruct: Retrieve similar text\nQuery: "},
            "default_prompt": "web_search_query",
            "example": "",
        }
    ),
    "EmbeddingGemma": Layout(
        "Gemma3Text",
        style="decoder",
        dense=(48, WIDTH),
        prompts={
            "query": "task: search result | query: ",
            "document": "title: none | text: ",
            "Clustering": "task: clustering | query: ",
            "STS": "task: sentence similarity | query: ",
        },
        config={"num_key_value_heads": 1, "head_dim": 8, "use_bidirectional_attention": True},
        example="google/embeddinggemma-300m",
    ),
    "Nemotron-3-Embed": Layout(
        "Ministral3",
        style="decoder",
        prompts={"query": "query: ", "passage": "passage: "},
        config={**_GROUPED, "is_causal": False},
    ),
    "KaLM": Layout(
        "Qwen2",
        style="decoder",
        prompts={"query": "Instruct: Given a query, retrieve documents that answer the query\nQuery: ", "document": ""},
        config={"num_key_value_heads": 2, "is_causal": False},
        architecture="Qwen2ForCausalLM",
    ),
    "gte-modernbert": Layout("ModernBert", pooling="cls", example="Alibaba-NLP/gte-modernbert-base"),
    "gte-multilingual": Layout("Gte", style="roberta", pooling="cls", example="Alibaba-NLP/gte-multilingual-base"),
    "nomic-embed": Layout(
        "NomicBert",
        prompts={"query": "search_query: ", "document": "search_document: "},
        example="nomic-ai/nomic-embed-text-v1.5",
    ),
    "jina-v3": Layout(
        "JinaEmbeddingsV3",
        style="roberta",
        prompts={"retrieval.query": "Represent the query for retrieving evidence documents: ", "separation": ""},
        example="jinaai/jina-embeddings-v3",
    ),
    "EuroBERT": Layout("EuroBert", config=_GROUPED, example="EuroBERT/EuroBERT-210m"),
    "matryoshka": Layout("Bert", truncate_dim=16),
    "Qwen3 without modules.json": Layout(
        "Qwen3",
        style="decoder",
        pooling="",
        config=_GROUPED,
        padding_side="left",
        architecture="Qwen3ForCausalLM",
        chosen="",
    ),
    "sentence-t5": Layout(
        "T5Encoder",
        style="roberta",
        dense=(48,),
        config={"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        adapter="sentence-transformers",
        example="sentence-transformers/sentence-t5-base",
    ),
    "max pooling": Layout("Bert", pooling="max", adapter="sentence-transformers"),
}


def layout(name: str) -> Callable[[Path], None]:
    """The builder of a family's tiny copy."""
    return lambda folder: write_layout(folder, LAYOUTS[name])
