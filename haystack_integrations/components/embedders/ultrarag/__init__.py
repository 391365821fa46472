"""Embedders: a checkpoint of UltraRAG, or the live encoder of a store, wherever Haystack wants vectors."""

import haystack_integrations.document_stores.ultrarag  # says how to install Haystack where it is missing
from haystack_integrations.components.embedders.ultrarag.document_embedder import UltraRAGDocumentEmbedder
from haystack_integrations.components.embedders.ultrarag.text_embedder import UltraRAGTextEmbedder

__all__ = ["UltraRAGDocumentEmbedder", "UltraRAGTextEmbedder"]
