"""Trackers: what a run or a refresh came to, sent where `--report_to` sends the training's log.

transformers' callbacks report the steps. The figures behind the last step (before and after, gates, ladders) come here:
to wandb and tensorboard; other trackers get the steps alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.evaluation import Evaluation, differences

if TYPE_CHECKING:
    from ultrarag.finetune.report import FinetuneResult

logger = logging.getLogger("ultrarag")

#: name -> number or text; a slash makes a group of what shares the part before it
Figures = Mapping[str, float | int | str]
#: as TrainingArguments has them
Reporters = str | Sequence[str] | None


def compared(name: str, old: float, new: float, change: Mapping[str, Any]) -> dict[str, float]:
    """A comparison as figures: both values, and the difference with its interval.

    Args:
        change: the fields of `ultrarag.evaluation.Significance`.
    """
    parts = {"before": old, "after": new, **{key: change[key] for key in ("difference", "low", "high", "p_value")}}
    return {f"{name}/{key}": value for key, value in parts.items()}


def run_figures(result: FinetuneResult, found: Mapping[str, Evaluation]) -> dict[str, float | int | str]:
    """What a fine-tune came to: each metric before and after, of the evaluation data and of the guard.

    Args:
        found: stage -> evaluation, as `Measures` keeps them.
    """
    figures: dict[str, float | int | str] = {"result/fingerprint": result.fingerprint, "result/parent": result.parent}
    figures |= {"result/steps": result.steps, "result/seconds": result.seconds}
    if result.loss is not None:
        figures["result/loss"] = result.loss
    if result.merge is not None:
        figures["result/merge_weight"] = result.merge["weight"]
    for group, prefix in (("result", ""), ("guard", "guard_")):
        if f"{prefix}after" not in found:
            continue
        before, after = found[f"{prefix}before"], found[f"{prefix}after"]
        for metric, change in differences(before, after).items():
            figures |= compared(f"{group}/{metric}", before.metrics[metric], after.metrics[metric], asdict(change))
    return figures


@contextmanager
def own_run(reporters: Reporters) -> Iterator[None]:
    """End a wandb run that begins within, at once: the next training of the process is none of its steps."""
    if "wandb" not in (reporters or ()):
        yield
        return
    import wandb

    before = wandb.run
    try:
        yield
    except BaseException:
        _finish(before, 1)
        raise
    _finish(before, 0)


def _finish(before: Any, status: int) -> None:
    import wandb

    if before is None and wandb.run is not None:
        wandb.finish(exit_code=status)


def send(
    reporters: Reporters, figures: Figures, folder: Path, name: str | None, step: int, job_type: str | None = None
) -> None:
    """Send figures to the trackers; one that fails is a warning, for what they tell of is done.

    Args:
        folder: where tensorboard's file goes.
        name: of a wandb run that begins for them.
        job_type: they are a run of their own, of this type; None: they belong to the run of the training, if it began
            one.
    """
    for reporter, to in (("wandb", _to_wandb), ("tensorboard", _to_tensorboard)):
        if reporter in (reporters or ()):
            try:
                to(figures, folder, name, step, job_type)
            except Exception as error:
                logger.warning("%s did not take the figures: %s: %s", reporter, type(error).__name__, error)


def _to_wandb(figures: Figures, folder: Path, name: str | None, step: int, job_type: str | None) -> None:
    import wandb

    run = wandb.run if job_type is None else None
    begun = None
    if run is None:
        project = os.getenv("WANDB_PROJECT", "huggingface")  # as transformers' callback names it
        # beside a run of the caller's, which goes on
        run = begun = wandb.init(project=project, name=name, job_type=job_type, reinit="create_new")
    try:
        run.log({key: value for key, value in figures.items() if not isinstance(value, str)})
        run.summary.update({key: value for key, value in figures.items() if isinstance(value, str)})
    finally:
        if begun is not None:
            begun.finish()


def _to_tensorboard(figures: Figures, folder: Path, name: str | None, step: int, job_type: str | None) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=str(folder)) as writer:
        for key, value in figures.items():
            tag = key.replace("@", "_at_")  # "@" is none of tensorboard's letters: it would become "_", with a remark
            if isinstance(value, str):
                writer.add_text(tag, value, step)
            else:
                writer.add_scalar(tag, value, step)


def tensorboard_folder(output: Path, callbacks: Sequence[Any]) -> Path:
    """Where the training's callback wrote, or would have written; `--logging_dir` comes first."""
    found = next((item.logging_dir for item in callbacks if getattr(item, "logging_dir", None)), None)
    return Path(found or os.environ.get("TENSORBOARD_LOGGING_DIR") or output / "runs")
