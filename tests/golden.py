"""Reading of the peer's golden numbers, wherever they lie (`ULTRARAG_GOLDEN`, or tests/fixtures/peer)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(os.environ.get("ULTRARAG_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
MODEL = ROOT / "tiny-visible"
VISIBLE = ROOT / "visible"
WHY_SKIPPED = f"no golden numbers at {ROOT}; set ULTRARAG_GOLDEN"


def present() -> bool:
    return (VISIBLE / "losses.json").is_file() and MODEL.is_dir()


@cache
def read(name: str) -> dict[str, Any]:
    path = VISIBLE / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cases": []}


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(VISIBLE / name) as file:
        return {key: file[key] for key in file.files}


@dataclass(frozen=True)
class Case:
    """One case of losses.json."""

    values: dict[str, Any]

    def __str__(self) -> str:
        return str(self.values["name"])

    @property
    def config(self) -> dict[str, Any]:
        return self.values["config"]

    def features(self, side: str, dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
        prefix = f"batch/{self.values['batch']}/{side}"
        names = ("input_ids", "attention_mask")
        return {name: torch.tensor(arrays("inputs.npz")[f"{prefix}/{name}"]).to(dtype) for name in names}

    @property
    def batch(self) -> dict[str, Any]:
        return read("losses.json")["batches"][self.values["batch"]]

    def head(self, name: str) -> dict[str, torch.Tensor]:
        prefix = f"head/{name}/"
        found = arrays("inputs.npz")
        return {key.removeprefix(prefix): torch.tensor(found[key]) for key in found if key.startswith(prefix)}

    def expected(self, precision: str) -> tuple[float, dict[str, float]] | None:
        """The loss and the gradient norms to match, or None where the peer has none."""
        values = self.values[precision]
        source = values if "intended_loss" in values else self.values
        if "intended_loss" in source:
            return source["intended_loss"], source["intended_grad_norm"]
        if "loss" not in values:
            return None
        return values["loss"], values["grad_norm"]


def cases(*kinds: str) -> list[Case]:
    return [Case(values) for values in read("losses.json")["cases"] if values["kind"] in kinds] if present() else []
