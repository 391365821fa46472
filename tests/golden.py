"""Reading of the peer's golden numbers: our own fixture, and the large set where `ULTRARAG_GOLDEN` points."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

FIXTURE = Path(__file__).parent / "fixtures" / "peer"
ROOT = Path(os.environ.get("ULTRARAG_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


@dataclass(frozen=True)
class GoldenSet:
    """One directory of numbers and the model that they were computed with."""

    name: str
    data: Path
    model: Path

    def present(self) -> bool:
        return self.data.is_dir() and self.model.is_dir()


FIXTURE_SET = GoldenSet("fixture", FIXTURE, FIXTURE / "model")
VISIBLE_SET = GoldenSet("visible", ROOT / "visible", ROOT / "tiny-visible")
SETS = (FIXTURE_SET, VISIBLE_SET)
WHY_SKIPPED = f"no golden numbers at {ROOT}; set ULTRARAG_GOLDEN"


@cache
def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


@dataclass(frozen=True)
class Case:
    """One case of losses.json."""

    golden: GoldenSet
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.golden.name}-{self.values['name']}"

    @property
    def config(self) -> dict[str, Any]:
        return self.values["config"]

    @property
    def batch(self) -> dict[str, Any]:
        return read(self.golden.data / "losses.json")["batches"][self.values["batch"]]

    def features(self, side: str) -> dict[str, torch.Tensor]:
        prefix = f"batch/{self.values['batch']}/{side}"
        found = arrays(self.golden.data / "inputs.npz")
        names = ("input_ids", "attention_mask")
        return {name: torch.tensor(found[f"{prefix}/{name}"], dtype=torch.int64) for name in names}

    def head(self, name: str) -> dict[str, torch.Tensor]:
        prefix = f"head/{name}/"
        found = arrays(self.golden.data / "inputs.npz")
        return {key.removeprefix(prefix): torch.tensor(found[key]) for key in found if key.startswith(prefix)}

    def expected(self, precision: str) -> tuple[float, dict[str, float]] | None:
        """The loss and the gradient norms to match, or None where there are none."""
        values = self.values.get(precision, {})
        if "intended_loss" in values:
            return values["intended_loss"], values["intended_grad_norm"]
        return (values["loss"], values["grad_norm"]) if "loss" in values else None


def cases(*kinds: str) -> list[Case]:
    """Every case of these kinds, of every set that is there."""
    return [
        Case(golden, values)
        for golden in SETS
        if golden.present()
        for values in read(golden.data / "losses.json")["cases"]
        if values["kind"] in kinds
    ]
