"""What stands in a run's checkpoints besides the model, how many are kept, and reading one's weights again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.trainer_callback import ExportableState

from ultrarag.encoder import Encoder
from ultrarag.hookspecs import LoadOptions
from ultrarag.io import quiet_progress

if TYPE_CHECKING:
    from transformers import Trainer


def write_state(trainer: Trainer, folder: Path) -> None:
    """The Trainer's counters, with those of its callbacks (early stopping)."""
    saved: dict[str, Any] = trainer.state.stateful_callbacks  # type: ignore[assignment]
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            saved[type(callback).__name__] = callback.state()
    trainer.state.save_to_json(str(folder / "trainer_state.json"))


def remove_old(newest: Path, best: str | None, limit: int | None) -> None:
    """Keep `limit` checkpoints beside the newest: that one, and the best one always."""
    if not limit or limit <= 0:
        return
    found = sorted(newest.parent.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    kept = {newest, Path(best or newest)}
    removable = [path for path in found if path not in kept]
    for path in removable[: max(0, len(found) - max(limit, len(kept)))]:
        shutil.rmtree(path)


def read_weights(encoder: Encoder, folder: str) -> dict[str, Tensor]:
    """The weights of a checkpoint of the same model."""
    settings = encoder.settings
    options = LoadOptions(heads=encoder.heads, pooling=settings.pooling, normalize=settings.normalize)
    with quiet_progress():
        found: dict[str, Tensor] = encoder.adapter.load(folder, options).state_dict()
    return found
