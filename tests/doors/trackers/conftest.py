"""A fine-tune and a refresh that report to both trackers, once for all tests: tiny models, offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_m3  # noqa: F401
from tests.retrieve.refresh.refresh_worker import ARGUMENTS, IDS, QRELS, QUERIES, ROWS, TEXTS

SETTINGS = {name: value for name, value in ARGUMENTS.items() if name != "unified_finetuning"}
REPORTERS = ["wandb", "tensorboard"]


@dataclass
class Reported:
    """What was run, where its report lies, and where the trackers' files are."""

    result: Any
    report: Any
    folder: Path

    def wandb(self) -> list[dict[str, Any]]:
        """Each offline run's own file as a dictionary: name, job type, summary and exit code."""
        return [read_wandb(file) for file in sorted(self.folder.glob("wandb/offline-run-*/run-*.wandb"))]

    def tensorboard(self, *below: str) -> Any:
        """The events below a folder."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = sorted({file.parent for file in self.folder.joinpath(*below).rglob("events.out.tfevents.*")})
        assert len(events) == 1, events
        found = EventAccumulator(str(events[0]))
        found.Reload()
        return found


def records(file: Path) -> Iterator[bytes]:
    """The records of wandb's own file: a header of 7 bytes, then LevelDB's log (blocks of 32 KiB, split records)."""
    data, place, kept = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:  # too short for a header: filled up
            place += left
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        kept += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield kept
            kept = b""


def read_wandb(file: Path) -> dict[str, Any]:
    """An offline run, from its file, by the messages that wandb declares."""
    from wandb.proto.wandb_internal_pb2 import Record

    run: dict[str, Any] = {"summary": {}, "history": [], "exit": None}
    for data in records(file):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run |= {"name": record.run.display_name, "job": record.run.job_type, "project": record.run.project}
        elif kind == "exit":
            run["exit"] = record.exit.exit_code
        elif kind in ("history", "summary"):
            items = record.history.item if kind == "history" else record.summary.update
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            run["summary"].update(values)
            if kind == "history":
                run["history"].append(values)
    return run


@pytest.fixture(scope="session")
def reported(tiny_m3: str, tmp_path_factory: pytest.TempPathFactory) -> Reported:  # noqa: F811
    """A fine-tune, then a refresh that climbs the ladder; wandb is offline."""
    from ultrarag import Encoder
    from ultrarag.finetune import finetune
    from ultrarag.retrieve import LiveIndex
    from ultrarag.retrieve.build import start
    from ultrarag.retrieve.build.child import Build
    from ultrarag.retrieve.refresh import ladder
    from ultrarag.types import Passage

    folder = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MODE", "offline"), ("DIR", str(folder)), ("SILENT", "true"), ("PROJECT", "ours")):
            patch.setenv(f"WANDB_{name}", value)
        patch.setattr(start, "run_builder", lambda root, generation, **_: Build(root, generation, None).run(False))
        patch.setattr(ladder, "FEWEST", 1)
        patch.setattr("ultrarag.retrieve.refresh.plan.FEWEST", 1)
        given = {**SETTINGS, "report_to": REPORTERS, "cache_path": str(folder / "cache"), "shared_eval_data": "warn"}
        result = finetune(
            tiny_m3, ROWS, folder / "tuned", "bge", eval_data=ROWS, guard_data=ROWS[:8], run_name="tuned", **given
        )
        with LiveIndex.create(folder / "kb", Encoder.load(tiny_m3, "bge", device="cpu"), backend="numpy") as live:
            live.add([Passage(IDS[text], text) for text in TEXTS])
            report = live.refresh(ROWS, output_dir=folder / "refreshed", gate=(QUERIES, QRELS), effort="auto", **given)
    return Reported(result, report, folder)
