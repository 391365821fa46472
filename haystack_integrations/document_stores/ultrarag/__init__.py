"""A live index as Haystack's document store, and what its components share."""

try:
    import haystack
except ImportError as error:
    from ultrarag.packages import install

    raise ImportError(
        f"the Haystack door needs Haystack, which is not installed here: {install('haystack-ai')}"
    ) from error

from haystack_integrations.document_stores.ultrarag.converters import Vector
from haystack_integrations.document_stores.ultrarag.document_store import UltraRAGDocumentStore

__all__ = ["UltraRAGDocumentStore", "Vector"]
