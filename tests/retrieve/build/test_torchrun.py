"""Building a generation with several processes: every passage encoded once, whatever is killed, and joined by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.retrieve.test_live import assert_complete, corpus
from ultrarag import Encoder
from ultrarag.encode import ranks
from ultrarag.encode.ranks import FOLDER, Encoded, Known, Rank, passages_of
from ultrarag.errors import IndexStateError
from ultrarag.retrieve.build import __main__ as module
from ultrarag.retrieve.build.__main__ import encode_share, main
from ultrarag.retrieve.build.child import Build
from ultrarag.retrieve.live import LiveIndex
from ultrarag.types import Embeddings

#: Passages of a block, in these tests, where the processes are this one.
BLOCK = 16
PASSAGES = 3 * BLOCK + 7


@pytest.fixture
def filled(live, monkeypatch) -> Path:
    """A closed index of four small blocks."""
    monkeypatch.setattr(ranks, "CHUNK_TEXTS", BLOCK)
    live.add(corpus(PASSAGES))
    live.close()
    return live.path


def files_of(root: Path) -> list[Path]:
    return sorted((root / FOLDER).glob("*/*.npz"))


def share(root: Path, checkpoint: Path, number: int, world: int) -> int:
    return encode_share(root, str(checkpoint), Rank(number, world, 0), None, None, "cpu")


def count_encoded(monkeypatch) -> list[str]:
    """The texts that a build encodes itself."""
    encoded: list[str] = []
    encode = Build.encode

    def counting(self, texts):
        encoded.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(Build, "encode", counting)
    return encoded


def test_ranks_share_the_blocks_and_a_build_encodes_what_they_lack(
    filled, checkpoint, tiny, quick_builds, monkeypatch
) -> None:
    assert share(filled, checkpoint, 1, 2) == BLOCK + 7  # blocks 1 and 3; rank 0 never ran
    assert [path.stem for path in files_of(filled)] == ["000000001", "000000003"]
    assert share(filled, checkpoint, 1, 2) == 0  # started again
    assert share(filled, checkpoint, 1, 3) == 0  # and with other ranks: block 1 is there
    with LiveIndex.open(filled, tiny) as live:
        live.add([{"id": f"p{BLOCK + 1}", "text": "written since"}])
        live.delete([f"p{BLOCK + 2}"])
        encoded = count_encoded(monkeypatch)
        live.swap(live.build(checkpoint))
        assert len(encoded) == 2 * BLOCK + 1
        assert "written since" in encoded
        assert_complete(live, PASSAGES - 1)
    assert files_of(filled) == []  # taken


def test_vectors_joined_are_those_of_an_ordinary_build(filled, checkpoint, tiny, other, quick_builds) -> None:
    for number in (0, 1):
        share(filled, checkpoint, number, 2)
    ids = [f"p{row}" for row in range(0, PASSAGES, 5)]
    with LiveIndex.open(filled, tiny) as live:
        live.swap(live.build(checkpoint))
        expected = other.encode([live.get(id).content for id in ids], progress=False)
        found = live.vectors(ids)
    assert np.allclose(found.dense, expected.dense, atol=1e-5)
    for mine, theirs in zip(found.sparse.to_dicts(), expected.sparse.to_dicts(), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    lengths = expected.mask.sum(1)
    assert (found.mask.sum(1) == lengths).all()
    for row, length in enumerate(lengths):
        assert np.allclose(found.colbert[row, :length], expected.colbert[row, :length], atol=1e-5)


def test_vectors_are_found_by_text_and_order_is_kept() -> None:
    from ultrarag.retrieve.passages.files import content_hash

    held = Known([([content_hash("a"), content_hash("b")], Embeddings(dense=np.array([[1.0], [2.0]])))])
    found = held.fill(["b", "new", "a"], lambda texts: Embeddings(dense=np.full((len(texts), 1), 9.0)))
    assert found.dense[:, 0].tolist() == [2.0, 9.0, 1.0]


def test_a_block_holds_its_rows_and_no_others(filled) -> None:
    from ultrarag.retrieve.passages.store import Store

    store = Store.open(filled, read_only=True)
    blocks = Encoded(filled, "f", ["dense"], "fp32", store.last_row())
    assert blocks.block_of(BLOCK) == 0
    assert blocks.block_of(BLOCK + 1) == 1
    assert [passage.id for passage in passages_of(store, *blocks.rows_of(3))] == [
        f"p{row}" for row in range(3 * BLOCK, PASSAGES)
    ]
    store.close()


def test_a_damaged_block_is_named(filled, checkpoint, other) -> None:
    share(filled, checkpoint, 1, 2)
    files_of(filled)[0].write_bytes(b"half a file")
    ahead = Encoded(filled, other.fingerprint, other.heads, "fp32")
    with pytest.raises(IndexStateError, match=r"000000001.npz' is damaged.*delete"):
        ahead.known([BLOCK + 1])


def test_blocks_that_earlier_versions_encoded_are_found(tmp_path) -> None:
    assert Encoded(tmp_path, "f", ["dense"], "fp32").folder == tmp_path / FOLDER / "06be53fa6906601d"


def test_a_passage_at_fault_is_left_out_of_its_block_and_of_the_count(filled, checkpoint, monkeypatch) -> None:
    bad = corpus(PASSAGES)[2 * BLOCK + 3].content
    tokenize = Encoder.tokenize

    def failing(self, texts, *arguments, **options):
        if bad in texts:
            raise ValueError("no tokens")
        return tokenize(self, texts, *arguments, **options)

    monkeypatch.setattr(Encoder, "tokenize", failing)
    assert share(filled, checkpoint, 0, 1) == PASSAGES - 1
    assert len(files_of(filled)) == 4
    assert share(filled, checkpoint, 0, 1) == 0


def test_an_index_in_use_is_joined_by_its_owner(live, checkpoint, quick_builds, monkeypatch, capsys) -> None:
    live.add(corpus(9))
    assert main([str(live.path), str(checkpoint), "--device", "cpu", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["state"] == "encoded"
    assert "in use by this process on" in told.err
    encoded = count_encoded(monkeypatch)
    live.swap(live.build(checkpoint))
    assert encoded == []
    assert_complete(live, 9)


def test_a_missing_index_is_an_error(tmp_path, capsys) -> None:
    assert module.main([str(tmp_path / "none"), "checkpoint"]) == 1
    assert "there is no index" in capsys.readouterr().err


def test_a_worker_killed_in_the_middle_loses_and_doubles_nothing(live, checkpoint) -> None:
    live.add(corpus(passages := 3 * ranks.CHUNK_TEXTS + 7))
    live.close()
    words = ["-m", "ultrarag.retrieve.build", str(live.path), str(checkpoint), "--device", "cpu", "--json"]
    alone = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    with subprocess.Popen([sys.executable, *words], env=alone, stderr=subprocess.DEVNULL) as worker:
        while not files_of(live.path) and worker.poll() is None:
            time.sleep(0.01)
        worker.send_signal(signal.SIGKILL)
    assert worker.returncode == -signal.SIGKILL
    kept = sum(7 if path.stem == "000000003" else ranks.CHUNK_TEXTS for path in files_of(live.path))
    assert kept
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    both = subprocess.run([*launch, *words], capture_output=True, text=True)
    assert both.returncode == 0, both.stderr[-3000:]
    counts = [int(line.split()[4]) for line in both.stderr.splitlines() if line.endswith("passages encoded")]
    assert sum(counts) == passages - kept
    generation = json.loads(both.stdout)
    assert generation["state"] == "ready"
    with LiveIndex.open(live.path) as again:
        again.swap(generation["id"])
        assert_complete(again, passages)
