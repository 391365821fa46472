"""OpenBMB's UltraRAG v3 has our import name: pip puts both distributions into one folder, over each other's files."""

from __future__ import annotations

import os

#: Distributions, as pip writes their names into those of folders.
OURS, THEIRS = "ultrarag_retrieval", "ultrarag"


def refuse_shared_files(site: str) -> None:
    """Raise ImportError when both distributions have written the same files below `site`, where packages lie.

    Which of them a file belongs to then depends on what was installed last, and whoever is removed takes it along. It
    costs a listing of the folder, 0.3 ms.
    """
    theirs = _written(site, THEIRS)
    shared = sorted(theirs & _written(site, OURS)) if theirs else []
    if shared:
        raise ImportError(
            f"the distributions 'ultrarag-retrieval' (this library) and 'ultrarag' (most likely OpenBMB's UltraRAG v3) "
            f"are both installed in {site} and have written over each other's files ({', '.join(shared[:3])}): give "
            f"each an environment of its own, or pip uninstall -y ultrarag ultrarag-retrieval and install one again"
        )


def _written(site: str, distribution: str) -> set[str]:
    """The files under our import name that a distribution's record lists."""
    folders = (name for name in os.listdir(site) if name.lower().startswith(f"{distribution}-"))
    records = (os.path.join(site, name, "RECORD") for name in folders if name.endswith(".dist-info"))
    return {path for record in records if os.path.isfile(record) for path in _python_files(record)}


def _python_files(record: str) -> set[str]:
    with open(record, encoding="utf-8") as file:
        paths = {line.partition(",")[0] for line in file}
    return {path for path in paths if path.startswith("ultrarag/") and path.endswith(".py")}
