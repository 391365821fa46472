"""The settings of mining under the name that scripts know."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "code",
    [
        "from ultrarag.retrieve.mining.settings import MiningSettings as found",
        "import ultrarag.retrieve.mining.settings; found = ultrarag.retrieve.mining.settings.MiningSettings",
    ],
)
def test_the_settings_are_found_by_either_import(code: str) -> None:
    check = f"{code}\nfrom ultrarag.mining import MiningSettings\nassert found is MiningSettings"
    subprocess.run([sys.executable, "-c", check], check=True)
