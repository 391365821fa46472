"""One round of the campaign: a command that gets a signal at a random moment, and what is found afterwards."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from campaign_checks import check_creation, check_index, children, left_over
from faults import IDS, MODEL, WORDS, Journal, building_here, fork, row, run_or_raise, write_on

from ultrarag import Encoder
from ultrarag.errors import UsageError
from ultrarag.io import lasting_interrupts
from ultrarag.maps import LinearMap
from ultrarag.retrieve import LiveIndex, remove_shared
from ultrarag.retrieve.command import main as command

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
#: How often each command is run. `work` writes on and on through one open index; `builder` builds in a process of its
#: own, which imports torch for seconds, as does a refresh.
SHARES = {
    "open": 12, "work": 20, "create": 6, "add": 12, "delete": 8, "search": 6, "status": 3, "build": 8, "builder": 1.5,
    "swap": 8, "rollback": 8, "evaluate": 4, "retry": 4, "vacuum": 6, "refresh": 0.5,
}  # fmt: skip
#: What a build's model is: one of its own, one of the same passages, one with a map behind them; with the end of its
#: checkpoint's name.
KINDS = {"encoded": "", "query": "-query", "map": "-map"}
#: Seconds for which `work` is let go on, at most, after its first acknowledged write.
WORK_SECONDS = 5.0
#: Seconds after which a process that got a signal hangs, after which one that nobody disturbs or that acknowledges
#: nothing does, and after which a builder without a parent is an orphan.
PATIENCE, LONG_PATIENCE, GRACE = 60.0, 300.0, 10.0


class Ground:
    """An index of one engine that is worked on, and what is known of it; lies in a folder of its own."""

    def __init__(self, engine: str, folder: Path, uri: str | None, kinds: list[str]) -> None:
        self.engine, self.folder, self.uri, self.kinds = engine, folder, uri, kinds
        #: names of the checkpoints that builds take
        self.checkpoints = [f"{name}{KINDS[kind]}" for kind in kinds for name in "ab"]
        self.more = {} if kinds == ["encoded"] else {"build": 20, "swap": 20}
        self.kb, self.new = folder / "kb", folder / "new"
        self.mirrors = [self.kb, *([folder / "reader"] if uri else [])]
        self._memory = folder.with_suffix(".json")
        if not self._memory.exists():
            self.begin()
        found = json.loads(self._memory.read_text(encoding="utf-8"))
        #: passages, and numbers of the live, previous and ready generations
        self.known: dict[str, Any] = found["known"]
        #: command -> about how long it takes, in seconds
        self.seconds: dict[str, float] = found["seconds"]

    def begin(self) -> None:
        """Make the index: two generations, and one of each kind that encodes nothing, the last of them live."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "tmp").mkdir(parents=True)
        if self.uri:
            run_or_raise(lambda: _forget(str(self.uri)))
        run_or_raise(self._lay_out)

    def _lay_out(self) -> None:
        encoder = Encoder.load(MODEL, adapter="bgem3", device="cpu")
        where = {"uri": self.uri} if self.uri else {"backend": self.engine}
        rows = [{"id": id, "text": " ".join(random.Random(id).choices(WORDS, k=8)), "metadata": {"n": 1}} for id in IDS]
        with LiveIndex.create(self.kb, encoder, **where) as live, building_here():
            live.add(rows[:20])
            for name, shift in (("a", 0.01), ("b", 0.02)):
                with torch.no_grad():
                    next(iter(encoder.model.parameters())).add_(shift)
                encoder.save(self.folder / name)
            _save_children(self.folder)
            for kind in ["encoded", *(kind for kind in self.kinds if kind != "encoded")]:
                live.swap(live.build(self.folder / f"a{KINDS[kind]}", progress=False))
            number, previous = (live.status()[state]["id"] for state in ("live", "previous"))
        if self.uri:
            LiveIndex.open(self.mirrors[1], uri=self.uri, device="cpu").close()
        passages = {row["id"]: (row["text"], row["metadata"]) for row in rows[:20]}
        self._save({"passages": passages, "live": number, "previous": [previous], "ready": []}, {})
        _write_judged(self.folder, rows)

    def remember(self, known: dict[str, Any]) -> None:
        """Go on from what was found."""
        self.known = known
        self._save(known, self.seconds)

    def _save(self, known: dict[str, Any], seconds: dict[str, float]) -> None:
        self._memory.write_text(json.dumps({"known": known, "seconds": seconds}), encoding="utf-8")

    def can(self, op: str) -> bool:
        """Whether a command makes sense now."""
        return bool(self.known["previous"] if op in ("rollback", "work") else op != "swap" or self.known["ready"])

    def words(self, op: str, chance: random.Random) -> tuple[list[str], dict[str, Any]]:
        """A command line, and what it does to the passages."""
        kb, device = str(self.kb), ["--device", "cpu", "--json"]
        if op == "add":
            rows = list({found["id"]: found for found in (row(chance) for _ in range(chance.randint(1, 12)))}.values())
            lines = "".join(json.dumps(found) + "\n" for found in rows)
            (self.folder / "add.jsonl").write_text(lines, encoding="utf-8")
            return ["add", kb, str(self.folder / "add.jsonl"), *device], {"rows": rows}
        if op == "delete":
            ids = chance.sample(IDS, chance.randint(1, 4))
            return ["delete", kb, *ids, *device], {"ids": ids}
        if op in ("build", "builder"):
            return ["build", kb, str(self.folder / chance.choice(self.checkpoints)), "--threads", "1", *device], {}
        if op == "swap":
            number = chance.choice(self.known["ready"])
            return ["swap", kb, str(number), *device], {"live": number}
        if op == "create":
            where = ["--uri", self.uri.replace("/kb", "/new")] if self.uri else ["--backend", self.engine]
            return ["create", str(self.new), "--model", str(MODEL), "--adapter", "bgem3", *where, *device], {}
        if op == "refresh":
            return ["refresh", kb, *_finetuning(self.folder), *device], {"live": None}
        more = {
            "search": [" ".join(chance.choices(WORDS, k=4)), "--weights", "dense=1,bm25=0.5"],
            "evaluate": [str(self.folder / "judged"), "--weights", "dense=1"],
        }.get(op, [])
        does = {"live": self.known["previous"][0]} if op == "rollback" else {}
        return [op, kb, *more, *(["--json"] if op == "status" else device)], does


def _save_children(folder: Path) -> None:
    """Of each model one with another query side, and one with a map behind its passages' vectors too."""
    models = {name: Encoder.load(folder / name, device="cpu") for name in "ab"}
    for name, other in (("a", "b"), ("b", "a")):
        dim = models[name].dim
        maps = [LinearMap(np.eye(dim) + 0.1 * np.random.default_rng(0).standard_normal((dim, dim)), np.zeros(dim))]
        Encoder.of_sides(models[name], models[other]).save(folder / f"{name}{KINDS['query']}")
        Encoder.of_sides(models[name], models[other], passage_maps=maps).save(folder / f"{name}{KINDS['map']}")


def _write_judged(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Queries about the passages in BEIR's layout, and rows to fine-tune on."""
    (folder / "judged" / "qrels").mkdir(parents=True)
    queries = "".join(json.dumps({"_id": f"q{n}", "text": found["text"]}) + "\n" for n, found in enumerate(rows))
    (folder / "judged" / "queries.jsonl").write_text(queries, encoding="utf-8")
    corpus = "".join(json.dumps({"_id": found["id"], "text": found["text"]}) + "\n" for found in rows)
    (folder / "judged" / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    judged = "".join(f"q{n}\t{found['id']}\t1\n" for n, found in enumerate(rows))
    (folder / "judged" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}", encoding="utf-8")
    train = [{"query": a["text"][:20], "pos": [a["text"]], "neg": [b["text"]]} for a, b in pairwise(rows)]
    (folder / "train.jsonl").write_text("".join(json.dumps(found) + "\n" for found in train), encoding="utf-8")


def _finetuning(folder: Path) -> list[str]:
    flags = {"train_data": "train.jsonl", "output_dir": "refreshed", "cache_path": "cache"}
    fixed = "--no_gate --allow_seen_data --max_steps 4 --save_steps 2 --query_max_len 16 --passage_max_len 24"
    words = [word for name, value in flags.items() for word in (f"--{name}", str(folder / value))]
    return [*words, *fixed.split(), "--learning_rate", "1e-3", "--train_group_size", "2"]


def one_round(
    ground: Ground, chance: random.Random, others: set[int], commands: Sequence[str], signals: Sequence[str]
) -> dict[str, Any]:
    """Run one of these commands, send it one of these signals at a random moment, and report what was found."""
    shares = {op: share for op, share in (SHARES | ground.more).items() if op in commands and ground.can(op)}
    op = chance.choices(list(shares), list(shares.values()))[0] if shares else "work"
    name = chance.choice(signals)
    words, does = ground.words(op, chance) if op not in ("open", "work") else ([], {})
    journal = Journal(ground.folder / "journal")
    child = fork(lambda: _act(ground, op, words, journal, chance.random()))
    status, sent = _interrupt(child, SIGNALS[name], ground.seconds, op, chance, journal)
    found = {"engine": ground.engine, "command": op, "signal": name if sent else "none", "status": status}
    found["live"] = ground.known.get("kind", "encoded")
    found["orphans"] = _orphans(others)
    events = journal.events() if op == "work" else _events(ground.folder, op, does)
    found["acknowledged"] = _acknowledged(events)
    done, begun = ([event["op"] for event in events if event["what"] == what] for what in ("done", "begin"))
    found["operations"], found["under way"] = done, begun[-1] if len(begun) > len(done) else None
    found |= _checked(ground, op, words, events)
    found["ended badly"] = _bad_end(ground.folder, status, SIGNALS[name] if sent else 0)
    journal.path.unlink()
    return found


#: Commands whose acknowledgement is a promise.
WRITES = ("add", "delete", "swap", "rollback", "refresh")


def _act(ground: Ground, op: str, words: list[str], journal: Journal, seed: float) -> int:
    """The forked process's work: a command line, or an index that is opened and maybe written to."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _redirect(ground.folder)
        faulthandler.register(signal.SIGUSR1)
        with lasting_interrupts(), nullcontext() if op == "builder" else building_here():
            if words:
                return command(words)
            with LiveIndex.open(ground.kb, device="cpu") as live:
                if op == "work":
                    checkpoints = [ground.folder / name for name in ground.checkpoints]
                    write_on(live, journal, int(seed * 2**32), checkpoints=checkpoints)
    except KeyboardInterrupt:
        return 130
    return 0


def _redirect(folder: Path) -> None:
    """What is printed goes into files, and temporary files into a folder that is looked at."""
    import tempfile

    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
    for handle, name in ((1, "stdout"), (2, "stderr")):
        sys.stdout.flush()
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)


def _interrupt(
    child: int, number: int, seconds: dict[str, float], op: str, chance: random.Random, journal: Journal
) -> tuple[int | None, bool]:
    """Send the signal at a random moment; return the exit status (None: it hung), and whether the process was still
    there to be sent it.

    The moment is within the usual duration of a command, which nobody disturbs the first time, so that it is known. Of
    `work` it is after the first write that was acknowledged.
    """
    begun, usual = time.monotonic(), seconds.get(op)
    if op == "work":
        status = _wait(child, LONG_PATIENCE, lambda: _acknowledged(journal.events()) > 0)
        if status is None and _acknowledged(journal.events()):
            status = _wait(child, chance.uniform(0, WORK_SECONDS))
    else:
        status = _wait(child, LONG_PATIENCE if usual is None else chance.uniform(0, 1.2 * usual))
    took = time.monotonic() - begun
    if status is not None:
        seconds[op] = took if usual is None else 0.3 * usual + 0.7 * took
        return status, False
    if took >= LONG_PATIENCE:
        return _end_hung(child), False
    os.kill(child, number)
    status = _wait(child, PATIENCE)
    took = time.monotonic() - begun
    if status is None:
        return _end_hung(child), True
    if usual is not None and took > 0.9 * usual:  # it was not done yet: it may take longer than was thought
        seconds[op] = max(usual, min(1.3 * took, 60.0))
    return status, True


def _acknowledged(events: list[dict[str, Any]]) -> int:
    """How many of the events promise that something was written."""
    return sum(event["what"] == "done" and event["op"] in WRITES for event in events)


def _end_hung(child: int) -> None:
    os.kill(child, signal.SIGUSR1)  # it shows where its threads are
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _wait(child: int, seconds: float, until: Callable[[], bool] = lambda: False) -> int | None:
    """The exit status of a process, negative for a signal; None when it has not ended in time, or by `until`."""
    deadline = time.monotonic() + seconds
    while True:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline or until():
            return None
        time.sleep(0.002)


def _events(folder: Path, op: str, does: dict[str, Any]) -> list[dict[str, Any]]:
    """What a command began, and whether it printed its result, which acknowledges it."""
    printed = (folder / "stdout").read_text(encoding="utf-8") if (folder / "stdout").exists() else ""
    begun = {"what": "begin", "op": op, "number": 0, **does}
    return [begun, {"what": "done", "op": op, "number": 0}] if printed.endswith("\n") else [begun]


def _bad_end(folder: Path, status: int | None, number: int) -> list[str]:
    """A process that hung, failed though nobody disturbed it, or showed a traceback."""
    shown = (folder / "stderr").read_text(encoding="utf-8") if (folder / "stderr").exists() else ""
    for name in ("stdout", "stderr"):
        (folder / name).unlink(missing_ok=True)
    if status is None:
        return [f"hung: {shown[-6000:]}"]
    right = {0, -number, *([130] if number == signal.SIGINT else [])}
    if status in right and "\nTraceback" not in f"\n{shown}":
        return []
    return [f"exit status {status}: {shown[-1500:]}"]


def _orphans(others: set[int]) -> list[str]:
    """Processes that the ended one left; they are ended too."""
    deadline = time.monotonic() + GRACE
    while left := _living(others):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for process in left:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return [str(process) for process in left]


def _living(others: set[int]) -> set[int]:
    """Our children that have not ended; those that have are reaped."""
    living = set()
    for process in children(os.getpid()) - others:
        try:
            if os.waitpid(process, os.WNOHANG)[0] == 0:
                living.add(process)
        except ChildProcessError:  # it was `ps`
            continue
    return living


def _checked(ground: Ground, op: str, words: list[str], events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a fresh process finds; an index that is broken is kept aside, and another one made."""

    def look() -> None:
        result = {"lost": [], "closed": [], "wrong": []}
        if op == "create":
            result = check_creation(ground.new, words, ground.uri.replace("/kb", "/new") if ground.uri else None)
        state = check_index(ground.mirrors, events, ground.known)
        merged = {name: [*result[name], *state[name]] for name in result}
        _note(ground.folder / "found.json", {**state, **merged})

    found = _in_a_fresh_process(ground.folder, look)
    for name in ("new", "refreshed", "cache"):
        shutil.rmtree(ground.folder / name, ignore_errors=True)
    found["left over"] = left_over(ground.folder)
    for path in found["left over"]:
        remove(ground.folder / path)
    if "known" in found:
        ground.remember(found.pop("known"))
    if found["closed"]:
        ground.folder.rename(_aside(ground.folder))
        ground.begin()
        ground.known = json.loads(ground._memory.read_text(encoding="utf-8"))["known"]
    return found


def _in_a_fresh_process(folder: Path, look: Callable[[], None]) -> dict[str, Any]:
    """The answer of a forked process that writes it into a file; one that dies or hangs did not open the index."""
    (folder / "found.json").unlink(missing_ok=True)
    child = fork(lambda: (_quiet(folder), look())[1])
    status = _wait(child, 2 * PATIENCE)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not (folder / "found.json").exists():
        how = "hangs" if status is None else f"exit status {status}"
        return {"lost": [], "wrong": [], "closed": [f"the process that opens it: {how}"]}
    found: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return found


def _quiet(folder: Path) -> None:
    os.dup2(os.open(folder / "check.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)


def _note(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _forget(uri: str) -> None:
    """Remove the shared index that was found broken: the next one has its name."""
    with suppress(UsageError):
        remove_shared(uri)


def remove(path: Path) -> None:
    """A file or a folder, so that it is counted once."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _aside(folder: Path) -> Path:
    """A name for a broken index that nobody has yet."""
    return next(found for n in range(10**6) if not (found := folder.with_name(f"broken-{folder.name}-{n}")).exists())
