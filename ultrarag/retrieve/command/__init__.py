"""`ultrarag index`: the command line, what each command does, and how results are shown.

Words come in; lines on stdout and an exit code go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.command.feedback import feedback_main
    from ultrarag.retrieve.command.parser import main, parse_weights, share_flags
    from ultrarag.retrieve.command.printing import built
else:
    __getattr__, __dir__, __all__ = exports(__name__)
