"""What happens around the steps: log lines and a bar on stderr, and a clean stop at Ctrl-C."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ultrarag.finetune.distributed import most
from ultrarag.progress import progress_bar


class StderrProgress(TrainerCallback):
    """A bar on a terminal, and one line per log entry; standard output stays clean for the result."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = progress_bar(state.max_steps, "train", "step")
            self.bar.update(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write one line: step, then what was measured."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        values = " ".join(f"{name} {_short(value)}" for name, value in logs.items() if name != "epoch")
        line = f"step {state.global_step}/{state.max_steps} epoch {state.epoch or 0:.2f} {values}"
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C finishes the step, saves a checkpoint and stops; the second ends the process at once.

    Ranks agree on the step, so that none waits for another forever.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over SIGINT (in the main thread; elsewhere Python allows no handler)."""
        try:
            self._previous = signal.signal(signal.SIGINT, self._ask)
        except ValueError:
            self._previous = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        print("stopping after this step and saving a checkpoint (Ctrl-C again: at once)", file=sys.stderr, flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop when any rank was asked to."""
        if most(int(self.asked)):
            self.stopped = True
            control.should_training_stop = True
            control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give SIGINT back."""
        self.restore()

    def restore(self) -> None:
        """Give SIGINT back to whoever had it."""
        if self._previous is not None and not self.asked:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
