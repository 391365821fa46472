#!/usr/bin/env bash
# One IndexNode among text nodes makes a VectorStoreIndex's own retriever blind to all the others.
#
# Packages: llama-index-core 0.14.25, llama-index-vector-stores-qdrant 0.10.4, qdrant-client 1.20.0.
#
# Expected: `VectorStoreIndex(nodes).as_retriever()` searches all nodes, whichever classes they have. It does so over the
# default in-memory store, and over Qdrant for text nodes alone.
#
# Seen: over a store that keeps texts (Qdrant here, and ours), an index whose nodes include
# one IndexNode retrieves that node alone, for every query. Nothing is raised. The index keeps a list of nodes only for what
# such a store cannot hold itself (IndexNode, ImageNode); `as_retriever` gives that list to the store as `node_ids`: empty,
# it means no condition, and with one entry it means that entry. A summary node added to a corpus of chunks hides the corpus.
#
# Output seen:
#   in memory, 2 texts + 1 IndexNode: ['database', 'opera', 'summary']
#   Qdrant, 2 texts: ['database', 'opera']
#   Qdrant, 2 texts + 1 IndexNode: ['summary']
#   Qdrant, the same index by VectorIndexRetriever: ['database', 'opera', 'summary']
#
# For us: our vector store honours node_ids, so it shows the same; docs/doors.md says to use VectorIndexRetriever(index),
# which asks for all nodes, and a test holds it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check \
    llama-index-core==0.14.25 llama-index-vector-stores-qdrant==0.10.4 qdrant-client==1.20.0
cat > "$place/show.py" <<'PYTHON'
import sys
import warnings

warnings.simplefilter("ignore")
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.retrievers import VectorIndexRetriever
from llama_index.core.schema import IndexNode, TextNode
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient

TEXTS = [TextNode(id_=f"00000000-0000-0000-0000-00000000000{n}", text=t) for n, t in enumerate(["database", "opera"], 1)]
POINTER = IndexNode(id_="00000000-0000-0000-0000-000000000003", text="summary", index_id="elsewhere")


def index(name, nodes, memory=False):
    store = None if memory else QdrantVectorStore(name, client=QdrantClient(":memory:"))
    context = StorageContext.from_defaults(vector_store=store) if store else StorageContext.from_defaults()
    return VectorStoreIndex(nodes=nodes, storage_context=context, embed_model=MockEmbedding(4))


def found(retriever):
    return sorted(item.text for item in retriever.retrieve("which database?"))


mixed = index("mixed", [*TEXTS, POINTER])
seen = {
    "in memory, 2 texts + 1 IndexNode": found(index("", [*TEXTS, POINTER], memory=True).as_retriever(similarity_top_k=9)),
    "Qdrant, 2 texts": found(index("texts", TEXTS).as_retriever(similarity_top_k=9)),
    "Qdrant, 2 texts + 1 IndexNode": found(mixed.as_retriever(similarity_top_k=9)),
    "Qdrant, the same index by VectorIndexRetriever": found(VectorIndexRetriever(mixed, similarity_top_k=9)),
}
for case, texts in seen.items():
    print(f"{case}: {texts}")
if seen["Qdrant, 2 texts + 1 IndexNode"] != ["summary"]:
    print("changed: the retriever finds the text nodes too")
    sys.exit(1)
PYTHON
"$place/venv/bin/python" "$place/show.py"
