"""Tiny late-interaction models in the three published layouts, each of the same weights."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from ultrarag.testing.tiny import random_model, tiny_config, tiny_tokenizer, write_model

#: The layouts, as `tiny_colbert` takes them.
COLBERT_LAYOUTS = ("pylate", "stanford", "sentence-transformers")
#: Sizes of the tiny models: token vectors, and the tokens of queries and passages.
WIDTH, QUERY_LENGTH, PASSAGE_LENGTH = 16, 24, 64


def tiny_colbert(folder: Path, layout: str = "pylate", attend: bool = False, seed: int = 0) -> None:
    """A BERT with a projection; `attend`: other tokens see the mask tokens that fill a query."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer("bert")
    markers = ["[unused0]", "[unused1]"] if layout == "stanford" else ["[Q] ", "[D] "]
    if layout == "sentence-transformers":
        tokenizer.add_special_tokens({"additional_special_tokens": markers})
    else:
        tokenizer.add_tokens(markers)
    model = random_model(BertModel, tiny_config(BertConfig, tokenizer), seed)
    write_model(folder, model, tokenizer)
    weight = torch.randn(WIDTH, 32, generator=torch.Generator().manual_seed(seed)) * 32**-0.5
    if layout == "stanford":
        _write_stanford(folder, model, weight, attend)
    else:
        _write_modules(folder, layout, weight, attend)


def _write_stanford(folder: Path, model: Any, weight: Any, attend: bool) -> None:
    from safetensors.torch import save_file

    weights = {f"bert.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file({**weights, "linear.weight": weight}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _dump(folder / "config.json", {**config, "architectures": ["HF_ColBERT"]})
    metadata = {
        "query_token_id": "[unused0]",
        "doc_token_id": "[unused1]",
        "query_maxlen": QUERY_LENGTH,
        "doc_maxlen": PASSAGE_LENGTH,
        "attend_to_mask_tokens": attend,
        "mask_punctuation": True,
    }
    _dump(folder / "artifact.metadata", metadata)


def _write_modules(folder: Path, layout: str, weight: Any, attend: bool) -> None:
    from safetensors.torch import save_file

    native = layout == "sentence-transformers"
    base = "sentence_transformers.base.modules"
    kinds = {
        "": f"{base}.transformer.Transformer" if native else "sentence_transformers.models.Transformer",
        "1_Dense": f"{base}.dense.Dense" if native else "pylate.models.Dense.Dense",
    }
    dense: dict[str, Any] = {"in_features": 32, "out_features": WIDTH, "bias": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    configs: dict[str, dict[str, Any]] = {"1_Dense": {**dense, **(names if native else {"use_residual": False})}}
    if native:
        kinds["2_MultiVectorMask"] = "sentence_transformers.multi_vector_encoder.modules.MultiVectorMask"
        kinds["3_Normalize"] = f"{base}.normalize.Normalize"
        configs["2_MultiVectorMask"] = {"skiplist_words": list(string.punctuation), "skiplist_tasks": ["document"]}
        configs["3_Normalize"] = names
    for place, config in configs.items():
        (folder / place).mkdir()
        _dump(folder / place / "config.json", config)
    save_file({"linear.weight": weight}, folder / "1_Dense" / "model.safetensors", {"format": "pt"})
    rows = enumerate(kinds.items())
    _dump(folder / "modules.json", [{"idx": n, "name": str(n), "path": p, "type": kind} for n, (p, kind) in rows])
    _dump(folder / "config_sentence_transformers.json", _native_library() if native else _pylate_library(attend))
    _dump(folder / "sentence_bert_config.json", _native_transformer(attend) if native else _PYLATE_TRANSFORMER)


def _native_library() -> dict[str, Any]:
    prompts = {"query": "[Q] ", "document": "[D] "}
    return {"model_type": "MultiVectorEncoder", "prompts": prompts, "similarity_fn_name": "maxsim"}


def _pylate_library(attend: bool) -> dict[str, Any]:
    return {
        "model_type": "ColBERT",
        "prompts": {"query": "", "document": ""},
        "similarity_fn_name": "MaxSim",
        "query_prefix": "[Q] ",
        "document_prefix": "[D] ",
        "query_length": QUERY_LENGTH,
        "document_length": PASSAGE_LENGTH,
        "do_query_expansion": True,
        "attend_to_expansion_tokens": attend,
        "skiplist_words": list(string.punctuation),
    }


#: PyLate's own lengths decide; this is the backbone's.
_PYLATE_TRANSFORMER = {"max_seq_length": PASSAGE_LENGTH - 1, "do_lower_case": False}


def _native_transformer(attend: bool) -> dict[str, Any]:
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": output},
        "module_output_name": "token_embeddings",
        "document_length": PASSAGE_LENGTH,
        "query_expansion": {"strategy": "fixed", "attend": attend, "token": None, "length": QUERY_LENGTH},
    }


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
