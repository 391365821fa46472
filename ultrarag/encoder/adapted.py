"""A folder of LoRA matrices as a model: its base is found, joined with it for loading, and has them merged in.

Such a folder (peft's `adapter_config.json`, without the model's own weights) is what peft, transformers and
sentence-transformers save of a model with adapters, and what `adapter/` of a checkpoint of ours holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ultrarag.checkpoint import MANIFEST, local_folder
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.packages import install
from ultrarag.untrusted import check_folder, only_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ultrarag.hookspecs import LoadOptions

_CONFIG = "adapter_config.json"
_MATRICES = ("adapter_model.safetensors", "adapter_model.bin")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
#: How peft begins the names of matrices.
_PREFIX = "base_model.model."


def base_of(folder: Path, options: LoadOptions) -> Path | None:
    """The folder of the model that a LoRA folder adapts; None for a folder that is a model itself.

    Raises:
        CheckpointError: it does not say what it adapts, or that model is not there; names it.
    """
    file = folder / _CONFIG
    if not file.is_file() or any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        return None
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not name:
        raise CheckpointError(
            f"{folder} holds LoRA matrices alone, and {_CONFIG} does not say of which model "
            "(base_model_name_or_path): write its path or hub name there, or give the merged model"
        )
    try:
        base = local_folder(str(name), options.cache_dir, options.token)
    except UsageError as error:
        raise CheckpointError(
            f"{folder} holds LoRA matrices of the model '{name}', which is not here: {error}; or give the merged "
            f"model, or the base's path as base_model_name_or_path in {file}"
        ) from error
    check_folder(base)
    return base


@contextmanager
def joined(folder: Path, base: Path) -> Iterator[Path]:
    """A temporary folder with the base's files, and in their place those that the LoRA folder has itself."""
    own = {path.name for path in folder.iterdir()} - {_CONFIG, *_MATRICES}
    with TemporaryDirectory(prefix="ultrarag-lora-") as place:
        for path in base.iterdir():
            if path.name not in (*own, MANIFEST):
                (Path(place) / path.name).symlink_to(path.resolve())
        for name in own:
            (Path(place) / name).symlink_to((folder / name).resolve())
        yield Path(place)


def adapted_part(model: nn.Module) -> nn.Module:
    """The part of a model that has the adapters: transformers' model in its backbone, the whole backbone where it has
    several (a Router with one for each side), or all of the model without a backbone.
    """
    from transformers import PreTrainedModel

    backbone = getattr(model, "backbone", None)
    if backbone is None:
        return model
    found = [module for module in backbone.modules() if isinstance(module, PreTrainedModel)]
    inner = set(found[0].modules()) if found else set()
    return found[0] if found and inner.issuperset(found) else backbone


def merge_matrices(model: nn.Module, folder: Path) -> None:
    """Put a folder's LoRA matrices into the weights of its base.

    Raises:
        UsageError: peft is not installed.
        CheckpointError: the matrices are of another kind, or do not fit the model.
    """
    try:
        from peft import LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise UsageError(f"{folder} holds LoRA matrices, which needs the package peft: {install('peft')}") from error
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{folder}: adapters of kind {config.peft_type} cannot be merged here; merge them first")
    root = adapted_part(model)
    matrices, others = _fitted(_read(folder), root, folder)
    inject_adapter_in_model(config, root, state_dict=matrices)
    found: Any = set_peft_model_state_dict(root, matrices)
    lacking = [name for name in found.missing_keys if ".lora_" in name]
    if found.unexpected_keys or lacking:
        name = next(iter([*found.unexpected_keys, *lacking]))
        raise CheckpointError(f"{folder}: its matrices do not fit a {type(root).__name__}: '{name}'")
    parameters = dict(root.named_parameters())
    for name, tensor in others.items():
        parameters[name].data.copy_(tensor)
    for name, layer in [(name, module) for name, module in root.named_modules() if isinstance(module, LoraLayer)]:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, layer.get_base_layer())
    for parameter in root.parameters():
        parameter.requires_grad_(True)
    if hasattr(root, "peft_config"):
        del root.peft_config


def _read(folder: Path) -> dict[str, Tensor]:
    for path in (folder / name for name in _MATRICES):
        if path.is_file() and path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        if path.is_file():
            import torch

            with only_tensors(folder):
                return dict(torch.load(path, map_location="cpu", weights_only=True))
    raise CheckpointError(f"{folder} has {_CONFIG} and none of {', '.join(_MATRICES)}: it is incomplete")


def _fitted(
    matrices: Mapping[str, Tensor], root: nn.Module, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The matrices, and whole parameters saved beside them, by the names that the model has.

    They may have been trained on the model with or without a head, whose names begin with one part more.
    """
    own: Any = root
    plain = {name.removeprefix(_PREFIX): tensor for name, tensor in matrices.items()}
    modules = {name for name, _ in root.named_modules()}
    body = f"{getattr(own, 'base_model_prefix', '') or 'model'}."
    ways = [lambda name: name, lambda name: name.removeprefix(body), lambda name: name.removeprefix("model.")]
    for way in [*ways, lambda name: body + name]:
        named = {way(name): tensor for name, tensor in plain.items()}
        known = {name: tensor for name, tensor in named.items() if _module_of(name) in modules}
        unused = [name for name in named if name not in known]
        if known and all("pooler." in name for name in unused):  # nothing here uses a pooler
            low = {name: tensor for name, tensor in known.items() if ".lora_" in name}
            return low, {name: tensor for name, tensor in known.items() if ".lora_" not in name}
    raise CheckpointError(
        f"{folder}: its matrices are not of a {type(root).__name__}, which has no '{_module_of(next(iter(plain), ''))}'"
    )


def _module_of(name: str) -> str:
    """The name of the layer that a matrix or parameter belongs to."""
    return name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
