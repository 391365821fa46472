"""The command `python -m ultrarag.retrieve.mine`, with the flags of FlagEmbedding's hn_mine; see `ultrarag data mine`.

Imported, it is the function `mine`, so that `from ultrarag.retrieve import mine` always gives the function.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from ultrarag.data import main

    sys.exit(main(["mine", *sys.argv[1:]]))
else:
    from ultrarag.mining import mine

    sys.modules[__name__] = mine  # type: ignore[assignment]
