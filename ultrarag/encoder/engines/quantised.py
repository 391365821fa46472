"""A quantised model: a backbone in int8 beside its checkpoint, what it was made from, and what was measured of it.

They are derived: a checkpoint is whole without them. Vectors in int8 depend on the texts that the ranges of numbers
were taken from, so a precision is named after that too: int8:KEY.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ultrarag.errors import CheckpointError, IndexStateError, UsageError
from ultrarag.io import publish_directory, seal, staged_directory, verify_seal, write_json

INT8 = "int8"
#: The folder inside a checkpoint's, and what lies in it.
FOLDER, RECORD, MODEL = "int8", "quantised.json", "model.xml"
FORMAT = 1
#: Of the key in a precision's name.
_SHOWN = 12


def is_int8(precision: str) -> bool:
    """Whether a precision is int8, by whatever calibration."""
    return family(precision) == INT8


def family(precision: str) -> str:
    """The precision without its calibration: what may be asked of another model."""
    return precision.partition(":")[0]


@dataclass(frozen=True)
class Pair:
    """What was measured of queries in one precision against passages in another, beside both in float32."""

    #: "fp32" or "int8"
    passages: str
    queries: str
    head: str
    metric: str
    #: with both sides in float32, and with these
    float32: float
    found: float
    #: the 95 % interval of the difference, its p-value, and from how many queries
    low: float
    high: float
    p_value: float
    judged: int
    #: whether it loses no more than was tolerated
    accepted: bool


@dataclass(frozen=True)
class Quantised:
    """The record of a quantised model."""

    #: of the encoder in float32
    fingerprint: str
    #: of the runtime, of what quantised, and of torch, from which it was converted
    versions: dict[str, str]
    #: `digest`, `texts` (how many) and `source` of what it was calibrated on
    calibration: dict[str, Any]
    #: names of what it is given, in order
    inputs: tuple[str, ...]
    #: which output of the backbone it gives
    output: str
    tolerance: float | None = None
    measured: tuple[Pair, ...] = field(default=())

    @property
    def precision(self) -> str:
        """The name of the precision of its vectors."""
        return precision_of(self.fingerprint, self.versions, str(self.calibration["digest"]))

    def accepts(self, passages: str, queries: str) -> bool:
        """Whether queries and passages in these precisions were measured together, every head, and lose little."""
        found = [pair for pair in self.measured if (pair.passages, pair.queries) == (family(passages), family(queries))]
        return bool(found) and all(pair.accepted for pair in found)

    def write(self, folder: Path) -> None:
        """Write the record, and then the checksums of all files."""
        write_json(folder / RECORD, {"format": FORMAT, "precision": self.precision, **asdict(self)})
        seal(folder)

    @classmethod
    def read(cls, checkpoint: Path) -> Quantised | None:
        """The record beside a checkpoint; None where it is not quantised.

        Raises:
            CheckpointError: it cannot be read, or a newer release wrote it.
        """
        path = checkpoint / FOLDER / RECORD
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] > FORMAT:
                raise CheckpointError(f"{path} was written by a newer ultrarag: upgrade ultrarag to read it")
            known = {item.name for item in fields(cls)}
            values = {name: value for name, value in values.items() if name in known}
            values |= {"inputs": tuple(values["inputs"]), "measured": tuple(Pair(**p) for p in values["measured"])}
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): {AGAIN}") from error


def quantised_folder(checkpoint: Path) -> Path:
    """Where what is quantised lies, of a checkpoint."""
    return checkpoint / FOLDER


AGAIN = "quantise the checkpoint again (ultrarag checkpoint quantise)"


def precision_of(fingerprint: str, versions: dict[str, str], calibration: str) -> str:
    """The name of a precision: of the vectors that a model, runtimes and calibration give."""
    content = json.dumps([FORMAT, fingerprint, sorted(versions.items()), calibration])
    return f"{INT8}:{hashlib.sha256(content.encode()).hexdigest()[:_SHOWN]}"


def digest_of(texts: Sequence[tuple[Any, str]]) -> str:
    """The digest of calibration texts, (kind, text) each."""
    return hashlib.sha256(json.dumps([list(text) for text in texts]).encode()).hexdigest()


def checked_files(checkpoint: Path) -> Path:
    """The folder of a quantised model, whose files are as they were written.

    Raises:
        CheckpointError: one is missing or damaged; names it.
    """
    folder = checkpoint / FOLDER
    try:
        if not verify_seal(folder, "int8 model", AGAIN):
            raise CheckpointError(f"'{folder}' has no checksums: {AGAIN}")
    except IndexStateError as error:
        raise CheckpointError(str(error)) from error
    return folder


def copy_quantised(source: Path, target: Path) -> None:
    """Copy what is quantised beside one checkpoint to another one of the same model, if there is any."""
    if Quantised.read(source) is None or (target / FOLDER).exists():
        return
    checked = checked_files(source)
    publish_quantised(target, lambda stage: shutil.copytree(checked, stage, dirs_exist_ok=True))


def publish_quantised(checkpoint: Path, write: Callable[[Path], object]) -> Path:
    """Have a quantised model appear beside a checkpoint in one step, in place of one that is there."""
    folder = checkpoint / FOLDER
    with staged_directory(folder) as stage:
        write(stage)
        checked_stage(stage)
        publish_directory(stage, folder)
    return folder


def checked_stage(stage: Path) -> None:
    """Raise CheckpointError unless all that belongs to a quantised model was written."""
    if missing := [name for name in (RECORD, MODEL) if not (stage / name).is_file()]:
        raise CheckpointError(f"'{stage}' lacks {', '.join(missing)}: nothing was published")


def not_quantised(checkpoint: Path) -> UsageError:
    """The error of who asks for int8 where there is none."""
    return UsageError(
        f"'{checkpoint}' is not quantised, which precision 'int8' needs: ultrarag checkpoint quantise {checkpoint} "
        "--eval_data FOLDER"
    )
