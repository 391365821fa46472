"""A door's tests are collected where its framework can be imported: `make doors` makes such environments."""

import sys
from importlib.util import find_spec
from pathlib import Path

#: Where run.py puts a framework that must not see our packages, nor we its.
PEER = Path(sys.prefix) / "peer"

#: Folder of a door -> the module that its framework is.
FRAMEWORKS = {
    "coming_from": "FlagEmbedding",
    "haystack": "haystack",
    "langchain": "langchain_core",
    "llamaindex": "llama_index",
    "mteb": "mteb",
    "schemathesis": "schemathesis",
    "trackers": "wandb",
}
collect_ignore = [folder for folder, module in FRAMEWORKS.items() if find_spec(module) is None]
if not PEER.is_dir():  # test_tools.py needs none, and is among the tests of every run
    collect_ignore += [f"ultrarag_v3/test_{name}.py" for name in ("servers", "classes", "pipelines", "refresh")]
