"""`python -m ultrarag`: the `ultrarag` command, where its script is not on the path."""

from __future__ import annotations

import sys

from ultrarag.cli import main

if __name__ == "__main__":
    sys.exit(main())
