"""The command `python -m ultrarag.retrieve.mine`, with the flags of FlagEmbedding's hn_mine; see `ultrarag data mine`.

The function `mine` is in `ultrarag.retrieve.mining.miner`; this module is run, not imported.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from ultrarag.data.cli import main

    sys.exit(main(["mine", *sys.argv[1:]]))
