"""Input and output: durable files, locks, child processes, vectors in files, commands and the terminal.

Bytes, arrays and lines come in and go out; nothing here knows what they mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.io.child import NICENESS, start_child, stop_child
    from ultrarag.io.command import (
        lasting_interrupts,
        leave,
        print_error,
        print_result,
        run_action,
        run_command,
        standard_input,
        underscored,
    )
    from ultrarag.io.conditions import UNWRITABLE, check_room, named_conditions, named_when_full, resource_error
    from ultrarag.io.durable import (
        CHECKSUM_FILE,
        copy_with_holes,
        link_tree,
        publish_directory,
        read_seal,
        remove_left_over,
        remove_seal,
        remove_stale_stages,
        replacing,
        seal,
        sha256_of,
        staged_directory,
        sync_directory,
        sync_tree,
        user_cache,
        verify_seal,
        write_bytes,
        write_json,
    )
    from ultrarag.io.lock import OwnerLock, read_owner
    from ultrarag.io.output import Output, identity, resumable
    from ultrarag.io.terminal import (
        json_line,
        progress_bar,
        quiet_progress,
        secret_in,
        table,
        visible,
        width,
        without_secret,
    )
    from ultrarag.io.vectors import CHUNK_TEXTS, Column, Vectors, only, padded_sparse, padded_tokens
else:
    __getattr__, __dir__, __all__ = exports(__name__)
