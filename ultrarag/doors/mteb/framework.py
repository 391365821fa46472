"""All that is taken from MTEB, or what to install."""

from __future__ import annotations

from ultrarag.errors import UsageError
from ultrarag.packages import install

try:
    import mteb
    from datasets import Dataset
    from mteb._create_dataloaders import create_dataloader  # how MTEB's own search models read queries
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.languages import check_language_code
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import PromptType
except ImportError as error:
    raise UsageError(f"evaluation with MTEB needs the package mteb ({error}): {install('mteb')}") from error

__all__ = [
    "AbsTaskRetrieval",
    "Dataset",
    "ModelMeta",
    "PromptType",
    "ScoringFunction",
    "TaskMetadata",
    "check_language_code",
    "create_dataloader",
    "mteb",
]
