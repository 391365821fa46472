"""What happens around the steps: log lines and a bar on stderr, and a clean stop at Ctrl-C."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ultrarag.finetune.step.distributed import most
from ultrarag.finetune.step.watch import tell
from ultrarag.hookspecs import Features
from ultrarag.io import print_error, progress_bar, visible


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
            self.bar.write(visible(line), file=sys.stderr)
        else:
            print_error(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the run stopped with all saved that it takes to go on."""


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
        print_error("stopping after this step and saving a checkpoint (Ctrl-C again: at once)")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop when any rank was asked to."""
        told = tell(state.global_step, state.max_steps)
        if most(int(self.asked or told)):
            self.stopped = True
            control.should_training_stop = True
            control.should_save = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Tell whoever watches the loss."""
        if logs and "loss" in logs:
            tell(state.global_step, state.max_steps, float(logs["loss"]))

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


#: Dense bf16 and fp16 arithmetic of GPUs in 1e12 operations per second, by a part of their name; NVIDIA's data sheets.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "4090": 165}


class Throughput:
    """Counts the tokens of this process between two log entries."""

    def __init__(self, model: nn.Module, device: torch.device, half: bool, peak_tflops: float | None = None) -> None:
        """Measure a model.

        Args:
            half: it is trained in bf16 or fp16; without that no peak is assumed.
            peak_tflops: what the device can do, in 1e12 operations per second; default: by its name.
        """
        self.device = device
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._weights = sum(module.weight.numel() for module in linear)
        config = getattr(model, "config", None)
        self._attention = int(getattr(config, "num_hidden_layers", 0)) * int(getattr(config, "hidden_size", 0))
        self._peak = peak_tflops or (_known_peak(device) if half else None)
        self._restart()

    def count(self, sides: Sequence[Features]) -> None:
        """Count a batch's tokens (before it is moved to the device: a sum there would wait for it)."""
        for side in sides:
            mask = side["attention_mask"]
            lengths = mask.sum(1).double()
            self._tokens += int(lengths.sum())
            self._places += mask.numel()
            self._squares += float((lengths**2).sum())

    def entries(self) -> dict[str, float]:
        """What was achieved since the last call, for the log; rounded."""
        seconds, tokens = time.perf_counter() - self._since, self._tokens
        if not tokens:
            return {}
        found = {
            "tokens_per_second": float(round(tokens / seconds)),
            "padding": round(1 - tokens / self._places, 3),
            "peak_memory_gib": round(peak_memory(self.device) / 2**30, 2),
        }
        if self._peak:
            found["mfu"] = round(self.flops() / seconds / (self._peak * 1e12), 3)
        self._restart()
        return found

    def flops(self) -> float:
        """Operations of forward and backward over the tokens counted: three times the forward's.

        Each token meets every weight of a linear layer once, and in every layer each token of its text twice (query
        with key, share with value). Recomputation (GradCache, checkpointing) and padding do not count.
        """
        return 3.0 * (2.0 * self._weights * self._tokens + 4.0 * self._attention * self._squares)

    def _restart(self) -> None:
        self._since, self._tokens, self._places, self._squares = time.perf_counter(), 0, 0, 0.0


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use: the GPU's by torch, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _known_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in name), None)
