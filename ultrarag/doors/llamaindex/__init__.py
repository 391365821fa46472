"""LlamaIndex over a live index: embedding, vector store, retriever, reranker, and fine-tuning that refreshes it.

Nodes, filters and queries of LlamaIndex come in; passages and searches of a `LiveIndex` go out, and nodes with scores
come back. It needs the package llama-index-core: `pip install 'ultrarag-retrieval[llamaindex]'`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ultrarag.lazy import exports
from ultrarag.packages import install

if TYPE_CHECKING:
    from ultrarag.doors.llamaindex.embedding import UltraRAGEmbedding
    from ultrarag.doors.llamaindex.finetuning import UltraRAGFinetuneEngine
    from ultrarag.doors.llamaindex.reranker import UltraRAGRerank
    from ultrarag.doors.llamaindex.retriever import FoundNode, UltraRAGRetriever
    from ultrarag.doors.llamaindex.store import UltraRAGVectorStore
else:
    if find_spec("llama_index") is None or find_spec("llama_index.core") is None:
        raise ImportError(f"ultrarag.doors.llamaindex needs LlamaIndex: {install('llama-index-core')}")
    __getattr__, __dir__, __all__ = exports(__name__)
