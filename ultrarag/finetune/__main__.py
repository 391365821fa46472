"""`torchrun -m ultrarag.finetune --adapter NAME ...`: fine-tuning from the shell."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from ultrarag.io import print_result, run_command

if TYPE_CHECKING:
    from ultrarag.finetune.check import RenderedBatch
    from ultrarag.finetune.flags import FinetuneArguments
    from ultrarag.finetune.report import FinetuneResult


def main(argv: Sequence[str] | None = None, adapter: str | None = None) -> int:
    """Run one fine-tuning command; return the exit status: 0, 1 (it failed), 2 (wrong usage), 130 (Ctrl-C).

    Args:
        argv: the words after the program's name.
        adapter: the adapter, where the command fixes it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    if as_json:
        words.remove("--json")
    return run_command(lambda: _run(words, adapter, as_json))


def _run(words: list[str], adapter: str | None, as_json: bool) -> int:
    from ultrarag.finetune import adapter_defaults, choose_adapter
    from ultrarag.finetune.flags import named_adapter, parse_command_line

    name = adapter or named_adapter(words)
    arguments = parse_command_line(words, adapter, adapter_defaults(name) if name else None, choose_adapter)
    with redirect_stdout(sys.stderr):  # libraries that print (DeepSpeed does) must not spoil the result
        result = _dry_run(arguments) if arguments.dry_run else _train(arguments)
    if result is not None:
        print_result(result, as_json)
    return 0


def _train(arguments: FinetuneArguments) -> FinetuneResult | None:
    from ultrarag.finetune.run import run

    return run(arguments)


def _dry_run(arguments: FinetuneArguments) -> RenderedBatch | None:
    from ultrarag.finetune.run import dry_run

    return dry_run(arguments)


if __name__ == "__main__":
    sys.exit(main())
