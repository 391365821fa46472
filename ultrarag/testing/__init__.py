"""The conformance kit: what every adapter must do, as checks that third parties run on theirs.

From the shell `ultrarag plugins check NAME --path MODEL`; in a test:

    >>> from ultrarag.testing import check_adapter
    >>> report = check_adapter("bge", model_path)
    >>> assert report.ok, str(report)
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from ultrarag.checkpoint import local_folder
from ultrarag.errors import PluginError, UltraragError
from ultrarag.hookspecs import CONTRACT
from ultrarag.plugin_checks import HOOKS
from ultrarag.plugins import Adapter, registry
from ultrarag.testing.examples import write_example
from ultrarag.testing.subject import Failed, NotApplicable, Report, Result, Subject
from ultrarag.testing.training_checks import (
    check_gradcache,
    check_gradients,
    check_lora,
    check_loss_falls,
    check_other_devices,
)
from ultrarag.testing.vector_checks import (
    check_batch_invariance,
    check_determinism,
    check_fingerprint,
    check_load,
    check_odd_texts,
    check_padding,
    check_publish,
    check_save,
    check_sentence_transformers,
    check_shapes,
)

__all__ = ["CHECKS", "Report", "Result", "check_adapter", "run_check"]

#: Name -> check, in order; a check returns what it measured, or raises Failed or NotApplicable.
CHECKS: dict[str, Callable[[Subject], str]] = {
    "load": check_load,
    "shapes": check_shapes,
    "determinism": check_determinism,
    "batch invariance": check_batch_invariance,
    "padding": check_padding,
    "odd texts": check_odd_texts,
    "gradients": check_gradients,
    "loss falls": check_loss_falls,
    "gradcache": check_gradcache,
    "other devices": check_other_devices,
    "lora": check_lora,
    "save": check_save,
    "publish": check_publish,
    "fingerprint": check_fingerprint,
    "sentence-transformers": check_sentence_transformers,
}


def check_adapter(name: str, path: str | PathLike[str] | None = None, *, device: str = "cpu") -> Report:
    """Check an installed adapter against everything that ultrarag relies on.

    Args:
        name: the adapter's name, as in `ultrarag plugins`.
        path: folder or hub name of a model that it can load; default: the tiny one of its `example_model`.
        device: where to run; the tolerances are those of float32 on a CPU.

    Returns:
        A Report: `report.ok`, `report.failed`, and `print(report)` for people. What is wrong with the adapter is a
        failed result, never an exception.

    Raises:
        UsageError: when the model is not there, or none is named and the adapter offers none.
    """
    try:
        adapter = registry().adapter(name)
    except PluginError as error:
        why = Result("hooks", "failed", str(error), "register it so that `ultrarag plugins` shows it as ok")
        return Report(name, f"adapter '{name}'", str(path or "none"), [why])
    with TemporaryDirectory(prefix="ultrarag-check-") as folder:
        model = Path(folder) / "example" if path is None else local_folder(str(path))
        if path is None:
            write_example(name, _plugin(adapter), model)
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        subject = Subject(adapter, model, scratch, device)
        shown = str(path) if path else "its example"
        hooks = Result("hooks", "ok", f"{', '.join(HOOKS)} (contract {CONTRACT})")
        return Report(name, adapter.describe(), shown, [hooks, *_results(subject)])


def _results(subject: Subject) -> list[Result]:
    """Run all checks; where the model does not load, the others cannot be run."""
    results: list[Result] = []
    for name in CHECKS:
        if results and results[0].status == "failed":
            results.append(Result(name, "not applicable", "the model did not load"))
        else:
            results.append(run_check(name, subject))
    return results


def run_check(name: str, subject: Subject) -> Result:
    """Run one check by its name; whatever the plugin raises is a finding."""
    try:
        return Result(name, "ok", CHECKS[name](subject))
    except Failed as failure:
        return Result(name, "failed", failure.found, failure.remedy)
    except NotApplicable as reason:
        return Result(name, "not applicable", str(reason))
    except UltraragError as error:
        return Result(name, "failed", str(error), "see the message")
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}:{last.lineno}"
        return Result(name, "failed", f"{type(error).__name__}: {error}", f"raised in {where}")


def _plugin(adapter: Adapter) -> object:
    """The plugin object itself, which may offer an example model."""
    return adapter.registry.plugin(adapter.name)
