#!/usr/bin/env bash
# milvus-lite 3.2.2, pymilvus 3.0.2: full-text search (BM25) scores each segment by statistics of its own.
#
# Expected: the same passages and the same query give the same hits, whenever `flush` was called; a flush makes rows
# durable. Document frequencies and the mean length belong to the collection.
# Seen: each flush closes a segment, and a passage is scored by how rare a word is in its segment. So with the same eight
# passages, inserted in the same order, the best hit for "engine oil" is "engine warranty terms" with one flush at the
# end and "oil painting of the sea" with one more after the first four: among them "oil" is rare, among the others
# "engine" is absent. Scores of different segments are merged as if they were of one scale.
#
#   one flush:   [(0, 1.009), (3, 1.009), (5, 1.009), (2, 0.887)]
#   two flushes: [(1, 1.047), (5, 0.718), (4, 0.628), (0, 0.392)]
#
# For this project: BM25 of a live index is its own, whose statistics are those of all passages (ultrarag/retrieve/bm25),
# also where the vectors lie in Milvus. Do not compare BM25 scores of Milvus Lite between two loads of one corpus.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check milvus-lite==3.2.2 pymilvus==3.0.2
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys

from pymilvus import DataType, Function, FunctionType, MilvusClient

TEXTS = [
    "engine warranty terms",
    "oil painting of the sea",
    "engine noise at night",
    "engine repair manual",
    "olive oil and bread",
    "corn oil prices",
    "the sea at night",
    "bread recipes",
]


def hits(file, flush_between):
    client = MilvusClient(file)
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("text", DataType.VARCHAR, max_length=1000, enable_analyzer=True)
    schema.add_field("words", DataType.SPARSE_FLOAT_VECTOR)
    bm25 = {"function_type": FunctionType.BM25, "input_field_names": ["text"], "output_field_names": ["words"]}
    schema.add_function(Function(name="bm25", **bm25))
    index = client.prepare_index_params()
    index.add_index("words", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    client.create_collection("kb", schema=schema, index_params=index)
    rows = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    client.insert("kb", rows[:4])
    if flush_between:
        client.flush("kb")
    client.insert("kb", rows[4:])
    client.flush("kb")
    found = client.search("kb", data=["engine oil"], anns_field="words", limit=4)[0]
    client.close()
    return [(hit["id"], round(abs(hit["distance"]), 3)) for hit in found]


one, two = hits("one.db", flush_between=False), hits("two.db", flush_between=True)
print("one flush:  ", one)
print("two flushes:", two)
if one[0][0] == two[0][0]:
    sys.exit("changed: the best hit is the same, however the inserts were flushed")
PYTHON
