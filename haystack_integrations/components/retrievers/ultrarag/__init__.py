"""Retrievers over a live index: by text, or by the embedding of an UltraRAGTextEmbedder."""

import haystack_integrations.document_stores.ultrarag  # says how to install Haystack where it is missing
from haystack_integrations.components.retrievers.ultrarag.embedding_retriever import UltraRAGEmbeddingRetriever
from haystack_integrations.components.retrievers.ultrarag.retriever import UltraRAGRetriever

__all__ = ["UltraRAGEmbeddingRetriever", "UltraRAGRetriever"]
