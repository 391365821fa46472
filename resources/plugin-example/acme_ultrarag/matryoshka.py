"""An extension that adds a Matryoshka term to the loss of every adapter with dense vectors.

Off unless ACME_MATRYOSHKA_DIMS is set, such as "64,128": an installed package must not change anybody's loss unasked.

Source: Matryoshka Representation Learning (Kusupati et al., 2022).
"""

import os
from dataclasses import replace

from ultrarag import Embeddings, hookimpl


@hookimpl(wrapper=True)
def loss(query, passage, teacher, step, args):
    value = yield
    dims = tuple(int(dim) for dim in os.environ.get("ACME_MATRYOSHKA_DIMS", "").replace(",", " ").split())
    if not dims or query is None or query.dense is None:
        return value
    from ultrarag.losses import embedding_loss

    short = (Embeddings(dense=side.dense) for side in (query, passage))
    return value + embedding_loss(*short, teacher, step, replace(args, use_mrl=True, mrl_dims=dims))
