"""A child for test_child: `python -m tests.io.orphan late|early`; prints what a child that lives on would do."""

from __future__ import annotations

import os
import sys
import time

from ultrarag.io.child import PARENT, end_with_parent


def main() -> None:
    if sys.argv[1] == "late":  # its parent ends while it still imports
        while os.getppid() == int(os.environ[PARENT]):
            time.sleep(0.01)
    end_with_parent()
    print("PARENT" if PARENT in os.environ else "ready", flush=True)
    if sys.argv[1] == "early":
        time.sleep(60)
    print("lives on", flush=True)


if __name__ == "__main__":
    main()
