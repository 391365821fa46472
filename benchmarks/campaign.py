"""Kill -9, SIGTERM and Ctrl-C at random moments of every command that touches an index; count what is lost.

    python benchmarks/campaign.py [--rounds 1000] [--seconds 480] [--engine numpy qdrant-edge ivf shared] [--seed 0]
    python benchmarks/campaign.py --rounds 200 --kinds query map --output benchmarks/results/campaign_shared.json
    python benchmarks/campaign.py --rounds 200 --engine ivf --signals SIGKILL --commands work builder --output FILE

Each round runs one command of `ultrarag index` (or opens the index, or opens it and writes on and on) in a forked
process, sends it a signal at a random moment of the time that it usually takes, and then opens the index in a fresh
process. Counted are acknowledged writes that are lost, indexes that do not open, wrong answers (a hit of another text,
of no passage, with a vector that the encoder does not give its text, or with a score that is not that of query and
passage), processes left, files left, and commands that
hang, fail undisturbed or end in a traceback. With --folder, where the indexes are kept, the same command goes on where
it stopped. The shared index lies in a Milvus Lite server on loopback. The model is the tiny one of the tests. With
--kinds a build's model is one of the same passages (its generation shares vectors), or with a map behind them. `work`
adds, deletes, builds, swaps, rolls back and vacuums through one open index, and gets its signal after its first
acknowledged write. The engine `ivf` is told that tens of passages are many, except in builders of their own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' servers

from campaign_rounds import KINDS, SHARES, SIGNALS, Ground, one_round
from faults import MODEL, few_are_many
from machine import origin, without_folders

from tests.retrieve.servers import MilvusLite
from ultrarag import Encoder

RESULT = Path(__file__).parent / "results" / "campaign.json"
#: How often an engine has its turn: a killed writer of a shared index is waited for until its lease expires.
ENGINES = {"qdrant-edge": 4, "ivf": 4, "numpy": 4, "shared": 1}
#: What is counted -> what the rounds call it.
COUNTS = {
    "acknowledged writes lost": "lost",
    "indexes that do not open": "closed",
    "wrong answers": "wrong",
    "orphans": "orphans",
    "files left over": "left over",
    "commands that ended badly": "ended badly",
}
#: Examples that a result keeps.
SHOWN = 40
_PR_SET_CHILD_SUBREAPER = 36


class Server(MilvusLite):
    """Started again it has the port that it had before, for mirrors know its address."""

    def start(self) -> None:
        """Start on the remembered port."""
        memory = self.folder.with_suffix(".port")
        self.port = int(memory.read_text()) if memory.exists() else self.port
        memory.write_text(str(self.port))
        super().start()


def main() -> int:
    """Run the rounds; the exit status is 1 when anything but zeros was counted."""
    asked = _parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (asked.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # so that what loses its parent becomes our child
        server = Server(folder / "server") if "shared" in asked.engine else None
        try:
            import_all()
            report = campaign(folder, asked, server)
        finally:
            if server:
                server.kill()
    print(json.dumps({name: value for name, value in report.items() if name != "examples"}, indent=1))
    return int(any(report[name] for name in COUNTS))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["encoded"], help="what builds are of")
    parser.add_argument("--commands", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--signals", nargs="+", choices=list(SIGNALS), default=list(SIGNALS))
    parser.add_argument("--folder", type=Path, help="keep the indexes here, and go on with what is there")
    parser.add_argument("--output", type=Path, default=RESULT, help="where the result goes")
    return parser


def import_all() -> None:
    """Import what the rounds use, so that no round pays for it; nothing runs yet."""
    import ultrarag.finetune.step.trainer
    import ultrarag.retrieve.command.commands  # noqa: F401

    Encoder.load(MODEL, adapter="bgem3", device="cpu")
    for name in ("qdrant.embedded", "ivf.engine", "milvus", "milvus.server", "numpy_engine"):
        try:
            import_module(f"ultrarag.retrieve.engines.{name}")
        except ImportError:
            continue
    if find_spec("faiss"):
        few_are_many()


def campaign(folder: Path, asked: argparse.Namespace, server: Server | None) -> dict[str, Any]:
    """Rounds until there are enough, or the time is up; the result is written every 50 rounds and at the end."""
    others = {server.process.pid} if server and server.process else set()
    memory, begun = folder / "rounds.jsonl", time.monotonic()
    earlier = sum(float(line) for line in _lines(folder / "seconds"))
    found: list[dict[str, Any]] = [json.loads(line) for line in _lines(memory)]
    uris = {name: _uri(server) if name == "shared" else None for name in asked.engine}
    grounds = {name: Ground(name, folder / name, uris[name], asked.kinds) for name in asked.engine}
    while len(found) < asked.rounds and not (asked.seconds and time.monotonic() - begun > asked.seconds):
        chance = random.Random(asked.seed + len(found))
        engine = chance.choices(asked.engine, [ENGINES[name] for name in asked.engine])[0]
        found.append({"round": len(found), **one_round(grounds[engine], chance, others, asked.commands, asked.signals)})
        with memory.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found[-1]) + "\n")
        if len(found) % 50 == 0:
            _tell(asked, found, earlier + time.monotonic() - begun)
    with (folder / "seconds").open("a", encoding="utf-8") as file:
        file.write(f"{time.monotonic() - begun}\n")
    return _tell(asked, found, earlier + time.monotonic() - begun)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _uri(server: Server | None) -> str:
    """Two seconds for a request, so that the lease of a killed writer lasts six."""
    assert server is not None
    return f"milvus://127.0.0.1:{server.port}/kb?timeout=2"


def _tell(asked: argparse.Namespace, found: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Write the result, and a line on stderr."""
    report = {**origin(), "seed": asked.seed, "kinds": asked.kinds, "seconds": round(seconds, 1), **summary(found)}
    asked.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    counts = ", ".join(f"{name} {report[name]}" for name in COUNTS)
    print(f"{len(found)} rounds, {seconds:.0f} s: {counts}", file=sys.stderr, flush=True)
    return report


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What was counted over all rounds, and how many there were of each kind."""
    rounds = {kind: dict(Counter(f[kind] for f in found).most_common()) for kind in ("engine", "signal", "command")}
    bad = [(name, f, what) for name, key in COUNTS.items() for f in found for what in f[key]]
    return {
        "rounds": len(found),
        "rounds per engine": rounds["engine"],
        "rounds per signal (none: the command ended first)": rounds["signal"],
        "rounds per command": rounds["command"],
        "rounds that began with generation": dict(Counter(f.get("live", "encoded") for f in found).most_common()),
        "acknowledged writes": sum(f["acknowledged"] for f in found),
        "acknowledged operations": dict(Counter(op for f in found for op in f.get("operations", ())).most_common()),
        "operations under way at the signal": dict(
            Counter(f["under way"] for f in found if f["signal"] != "none" and f.get("under way")).most_common()
        ),
        **{name: sum(kind == name for kind, _, _ in bad) for name in COUNTS},
        "examples": [_example(*found) for found in bad[:SHOWN]],
    }


def _example(name: str, found: dict[str, Any], what: str) -> str:
    what = without_folders(what)
    return f"{name}: round {found['round']}, {found['engine']}, {found['command']}, {found['signal']}: {what}"


if __name__ == "__main__":
    sys.exit(main())
