"""LangChain: embeddings, a vector store, a retriever and a reranker over a live index.

Calls of `langchain_core` come in. All of them follow a swap: nothing is made anew when the index has another encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports
from ultrarag.packages import install

try:
    import langchain_core
except ModuleNotFoundError as error:
    raise ImportError(f"ultrarag.doors.langchain needs langchain-core: {install('langchain-core')}") from error

if TYPE_CHECKING:
    from ultrarag.doors.langchain.embeddings import UltraRAGEmbeddings
    from ultrarag.doors.langchain.reranker import UltraRAGReranker
    from ultrarag.doors.langchain.retriever import UltraRAGRetriever
    from ultrarag.doors.langchain.store import UltraRAGVectorStore
else:
    __getattr__, __dir__, __all__ = exports(__name__)
