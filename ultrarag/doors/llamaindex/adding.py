"""Adding nodes: the vectors that they bring are taken where they are the index's own, else refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llama_index.core.schema import BaseNode

from ultrarag.doors.llamaindex.made import made
from ultrarag.doors.llamaindex.nodes import to_passage
from ultrarag.errors import FingerprintError, UsageError
from ultrarag.retrieve import Encoding, LiveIndex
from ultrarag.retrieve.passages import OnExisting
from ultrarag.types import Embeddings, Kind, Passage

#: Vectors of unknown origin that are compared with what the index's encoder makes of their texts, of each call.
COMPARED = 8
#: What such a vector's cosine must at least be: encoders of one family differ by more, batches of one by less.
LEAST_COSINE = 0.9999

ADVICE = "give LlamaIndex the index's own model, embed_model=UltraRAGEmbedding(live), "


def add(live: LiveIndex, nodes: Sequence[BaseNode], on_existing: OnExisting = "replace") -> None:
    """Add nodes, all in one write; where each brings a vector of the live encoder for its text, none is encoded here.

    Raises:
        FingerprintError: a node's vector is another model's; names the node.
        DataError: a node that no index can hold; names it.
    """
    passages = [to_passage(node) for node in nodes]
    with live.encoding() as lent:
        whole = lent.heads == ("dense",)
        own = [_is_own(live, lent, node, passage) for node, passage in zip(nodes, passages, strict=True)]
        unknown = [row for row, known in enumerate(own) if known is None]
        _compare(lent, [nodes[row] for row in unknown], [passages[row].content for row in unknown])
    if not passages or not whole or False in own:
        live.add(passages, on_existing=on_existing)
        return
    vectors = Embeddings(dense=np.asarray([node.embedding for node in nodes], dtype=np.float32))
    try:
        live.add(passages, embeddings=vectors, fingerprint=lent.fingerprint, on_existing=on_existing)
    except FingerprintError:  # another encoder went live since they were looked at
        live.add(passages, on_existing=on_existing)


def _is_own(live: LiveIndex, lent: Encoding, node: BaseNode, passage: Passage) -> bool | None:
    """Whether its vector is the encoder's for the passage; False: it is to be encoded; None: its origin is unknown."""
    if node.embedding is None:
        return False
    origin = made.of(node.embedding, "passage")
    if origin is None:
        return None
    if origin.fingerprint == lent.fingerprint:
        return origin.is_of(passage.content, "passage")
    if origin.fingerprint in former(live):
        return False
    raise FingerprintError(
        f"the embedding of node '{node.node_id}' was made by the encoder {origin.fingerprint[:12]}, and the index has "
        f"{lent.fingerprint[:12]}: {ADVICE}or leave node.embedding out"
    )


def former(live: LiveIndex) -> set[str]:
    """The encoders that the index has had: their vectors are of its texts, and are made anew."""
    return {entry["fingerprint"] for entry in live.status()["generations"]}


def _compare(lent: Encoding, nodes: Sequence[BaseNode], texts: Sequence[str]) -> None:
    """Refuse vectors that are not what the encoder makes of the texts: of their width all, and some of them whole."""
    if not nodes:
        return
    rows = sorted({int(row) for row in np.linspace(0, len(nodes) - 1, COMPARED)})
    wanted = dense(lent, [texts[row] for row in rows], "passage")
    for node in nodes:
        check_width(node.embedding or [], wanted.shape[1], f"the embedding of node '{node.node_id}'")
    for row, vector in zip(rows, wanted, strict=True):
        if cosine(nodes[row].embedding or [], vector) < LEAST_COSINE:
            raise FingerprintError(
                f"the embedding of node '{nodes[row].node_id}' is not what the index's model makes of its text (with "
                f"the metadata that LlamaIndex embeds): {ADVICE}or leave node.embedding out"
            )


def dense(lent: Encoding, texts: list[str], kind: Kind) -> np.ndarray:
    """The dense vectors of texts, with which a vector that was given is compared."""
    if "dense" not in lent.heads:
        raise UsageError(
            f"a vector of LlamaIndex's is dense, and the index has {', '.join(lent.heads)}: leave it out, and search "
            f"by text (UltraRAGRetriever)"
        )
    return np.asarray(lent.encode(texts, kind).dense)


def check_width(vector: Sequence[float], width: int, whose: str) -> None:
    if len(vector) != width:
        raise FingerprintError(
            f"{whose} is {len(vector)} wide, and the index's model makes {width}: it is another model's; {ADVICE}"
            f"or give none"
        )


def cosine(one: Sequence[float], other: np.ndarray) -> float:
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths > 0 else 0.0
