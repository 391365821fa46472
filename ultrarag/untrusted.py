"""What a model folder from elsewhere may not do: point outside, run code, or ask for more than its weights hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import Any, NamedTuple

from ultrarag.claims import ModelFolder
from ultrarag.errors import CheckpointError, UsageError

_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers")
_WIDTHS = ("vocab_size", "type_vocab_size", "hidden_size", "d_model", "intermediate_size", "max_position_embeddings")
_HEADS = ("num_attention_heads", "num_key_value_heads", "n_heads", "n_head", "num_heads")
#: Of these a model may have none; fewer than no places stand for as many as are wanted.
_NONE_OF = ("type_vocab_size", "max_position_embeddings", *_LAYERS)
#: Up to here a model may have more layers than tensors (layers that share them), or more places than numbers (rotary
#: embeddings, whose angles are computed; the longest published context is 10 million tokens).
_FEW_LAYERS, _FEW_PLACES = 1000, 1 << 24
#: A header of safetensors is a few hundred bytes per tensor.
_LONGEST_HEADER = 100_000_000


def check_folder(folder: Path) -> None:
    """Check what can be checked before a model is built.

    Raises:
        CheckpointError: modules.json or a list of weight files names what is not in the folder, or config.json asks
            for a model that the weights cannot be.
    """
    modules = [str(module.get("path", "")) for module in _rows(folder / "modules.json")]
    refuse_outside(folder, modules, folder / "modules.json")
    for part in dict.fromkeys((folder, *(folder / name for name in modules))):
        for index in sorted(part.glob("*.index.json")):
            refuse_outside(part, _weight_files(index), index)
        _check_sizes(part)


def _weight_files(index: Path) -> set[str]:
    values = _json(index)
    names = values.get("weight_map") if isinstance(values, dict) else None
    return {str(name) for name in names.values()} if isinstance(names, dict) else set()


def refuse_outside(folder: Path, names: Iterable[str], source: Path) -> None:
    """Refuse names of files that do not lie in the folder: absolute ones, `..`, and links that lead out of it.

    Links into the model hub's cache, which is made of them, are followed.

    Args:
        source: the file that holds the names.

    Raises:
        CheckpointError: names the file and the name.
    """
    for name in names:
        if _leads_out(name):
            raise CheckpointError(
                f"{source} names '{name}', which is no file of its folder: it is damaged, or made to reach other "
                "files; get the model from where it was published"
            )
        real = (folder / name).resolve()
        if not any(real.is_relative_to(home) for home in _homes(folder.resolve())):
            raise CheckpointError(
                f"{folder / name} is a link to {real}, outside of the model's folder: put the file itself there"
            )


def _leads_out(name: object) -> bool:
    if not isinstance(name, str) or "\0" in name:
        return True
    windows = PureWindowsPath(name)
    return PurePosixPath(name).is_absolute() or bool(windows.drive or windows.root) or ".." in re.split(r"[/\\]", name)


def _homes(folder: Path) -> Iterator[Path]:
    yield folder
    if folder.parent.name == "snapshots":
        yield folder.parent.parent / "blobs"


@contextmanager
def only_tensors(folder: str | Path) -> Iterator[None]:
    """Say of a pickle file that holds more than tensors what to do about it; torch would advise to run its code.

    Raises:
        CheckpointError: a file in the folder is such a one, or is damaged.
    """
    try:
        yield
    except UnpicklingError:
        files = sorted(file.name for file in Path(folder).glob("*") if file.suffix in (".bin", ".pt", ".pth"))
        raise CheckpointError(
            f"{folder}: one of {', '.join(files) or 'its files'} is damaged, or holds Python objects besides tensors, "
            "which could run any code when they are read; get the model as safetensors, or again from where it was "
            "published"
        ) from None


@contextmanager
def only_trusted_code(folder: str | Path, trusted: bool) -> Iterator[None]:
    """Say of a model that cannot be loaded without running its own Python code how to consent to that.

    Raises:
        UsageError: it is such a one, and `trusted` is False.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        if trusted or isinstance(error, UsageError) or not ModelFolder(folder).code:
            raise
        raise code_refused(folder) from error


def code_refused(folder: str | Path) -> UsageError:
    """What is said of a model whose own code is not to be run."""
    code = ", ".join(sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*.py"))) or "from elsewhere"
    return UsageError(
        f"'{folder}' is run by Python code that comes with it ({code}; named in {ModelFolder(folder).code}), which "
        "nobody has allowed: read it, and if you trust it give trust_remote_code=True (--trust_remote_code)"
    )


class _Held(NamedTuple):
    """What weight files hold, or at least not less."""

    tensors: int
    numbers: int


def _check_sizes(folder: Path) -> None:
    """Refuse a configuration whose sizes no tensor in the files beside it can have."""
    path = folder / "config.json"
    held = _held(folder) if path.is_file() else None
    if held is None:
        return
    for name, value in _sizes(_json(path)):
        if value < 1 and not (name in _NONE_OF and (value == 0 or name == "max_position_embeddings")):
            raise CheckpointError(
                f"{path}: {name} is {value}, which no model has; get the file from where the weights were published"
            )
        most = max(_FEW_LAYERS, held.tensors) if name in _LAYERS else max(_FEW_PLACES, held.numbers)
        if value > most:
            raise CheckpointError(
                f"{path}: {name} is {value:,}, and the weights beside it hold {held.tensors:,} tensors of "
                f"{held.numbers:,} numbers: they are not of such a model; get both from where it was published"
            )


def _sizes(values: Any) -> Iterator[tuple[str, int]]:
    """The sizes in a configuration and in those inside it (text_config)."""
    if not isinstance(values, dict):
        return
    for name, value in values.items():
        if name in (*_LAYERS, *_WIDTHS, *_HEADS) and isinstance(value, int):
            yield name, value
        yield from _sizes(value)


def _held(folder: Path) -> _Held | None:
    """Count tensors and their numbers; None where there are no weights. Of a pickle only the size is known."""
    shapes = [shape for file in folder.glob("*.safetensors") for shape in _shapes(file)]
    pickled = sum(file.stat().st_size for file in folder.glob("*.bin"))
    if not shapes and not pickled:
        return None
    return _Held(len(shapes) + pickled // 64, sum(math.prod(shape) for shape in shapes) + pickled)


def _shapes(file: Path) -> list[list[int]]:
    """The shapes in a safetensors file's header; none where it cannot be read, of which the loader tells."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, _LONGEST_HEADER)))
        return [row["shape"] for name, row in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _rows(path: Path) -> list[dict[str, Any]]:
    values = _json(path) if path.is_file() else []
    if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
        raise CheckpointError(f"{path} is no list of modules: it is damaged; get it from where it was published")
    return values


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
