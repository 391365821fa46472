"""`ultrarag doors ultrarag_v3`: writes the servers into a checkout, and says how a pipeline names them."""

from __future__ import annotations

import argparse

from ultrarag.doors.ultrarag_v3.folders import FOLDERS, write_servers
from ultrarag.io import print_error, print_result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("checkout", metavar="CHECKOUT", help="the folder of UltraRAG, which holds servers/")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of `ultrarag serve` (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON: folder -> whether its parameters are new")


def run(arguments: argparse.Namespace) -> int:
    """Write the servers; print what a pipeline says of them."""
    found = write_servers(arguments.checkout, arguments.url)
    for folder, new in found.items():
        print_error(f"{folder}: " + ("written" if new else "written anew; its parameter.yaml is kept as it was"))
    named = "\n".join(["servers:", *(f"  {name}: servers/{folder}" for name, folder in FOLDERS.items())])
    print_result(found, arguments.json, lambda _: named)
    return 0
