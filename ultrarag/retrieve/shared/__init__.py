"""A live index that many processes share through a vector server (docs/shared-index.md).

The server holds the passages with their place in the write log, the vectors of each generation, and who may write.
Every process keeps a mirror of the passages in a directory of its own, and answers from it and the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.shared.creation import (
        check_mirror,
        check_quantise,
        create_mirror,
        create_shared,
        mirror_path,
        remove_shared,
    )
    from ultrarag.retrieve.shared.lease import LeaseError
    from ultrarag.retrieve.shared.link import Link, Watcher
else:
    __getattr__, __dir__, __all__ = exports(__name__)
