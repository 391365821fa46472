"""EmbeddingGemma 2 as it is published: the text model alone is run, and the towers for images and sound are kept.

Its root configuration has the text model's inside, its weights hold the towers' too, and files beside them say how
images and sound are prepared. Saved, all of that is there as it was, around the trained text model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ultrarag.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MODEL_TYPE = "embedding_gemma2"
#: What the text model's weights are called in the root model's.
_TEXT = "language_model."
#: Files of the processors, by their names' beginnings.
_PROCESSORS = ("processor_config", "preprocessor_config", "video_preprocessor_config", "chat_template")


def load_text_model(folder: Path, config: Any, **remote: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the text model of a root checkpoint, and transformers' report of what was missing.

    Args:
        config: the root configuration.
    """
    from transformers import EmbeddingGemma2Model

    config.vision_config = config.audio_config = None  # else the towers would be built
    loaded: Any = EmbeddingGemma2Model.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True, **remote
    )
    root, report = loaded
    return root.language_model, report


def published_files(folder: Path) -> dict[str, Path]:
    """The files of a root checkpoint that are saved with the text model, by name, wherever links lead."""
    kept = [file for file in folder.iterdir() if file.name == "config.json" or file.name.startswith(_PROCESSORS)]
    return {file.name: file.resolve() for file in [*kept, *folder.glob("*.safetensors")]}


def save_text_model(published: Mapping[str, Path], target: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the root checkpoint of these files with the text model's weights replaced.

    Raises:
        CheckpointError: one is no longer there.
    """
    from safetensors.torch import save_file

    if gone := [path for path in published.values() if not path.is_file()]:
        raise CheckpointError(
            f"{gone[0]}, of the model that was loaded, is gone, and with it the towers for images and sound that are "
            "saved beside the text model: put it back"
        )
    merged = {f"{_TEXT}{name}": tensor for name, tensor in weights.items()}
    towers = dict(_towers(path for name, path in published.items() if name.endswith(".safetensors")))
    save_file({**towers, **merged}, target / "model.safetensors", {"format": "pt"})
    for name, path in published.items():
        if not name.endswith(".safetensors"):
            shutil.copyfile(path, target / name)


def _towers(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """The weights that are not the text model's, under their own names."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if not name.removeprefix("model.").startswith(_TEXT):
                    yield name, tensors.get_tensor(name)
