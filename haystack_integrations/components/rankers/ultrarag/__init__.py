"""A ranker: a cross-encoder, or any other encoder, puts documents in the order of their relevance."""

import haystack_integrations.document_stores.ultrarag  # says how to install Haystack where it is missing
from haystack_integrations.components.rankers.ultrarag.ranker import UltraRAGRanker

__all__ = ["UltraRAGRanker"]
