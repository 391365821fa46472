"""StaticEmbedder: one trained vector per token, of which a text has the mean; no transformer, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrarag.adapters.embedder import first_dimensions
from ultrarag.adapters.embedder_files import read_settings
from ultrarag.adapters.sentence_transformers_files import ModulesDeclaration, prompts_of, read_model_config, write_json
from ultrarag.adapters.sentence_transformers_routes import plain_tokenizer, without_empty
from ultrarag.claims import ModelFolder, library_module
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.types import Embeddings, EncoderSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ultrarag.hookspecs import Features, LoadOptions

#: Where the rows lie: StaticEmbedding of sentence-transformers, and model2vec.
_KEYS = ("embedding.weight", "embeddings")


class StaticEmbedder(nn.Module):
    """A table with a row per token id; state-dict key: `backbone.weight`, (tokens, dim)."""

    def __init__(self, table: Tensor, tokenizer: PreTrainedTokenizerFast, settings: EncoderSettings) -> None:
        from transformers import PretrainedConfig

        super().__init__()
        self.backbone = nn.Embedding.from_pretrained(table, freeze=False)
        self.tokenizer = tokenizer
        self.settings = settings
        sizes: dict[str, Any] = {"hidden_size": table.shape[1], "vocab_size": table.shape[0]}
        self.config = PretrainedConfig(**sizes)
        #: the files beside the weights that are kept as they were, by name
        self.files: dict[str, str] = {}

    def encode(self, features: Features) -> Embeddings:
        """The mean of the tokens' rows; of a text without tokens zero, as in sentence-transformers."""
        ids, table = features["input_ids"], self.backbone.weight
        mask = without_empty(ids, features["attention_mask"], self.tokenizer.pad_token_id)
        share = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
        dense = F.embedding_bag(ids, table, mode="sum", per_sample_weights=share.to(table.dtype))
        if self.settings.truncate_dim is not None:
            dense = first_dimensions(dense, self.settings.truncate_dim)
        return Embeddings(dense=F.normalize(dense, dim=-1) if self.settings.normalize else dense)


def unknown_modules(folder: ModelFolder) -> list[str]:
    """The modules after the table that are not run here; there may be a Normalize."""
    return [row["type"] for row in folder.modules[1:] if library_module(row["type"]) != "Normalize"]


def load_static(path: str, options: LoadOptions) -> StaticEmbedder:
    """Load the layout of StaticEmbedding, or of model2vec with or without `modules.json`.

    Raises:
        CheckpointError: another layout, modules that are not run here, or fewer rows than the tokenizer has tokens.
    """
    folder = ModelFolder(path)
    if folder.family.name != "static" or (unknown := unknown_modules(folder)):
        found = f"has the module {unknown[0]}" if folder.family.name == "static" else f"is {folder.family}"
        raise CheckpointError(f"{path} {found}: this adapter runs StaticEmbedding with or without Normalize")
    if options.pooling not in (None, "mean"):
        raise UsageError(f"sentence_pooling_method '{options.pooling}': static embeddings have the mean alone")
    from tokenizers import Tokenizer

    inner = folder.path / (str(folder.modules[0]["path"]) if folder.modules else "")
    table = _read_table(inner)
    tokenizer, length = plain_tokenizer(Tokenizer.from_file(str(inner / "tokenizer.json")), inner)
    if len(tokenizer) > len(table):
        raise CheckpointError(f"{inner}: the tokenizer has {len(tokenizer)} tokens and the table {len(table)} rows")
    model = StaticEmbedder(table, tokenizer, read_settings(_declared(folder, length), options))
    for name in ("config.json", "config_sentence_transformers.json"):
        if folder.has(name):
            model.files[name] = (folder.path / name).read_text(encoding="utf-8")
    model.files["tokenizer.json"] = (inner / "tokenizer.json").read_text(encoding="utf-8")
    return model


def _declared(folder: ModelFolder, length: int | None) -> ModulesDeclaration:
    normalize = len(folder.modules) > 1 if folder.modules else bool(folder.config.get("normalize"))
    return ModulesDeclaration(
        pooling="mean",
        normalize=normalize,
        max_length=length,
        config=read_model_config(folder.path),
    )


def _read_table(folder: Path) -> Tensor:
    """A row per token id, (tokens, dim) float32; model2vec may keep few rows, and per token its row and a weight."""
    if (folder / "model.safetensors").is_file():
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").is_file():
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    else:
        raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    name = next((key for key in _KEYS if key in weights), None)
    if name is None:
        raise CheckpointError(f"{folder}: the weights hold {', '.join(sorted(weights))}, and neither of {_KEYS}")
    table = weights[name].float()
    if "mapping" in weights:
        table = table[weights["mapping"].long()]
    if "weights" in weights:
        table = table * weights["weights"].float()[:, None]
    return table.contiguous()


def save_static(model: StaticEmbedder, path: str, state_dict: Mapping[str, Any]) -> None:
    """Write what sentence-transformers loads, and model2vec where it came from there."""
    from safetensors.torch import save_file

    folder = Path(path)
    for name, content in model.files.items():
        (folder / name).write_text(content, encoding="utf-8")
    key = _KEYS["config.json" in model.files]
    save_file({key: state_dict["backbone.weight"].detach().cpu().float().contiguous()}, folder / "model.safetensors")
    kinds = {"": "StaticEmbedding", **({"1_Normalize": "Normalize"} if model.settings.normalize else {})}
    modules = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for number, (place, kind) in enumerate(kinds.items())
    ]
    write_json(folder / "modules.json", modules)
    if model.settings.normalize:
        (folder / "1_Normalize").mkdir()
        write_json(folder / "1_Normalize" / "config.json", {})
    library = json.loads(model.files.get("config_sentence_transformers.json", "{}"))
    settings = model.settings
    library |= {"prompts": prompts_of(settings), "default_prompt_name": settings.default_prompt}
    library["similarity_fn_name"] = settings.similarity or ("cosine" if settings.normalize else "dot")
    if settings.truncate_dim is not None:
        library["truncate_dim"] = settings.truncate_dim
    write_json(folder / "config_sentence_transformers.json", library)
