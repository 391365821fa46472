"""Built-in adapters: plugins like any third party's, reached only through the registry.

`embedders` and `rerankers` hold the hooks and import nothing heavy; the models behind them are in the other files. The
public names are for plugins and tests that build on ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.adapters.embedders import EmbedderAdapter
    from ultrarag.adapters.llm_reranker_model import RERANKER_PROMPT
    from ultrarag.adapters.sentence_transformers_files import compares_by_length, prompts_of, write_declaration
else:
    __getattr__, __dir__, __all__ = exports(__name__)
