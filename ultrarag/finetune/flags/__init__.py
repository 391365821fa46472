"""The room of settings: every flag of a fine-tune, ours, transformers' and the peers' spellings.

A command line or keywords come in; one checked `FinetuneArguments` goes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.finetune.flags.arguments import (
        DataArguments,
        FinetuneArguments,
        from_keywords,
        named_adapter,
        parse_command_line,
    )
    from ultrarag.finetune.flags.command_line import refuse_unknown
    from ultrarag.finetune.flags.learning import BASE, PARENT, FalseNegativeArguments, IncrementalArguments
    from ultrarag.finetune.flags.own import EVERY_DATASET, LoraArguments
    from ultrarag.finetune.flags.refusals import refuse_unsupported
else:
    __getattr__, __dir__, __all__ = exports(__name__)
