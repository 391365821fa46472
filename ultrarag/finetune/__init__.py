"""Fine-tuning: `finetune()` for Python, `python -m ultrarag.finetune` and its siblings for the shell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from ultrarag.finetune.__main__ import main
    from ultrarag.finetune.batches import read_data
    from ultrarag.finetune.check import SAMPLE, DataReport, assembled, looked_for, refuse_shared
    from ultrarag.finetune.corpus import NoMap
    from ultrarag.finetune.evaluate import Evaluator, read_evaluator
    from ultrarag.finetune.flags import FinetuneArguments
    from ultrarag.finetune.incremental import Seen, seen_before
    from ultrarag.finetune.output import UNMERGED, checkpoints_in, claim_output_dir
    from ultrarag.finetune.report import FinetuneResult, read_history, read_measured, write_text
    from ultrarag.finetune.run import dry_run
    from ultrarag.finetune.step import Interrupted, layers_of, watching
    from ultrarag.finetune.tracking import compared
    from ultrarag.finetune.tracking import send as send_figures
else:
    __getattr__, __dir__, __all__ = exports(__name__)


def finetune(
    model: str | PathLike[str],
    train_data: Any,
    output_dir: str | PathLike[str],
    adapter: str | None = None,
    **arguments: Any,
) -> FinetuneResult:
    """Fine-tune a model on domain data and write a checkpoint that every tool loads.

    Args:
        model: a folder or hub name; a checkpoint of ours is trained on incrementally.
        train_data: a path, a list of paths, or a list of rows (`{"query": ..., "pos": [...], "neg": [...]}`).
        output_dir: where the finished checkpoint appears, whole or not at all.
        adapter: name of the plugin; default: the one that the model's files call for (docs/plugins.md).
        arguments: any flag of the command line, under its name, such as `learning_rate=1e-5`.

    Returns:
        The checkpoint's path, its fingerprint, and the metrics before and after where `eval_data` was given.

    Raises:
        UsageError: an unknown or unusable argument. DataError: rows that cannot be used.
        TrainingError: training had to stop, or changed nothing.

    Example:
        >>> from ultrarag.finetune import finetune
        >>> result = finetune(model_path, rows, output_dir="ckpt/1", adapter="bge", learning_rate=2e-5)
        >>> result.checkpoint
        'ckpt/1'
    """
    from ultrarag.finetune.flags import from_keywords
    from ultrarag.finetune.run import run

    defaults = adapter_defaults(adapter) if adapter else None
    result = run(from_keywords(model, train_data, output_dir, adapter, defaults, choose_adapter, **arguments))
    if result is None:  # another rank of a distributed run: the first one wrote the checkpoint
        from ultrarag.finetune.report import FinetuneResult

        return FinetuneResult(str(output_dir), str(model), "", 0, None, 0.0)
    return result


def finetune_trial(model: str, train_data: Any, output_dir: str | PathLike[str], **arguments: Any) -> FinetuneResult:
    """Fine-tune to see what it comes to on `eval_data`: no checkpoint is written, and nothing is measured before.

    Args:
        model, train_data, output_dir, arguments: as for `finetune`; what is written while it trains lies in output_dir.

    Returns:
        The metrics afterwards (`metrics["after"]`); it has no checkpoint and no fingerprint.

    Raises:
        UltraragError: as `finetune` does.
    """
    from ultrarag.finetune.flags import from_keywords
    from ultrarag.finetune.run import trial

    return trial(from_keywords(model, train_data, output_dir, None, None, choose_adapter, **arguments))


def adapter_defaults(name: str) -> dict[str, Any]:
    """The flags whose default the named adapter declares otherwise."""
    from ultrarag.plugins import registry

    return dict(registry().adapter(name).declared.finetune_defaults)


def choose_adapter(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The adapter that the model in these settings calls for, and its own defaults.

    Raises:
        UsageError: no adapter claims the model, or several do.
    """
    from ultrarag.encoder import find_adapter

    hub = {name: settings.get(name) for name in ("cache_dir", "token")}
    name = find_adapter(str(settings["model_name_or_path"]), **hub)
    return name, adapter_defaults(name)
