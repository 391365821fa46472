"""bge: one dense vector per text; bge, e5, gte, MiniLM and whatever `modules.json` of the same kind describes."""

from __future__ import annotations

from ultrarag.adapters.hooks import EmbedderAdapter


class BGEAdapter(EmbedderAdapter):
    """Pooling (cls, mean, last_token, weighted_mean), prompts and normalisation as the checkpoint declares."""

    heads = ("dense",)
    threaded_encode = True


adapter = BGEAdapter()
