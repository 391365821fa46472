"""A child for test_child: `python -m tests.io.orphan`; it imports for a minute, and prints when it would live on."""

from __future__ import annotations

import os
import time

from ultrarag.io.child import PARENT

print("PARENT" if PARENT in os.environ else "importing", flush=True)
time.sleep(60)
print("lives on", flush=True)
