"""The code of an older commit, to measure beside today's in one run; a part of other scripts."""

from __future__ import annotations

import configparser
import subprocess
from pathlib import Path

#: the commit that figures are compared with where nothing else is said
COMMIT = "dee4ec6"


def older_code(place: Path, commit: str = COMMIT) -> Path:
    """Write the files of a commit of this checkout into a folder that serves as PYTHONPATH.

    The plugins of the installed distribution are today's; beside the older code lies a description of its own.

    Raises:
        LookupError: the repository does not have the commit, as a shallow clone may not.
    """
    command = ["git", "-C", str(Path(__file__).parents[1]), "archive", commit, "ultrarag", "setup.cfg"]
    found = subprocess.run(command, capture_output=True, check=False)
    if found.returncode:
        raise LookupError(f"the commit '{commit}' cannot be unpacked: {found.stderr.decode().strip()}")
    place.mkdir(parents=True)
    subprocess.run(["tar", "-x", "-C", str(place)], input=found.stdout, check=True)
    setup = configparser.ConfigParser()
    setup.read(place / "setup.cfg", encoding="utf-8")
    described = place / "ultrarag_retrieval-0.0.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: ultrarag-retrieval\nVersion: 0.0.0\n")
    groups = (f"[{group}]\n{names.strip()}\n" for group, names in setup["options.entry_points"].items())
    (described / "entry_points.txt").write_text("\n".join(groups))
    return place
