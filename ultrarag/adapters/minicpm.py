"""minicpm-embedding: openbmb's MiniCPM-Embedding (dense) and MiniCPM-Embedding-Light (dense and sparse)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ultrarag.adapters.hooks import EmbedderAdapter
from ultrarag.hookspecs import LoadOptions, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from ultrarag.adapters.minicpm_model import MiniCPMEmbedder


class MiniCPMAdapter(EmbedderAdapter):
    """The published checkpoints as a stock transformers model: no remote code.

    Queries are read as `Query: {query}`; an instruction given to a fine-tuning run
    (`--query_instruction_for_retrieval`) as `Instruction: {instruction} Query: {query}`; passages are raw.

    Source:
        Model cards of openbmb/MiniCPM-Embedding and openbmb/MiniCPM-Embedding-Light.
    """

    heads = ("dense", "sparse")
    finetune_defaults = {"query_instruction_format": "Instruction: {} Query: {}"}  # noqa: RUF012

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load a published checkpoint, or one that was fine-tuned here."""
        from ultrarag.adapters.minicpm_model import load_minicpm

        return load_minicpm(path, options, self.heads)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write a Granite checkpoint that transformers and sentence-transformers load without remote code."""
        from ultrarag.adapters.minicpm_model import save_minicpm

        save_minicpm(cast("MiniCPMEmbedder", model), path, state_dict)


adapter = MiniCPMAdapter()
