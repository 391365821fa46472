"""bgem3: BAAI/bge-m3 (dense, sparse and ColBERT), or the same heads over any transformers encoder."""

from __future__ import annotations

from ultrarag.adapters.hooks import EmbedderAdapter


class BGEM3Adapter(EmbedderAdapter):
    """Dense vector of CLS, lexical weights, and one ColBERT vector per token.

    Source:
        M3-Embedding (Chen et al., 2024); head files as in FlagEmbedding 1.4.2.
    """

    heads = ("dense", "sparse", "colbert")
    threaded_encode = True


adapter = BGEM3Adapter()
