"""A door's tests are collected where its framework can be imported: `make doors` makes such environments."""

from importlib.util import find_spec

#: Folder of a door -> the module that its framework is.
FRAMEWORKS = {
    "coming_from": "FlagEmbedding",
    "haystack": "haystack",
    "langchain": "langchain_core",
    "llamaindex": "llama_index",
    "mteb": "mteb",
    "trackers": "wandb",
    "ultrarag_v3": "ultrarag_v3_door",
}
collect_ignore = [folder for folder, module in FRAMEWORKS.items() if find_spec(module) is None]
