"""Settings: every flag of a fine-tune, ours, transformers' and the peers' spellings.

A command line or keywords come in; one checked `FinetuneArguments` goes out, and its groups go on as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.finetune.flags.aliases import own_name
    from ultrarag.finetune.flags.arguments import (
        FinetuneArguments,
        from_keywords,
        parse_command_line,
        refuse_unsupported,
    )
    from ultrarag.finetune.flags.command_line import named_adapter, refuse_unknown
    from ultrarag.finetune.flags.groups import (
        AUTO,
        BASE,
        EVERY_DATASET,
        PARENT,
        DataArguments,
        FalseNegativeArguments,
        IncrementalArguments,
        LoraArguments,
        ModelArguments,
    )
    from ultrarag.finetune.flags.sides import OTHER_SIDE, SideArguments
    from ultrarag.finetune.flags.transformers import check_reporters
else:
    __getattr__, __dir__, __all__ = exports(__name__)
