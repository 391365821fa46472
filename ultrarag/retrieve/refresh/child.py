"""`python -m ultrarag.retrieve.refresh.child`: fine-tune in a process of its own, which ends with its parent.

The request comes as JSON on standard input. Steps, then the result or an error, go to standard output, a line of JSON
each; SIGINT ends it after the step, with a checkpoint to go on from, as Ctrl-C ends a fine-tune.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ultrarag import errors
from ultrarag.errors import TrainingError, UltraragError, UsageError, kind_of
from ultrarag.io import NICENESS, start_child, stop_child

if TYPE_CHECKING:
    from ultrarag.retrieve.refresh.progress import Refreshing

#: Seconds for a child to finish its step and save a checkpoint, when this process is interrupted.
PATIENCE = 60.0
#: What a refresh needs of the result of a fine-tune.
FIELDS = ("fingerprint", "steps", "loss", "metrics", "overlap", "notes")


def finetune_apart(
    refreshing: Refreshing, model: str, rows: Any, folder: Any, given: dict[str, Any], trial: bool = False
) -> Any:
    """`finetune`, or `finetune_trial`, in a child process, with the fields of its result that a refresh needs.

    Raises:
        UsageError: rows or arguments cannot be sent, for they are not JSON.
        UltraragError: of the kind that ended the child.
    """
    request = {"model": model, "train_data": rows, "output_dir": folder, "arguments": given, "trial": trial}
    try:
        text = json.dumps(request, default=os.fspath)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"isolate=True sends rows and arguments to a process of its own, as JSON: {error}; give a path to the "
            f"rows, plain values as arguments, or isolate=False"
        ) from None
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    module = "ultrarag.retrieve.refresh.child"
    with start_child(module, niceness=NICENESS, **pipes) as child, refreshing.training(child):
        try:
            last = _conversed(child, text, refreshing)
            child.wait()
        except BaseException:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                stop_child(child, 1.0)
            raise
    if refreshing.cancelled and "result" not in last:
        raise refreshing.stopped()
    return _result(last, child.returncode)


def _conversed(child: subprocess.Popen[str], text: str, refreshing: Refreshing) -> dict[str, Any]:
    """Send the request, follow the steps, and return what came last."""
    assert child.stdin is not None and child.stdout is not None  # noqa: PT018
    last: dict[str, Any] = {}
    try:
        child.stdin.write(text)
        child.stdin.close()
    except BrokenPipeError:  # it has ended: its status says how
        return last
    for line in child.stdout:
        try:
            found = json.loads(line)
        except ValueError:  # a library prints
            continue
        if not isinstance(found, dict):
            continue
        if "step" in found:
            refreshing.step(found["step"], found["steps"], found["loss"])
        else:
            last = found
    return last


def _result(last: dict[str, Any], status: int) -> Any:
    if "result" in last:
        return SimpleNamespace(**last["result"])
    if "no_map" in last:
        from ultrarag.finetune import NoMap

        raise NoMap(last["no_map"], "see the message")
    if "kind" in last:
        raise getattr(errors, last["kind"], TrainingError)(last["message"])
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
    raise TrainingError(
        f"the process that fine-tunes {how}; what it saved is kept: refresh again with the same arguments to go on"
    )


def main() -> int:
    """Fine-tune once, as standard input says."""
    from ultrarag.finetune import Interrupted, NoMap, finetune, finetune_trial, watching

    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print

    def tell(**values: Any) -> bool:
        print(json.dumps(values), file=out, flush=True)
        return False

    asked = json.load(sys.stdin)
    try:
        with watching(lambda step, steps, loss: tell(step=step, steps=steps, loss=loss)):
            train = finetune_trial if asked["trial"] else finetune
            result = train(asked["model"], asked["train_data"], asked["output_dir"], **asked["arguments"])
    except NoMap as error:
        tell(no_map=error.reason)
        return 1
    except (UltraragError, OSError) as error:
        tell(kind=kind_of(error), message=str(error))
        return 1
    except (Interrupted, KeyboardInterrupt):
        return 130
    found = {name: getattr(result, name) for name in FIELDS}
    tell(result={**found, "notes": list(found["notes"])})
    return 0


if __name__ == "__main__":
    sys.exit(main())
