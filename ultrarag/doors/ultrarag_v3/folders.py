"""Server folders in a checkout of UltraRAG: parameter.yaml, and a program that starts our server in our environment."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from ultrarag.errors import UsageError
from ultrarag.packages import install

#: Name of a server -> the folder that it gets below servers/.
FOLDERS = {"retriever": "live_retriever", "reranker": "live_reranker"}

#: Both packages are imported as `ultrarag`: the other environment's Python must not find its own on the way.
PROGRAM = '''\
"""The {name} of a live index (ultrarag-retrieval), written by `ultrarag doors ultrarag_v3`.

Both packages are imported as `ultrarag`, so this one runs in the environment that it was written from.
"""

import os
import sys

PYTHON = {python!r}
if not os.path.exists(PYTHON):
    sys.exit(f"{{PYTHON}} is gone: write this server anew with `ultrarag doors ultrarag_v3 CHECKOUT`")
environment = {{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}}
os.execve(PYTHON, [PYTHON, "-P", "-m", "ultrarag.doors.ultrarag_v3", "{name}"], environment)
'''

COMMON = """\
# servers/{folder}/parameter.yaml, written by `ultrarag doors ultrarag_v3`

model_name_or_path: default # or the fingerprint of the live model: another one is then refused
backend: ultrarag
backend_configs:
  ultrarag:
    url: {url} # where `ultrarag serve` listens; its token is read from the variable ULTRARAG_TOKEN
"""
RETRIEVER = """\
    weights: null # of the heads, such as {dense: 1, bm25: 0.5}; null: the service's
    filter: null # only passages whose metadata pass it, such as {lang: en}
    collection_field: collection # the metadata field that collection_name is looked for in

top_k: 5
query_instruction: "" # stands before each query; the model's own instruction is the index's
collection_name: "" # only passages of this collection; "": all
corpus_path: data/corpus_example.jsonl # what retriever_index and bm25_index add
overwrite: false # with a collection_name: what the corpus no longer holds goes
retriever_url: {url} # of retriever_deploy_search

# UltraRAG's tools have these; an index that is served does not need them
batch_size: 16
gpu_ids: null
embedding_path: embedding/embedding.npy
is_multimodal: false
is_demo: false
index_backend: ultrarag
index_backend_configs: {}
retrieve_thread_num: 1
websearch_backend: tavily
websearch_backend_configs: {}
"""
RERANKER = """\

top_k: 5
query_instruction: ""

# UltraRAG's tools have these; a model that is served does not need them
batch_size: 16
gpu_ids: null
"""
PARAMETERS = {"retriever": COMMON + RETRIEVER, "reranker": COMMON + RERANKER}


def write_servers(checkout: str | Path, url: str = "http://127.0.0.1:8080") -> dict[str, bool]:
    """Write the folders servers/live_retriever and servers/live_reranker into a checkout of UltraRAG.

    A parameter.yaml that is there is kept, for it may have been edited; the program is written anew.

    Args:
        checkout: the folder that holds UltraRAG's `servers`.
        url: where `ultrarag serve` listens.

    Returns:
        The folder of each server, and whether its parameters are new.

    Raises:
        UsageError: the folder is no checkout, cannot be written, or the address is none; or the MCP SDK is missing.
    """
    if find_spec("mcp") is None:
        raise UsageError(f"the servers run in this environment, which lacks the MCP SDK: {install('mcp')}")
    servers = Path(checkout) / "servers"
    if not servers.is_dir():
        raise UsageError(f"'{checkout}' is no checkout of UltraRAG: it has no folder servers")
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"'{url}' is no address; it must begin with http:// or https://")
    try:
        return {str(servers / folder): _write(servers / folder, name, url) for name, folder in FOLDERS.items()}
    except OSError as error:
        raise UsageError(f"'{servers}' cannot be written: {error}") from error


def _write(folder: Path, name: str, url: str) -> bool:
    program, parameters = folder / "src" / f"{folder.name}.py", folder / "parameter.yaml"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(PROGRAM.format(name=name, python=sys.executable), encoding="utf-8")
    if parameters.exists():
        return False
    text = PARAMETERS[name].replace("{url}", url).replace("{folder}", folder.name)
    parameters.write_text(text, encoding="utf-8")
    return True
