"""A disk that becomes full in a fine-tune: the folder is named, nothing is left that fills it, and the run goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.finetune.test_run import QUICK, ROWS
from tests.retrieve.test_resources import mounted
from ultrarag import Encoder
from ultrarag.errors import ResourceError
from ultrarag.finetune import finetune

OPTIONS = {**QUICK, "adapter": "bgem3", "train_group_size": 2, "max_steps": 4, "save_steps": 2, "use_cpu": True}


@contextlib.contextmanager
def disk_of(kilobytes: int, folder: Path) -> Iterator[Path]:
    with mounted("-t", "tmpfs", "-o", f"size={kilobytes}k", "none", at=folder / "disk") as place:
        yield place


@pytest.mark.parametrize(
    ("kilobytes", "where"),
    [(60, "out/checkpoint-2"), (200, "out/checkpoint-2"), (700, "out/checkpoint-4"), (1100, "out'")],
    ids=["weights", "optimizer", "second checkpoint", "published model"],
)
def test_the_folder_is_named_and_nothing_begun_is_left(tiny_m3, tmp_path, kilobytes, where) -> None:
    with disk_of(kilobytes, tmp_path) as disk:
        with pytest.raises(ResourceError, match=rf"disk/{where}.*No space left on device; make room on the disk"):
            finetune(tiny_m3, ROWS, disk / "out", **OPTIONS, cache_path=tmp_path / "cache")
        assert [path.name for path in disk.rglob(".*.tmp")] == []


def test_the_run_goes_on_when_there_is_room(tiny_m3, tmp_path) -> None:
    with disk_of(700, tmp_path) as disk:
        with pytest.raises(ResourceError):
            finetune(tiny_m3, ROWS, disk / "out", **OPTIONS, cache_path=tmp_path / "cache")
        assert [path.name for path in (disk / "out").glob("checkpoint-*")] == ["checkpoint-2"]
        resumed = finetune(
            tiny_m3, ROWS, tmp_path / "out", **OPTIONS, resume_from_checkpoint=disk / "out" / "checkpoint-2"
        )
    assert resumed.steps == 4


def test_saving_a_model_names_its_folder(tiny_m3, tmp_path) -> None:
    encoder = Encoder.load(tiny_m3, adapter="bgem3", device="cpu")
    with disk_of(60, tmp_path) as disk:
        with pytest.raises(ResourceError, match=r"disk/model.*No space left on device"):
            encoder.save(disk / "model")
        assert list(disk.iterdir()) == []


def test_an_error_of_torch_save_with_room_stays_what_it_is(tiny_m3, tmp_path, monkeypatch) -> None:
    def broken(*arguments, **options):
        raise RuntimeError("enforce fail at inline_container")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="enforce fail"):
        finetune(tiny_m3, ROWS, tmp_path / "out", **OPTIONS)
