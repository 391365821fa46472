"""Nodes as passages: what is encoded and searched is the node's text with the metadata that LlamaIndex embeds.

A node comes back as it was. Its metadata lies in the passage's own, so that every filter reaches it; what an update of
the index has changed there since, the node has too.
"""

from __future__ import annotations

import json
from typing import Any

from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MetadataMode,
    Node,
    TextNode,
)

from ultrarag.errors import DataError
from ultrarag.retrieve import jsonable
from ultrarag.types import Passage

#: Keys of ours in a passage's metadata, named as LlamaIndex's other stores name them.
CONTENT, TYPE, DOCUMENT = "_node_content", "_node_type", "ref_doc_id"
#: Other names of the document, which the node's own metadata may use for something else.
ALIASES = ("doc_id", "document_id")

_TYPES: dict[str, Any] = {
    kind.class_name(): kind for kind in (TextNode, Node, Document, ImageNode, ImageDocument, IndexNode)
}


def to_passage(node: BaseNode) -> Passage:
    """The passage of a node; a node without a source document counts as its own document.

    Raises:
        DataError: its metadata is nothing that JSON can hold; names the node.
    """
    try:
        metadata = jsonable(node.metadata)
    except DataError as error:
        raise DataError(f"node '{node.node_id}': {error}") from error
    plain = node.model_copy(update={"metadata": metadata, "embedding": None}).model_dump(mode="json")
    document = node.ref_doc_id or node.node_id
    ours = {DOCUMENT: document, TYPE: node.class_name(), CONTENT: json.dumps(plain, ensure_ascii=False)}
    named = {**dict.fromkeys(ALIASES, document), **metadata, **ours}
    return Passage(node.node_id, node.get_content(metadata_mode=MetadataMode.EMBED), metadata=named)


def to_node(passage: Passage) -> BaseNode:
    """The node of a passage; a new TextNode for one that did not come from LlamaIndex."""
    content = passage.metadata.get(CONTENT)
    if content is None:
        return TextNode(id_=passage.id, text=passage.content, metadata=dict(passage.metadata))
    plain = json.loads(content)
    plain["metadata"] = _metadata(plain["metadata"], passage.metadata)
    kind = _TYPES.get(str(passage.metadata.get(TYPE)), TextNode)
    node: BaseNode = kind.from_dict(plain)
    return node


def _metadata(given: dict[str, Any], held: Any) -> dict[str, Any]:
    """The node's metadata, in its order, as the passage has it now."""
    ours = (CONTENT, TYPE, DOCUMENT)
    kept = {key: given[key] if key in ours else held[key] for key in given if key in ours or key in held}
    hidden = {*ours, *ALIASES, *given}
    return {**kept, **{key: value for key, value in held.items() if key not in hidden}}


def note(node: BaseNode, key: str, value: Any) -> None:
    """Put a value into a node's metadata for programs alone: no language model and no embedding is shown it."""
    node.metadata = {**node.metadata, key: value}
    for hidden in ("excluded_llm_metadata_keys", "excluded_embed_metadata_keys"):
        setattr(node, hidden, list(dict.fromkeys([*getattr(node, hidden), key])))
