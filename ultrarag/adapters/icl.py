"""icl: embedders that are decoders and read a task's instruction: bge-en-icl, e5-mistral and their like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.adapters.hooks import EmbedderAdapter
from ultrarag.hookspecs import LoadOptions, hookimpl

if TYPE_CHECKING:
    from torch import nn


class ICLAdapter(EmbedderAdapter):
    """A causal backbone whose vector is the hidden state of the end token, which closes every text.

    The instruction says what the query is for; it comes from the run, the call, or a row's `prompt`, and is put into
    the format that the model was trained with. Few-shot examples, which bge-en-icl can read, are a `query_format` that
    begins with them. Passages are raw.

    Source:
        bge-en-icl (Li et al., 2024); e5-mistral-7b-instruct (Wang et al., 2024).
    """

    heads = ("dense",)

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load the backbone, and see to it that its tokenizer ends each text with the end token."""
        from ultrarag.adapters.icl_model import load_icl

        return load_icl(path, options, self.heads)


adapter = ICLAdapter()
