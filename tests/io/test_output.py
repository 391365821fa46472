"""Output files: whole or absent, and resumable from whatever a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from ultrarag.errors import DataError
from ultrarag.io.output import part_path, resumable


def write(path, items, stop_before=None, made_by=None, **options):
    """Write items as rows; raise before one of them."""
    with resumable(path, made_by or {"items": 5}, **options) as out:
        for item in items[out.done :]:
            if item == stop_before:
                raise RuntimeError("stop")
            out.state["sum"] = out.state.get("sum", 0) + item
            out.write({"item": item})
            out.advance()
        return out.state["sum"]


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError):
        write(path, [1, 2, 3, 4, 5], stop_before=4)
    assert not path.exists()
    assert part_path(path).read_text().count("\n") == 3
    assert write(path, [0, 0, 0, 4, 5]) == 15  # the first three are not written again
    assert path.read_text().splitlines() == [f'{{"item": {i}}}' for i in (1, 2, 3, 4, 5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl"]


def test_a_run_stopped_inside_an_item_writes_it_once(tmp_path):
    path = tmp_path / "out.jsonl"

    def stopped():
        with resumable(path, {}) as out:
            out.write({"item": 1})
            out.advance()
            out.write({"item": 2})  # and its other lines are not written yet
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with resumable(path, {}) as out:
        assert out.done == 1
        out.write({"item": 2})
        out.advance()
    assert path.read_text().count("\n") == 2


def test_what_was_written_after_the_last_commit_is_written_again(tmp_path):
    path = tmp_path / "out.jsonl"
    code = f"""
import os, signal
from ultrarag.io import output
with output.resumable({str(path)!r}, {{"items": 5}}) as out:
    for item in (1, 2, 3):
        out.write({{"item": item}}); out.advance()
        out.state["sum"] = item * (item + 1) // 2
        if item == 2: out.commit()
    out._files[0].flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert part_path(path).read_text().count("\n") == 3
    assert write(path, [0, 0, 3, 4, 5]) == 15
    assert path.read_text().count("\n") == 5


def test_other_arguments_are_refused_unless_overwritten(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError):
        write(path, [1, 2], stop_before=2)
    with pytest.raises(DataError, match=r"begun with another items: .*--overwrite"):
        write(path, [1, 2], made_by={"items": 6})
    assert write(path, [1, 2], made_by={"items": 6}, overwrite=True) == 3
    with pytest.raises(DataError, match="exists"):
        write(path, [1, 2])


def test_a_run_that_did_nothing_leaves_nothing(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError):
        write(path, [1], stop_before=1)
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with resumable(path, {}), pytest.raises(DataError, match="another process"), resumable(path, {}):
        pass


def test_a_kill_between_two_renames_is_finished_by_the_next_run(tmp_path, monkeypatch):
    targets = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]

    def killed(source, target, real=os.replace):
        if str(target).endswith("b.jsonl"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), resumable(targets, {}) as out:
        out.write({"x": 1}, file=1)
    monkeypatch.undo()
    with pytest.raises(DataError, match="begun with another"), resumable(targets, {"k": 1}):
        pass
    with resumable(targets, {}) as out:
        assert out.finished
    assert targets[1].read_text() == '{"x": 1}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_what_comes_after_the_names_is_done_by_the_next_run(tmp_path, killed_when_published):
    path, calls = tmp_path / "out.jsonl", []

    def call(**options):
        with resumable(path, {"k": 1}, **options) as out:
            out.afterwards(lambda: calls.append(out.finished))
            if not out.finished:
                out.write({"x": 1})
                out.advance()

    killed_when_published(call)
    assert calls == []
    call()
    assert calls == [True]
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(DataError, match="exists"):  # that run was told that it is done
        call()
    killed_when_published(lambda: call(overwrite=True))
    path.unlink()  # moved away: there is nothing left that could be finished
    call()
    assert calls == [True, False]
    killed_when_published(lambda: call(overwrite=True))
    path.write_text("something else")
    with pytest.raises(DataError, match="exists"):
        call()
