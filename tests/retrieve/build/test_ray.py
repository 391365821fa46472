"""Builds on Ray: the parts by themselves, the build with its workers played in this process, and a real Ray of two."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from tests.retrieve import servers
from tests.retrieve.conftest import POISON
from tests.retrieve.test_live import assert_complete, corpus
from ultrarag import Encoder
from ultrarag.encode.blocks import Ledger
from ultrarag.encode.ray import driver as driver_module
from ultrarag.encode.ray import pipeline
from ultrarag.encode.ray import worker as worker_module
from ultrarag.encode.ray.driver import LEDGER_FILE, Driver, EncodeOnRay
from ultrarag.encode.ray.pipeline import RayJob
from ultrarag.encode.ray.worker import Attempts, Order, Worker, read_block
from ultrarag.errors import CheckpointError, IndexStateError, UsageError
from ultrarag.retrieve import remove_shared
from ultrarag.retrieve.build import start
from ultrarag.retrieve.build.child import Build
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.on_ray import RayPool
from ultrarag.types import Passage

#: Passages of a block, in these tests.
BLOCK = 16

# What is refused before anything is begun


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is there, or seems to be."""
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("numpy", "'numpy' is in the index directory: name one with backend='qdrant://HOST'"),
        ("qdrant-edge", r"torchrun \(docs/distributed.md\)"),
        ("qdrant:///some/folder", "a folder that one process can open"),
    ],
)
def test_vectors_in_a_directory_are_refused(live, checkpoint, installed, backend: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        live.build(checkpoint, backend=backend, ray=RayPool())
    assert len(live.status()["generations"]) == 1


def test_an_encoder_in_memory_is_refused(live, other, installed) -> None:
    with pytest.raises(UsageError, match="save the encoder first"):
        live.build(other, backend="milvus://127.0.0.1:1", ray=RayPool())


def test_ray_that_is_not_installed_is_named(live, checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ray\[data\]==\d"):
        live.build(checkpoint, backend="milvus://127.0.0.1:1", ray=RayPool())


@pytest.mark.parametrize(
    ("wish", "said"), [({"address": "ray://head:10001"}, "on a machine of the cluster"), ({"workers": 0}, "1 or more")]
)
def test_a_pool_that_cannot_be_is_refused(wish, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        RayPool(**wish)


def test_flags_of_ray_need_its_address(tmp_path: Path, capsys) -> None:
    from ultrarag.retrieve.command.parser import main

    assert main(["build", str(tmp_path), "checkpoint", "--workers", "2"]) == 2
    assert "--ray ADDRESS" in capsys.readouterr().err


# A worker, without Ray around it


@pytest.fixture
def order(checkpoint, other, rest, tmp_path: Path) -> Order:
    """What a worker has to know, of an empty collection."""
    from ultrarag.retrieve.engines.registry import Schema, create

    probe = other.encode(["x"], progress=False)
    backend = create(tmp_path / "vectors", Schema.of(probe, other.fingerprint), rest.uri)
    files = {name: (backend.directory / name).read_bytes() for name in ("schema.json", "collection.json")}
    yield Order(str(checkpoint), None, other.fingerprint, "fp32", other.heads, "cpu", 1, None, files)
    backend.close()


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Small chunks; and what a worker that is played here opens is closed, which Ray does by ending its process."""
    opened = []
    open_backend = worker_module.open_backend

    def opening(*arguments):
        opened.append(open_backend(*arguments))
        return opened[-1]

    monkeypatch.setattr(worker_module, "CHUNK_TEXTS", 6)
    monkeypatch.setattr(worker_module, "open_backend", opening)
    monkeypatch.setattr(worker_module.tempfile, "tempdir", str(tmp_path))
    yield
    for backend in opened:
        backend.close()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    """Attempts as an actor would count them."""
    counter = Attempts()
    remote = SimpleNamespace(begin=SimpleNamespace(remote=counter.begin))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda value: value))
    return remote


def block_table(number: int):
    return worker_module._row(block=number)


def told(table) -> dict:
    row = table.to_pylist()[0]
    return json.loads(row["error"]) if row["error"] else {}


def test_a_worker_confirms_a_block(live, order: Order, counted, rest) -> None:
    live.add([*corpus(BLOCK + 3), Passage("odd/id \x00", "the red apple " * 2000, metadata={"lang": "zh", "n": [1]})])
    worker = Worker(order, counted)
    for number, size in ((0, BLOCK), (1, 4), (2, 0)):
        found = worker(read_block(block_table(number), str(live.path), 0, BLOCK, 99)).to_pylist()[0]
        assert (found["block"], found["passages"], found["error"]) == (number, size, "")
        assert json.loads(found["cuts"]) == ([["texts", 128, number, size]] if size else [])
    assert worker._backend.count() == BLOCK + 4
    query = np.ones(worker._backend.schema.dense)
    assert [id for id, _ in worker._backend.search_dense(query, 5, {"lang": "zh"})] == ["odd/id \x00"]


def test_a_worker_with_another_checkpoint_says_so(live, order: Order, counted, tiny, tmp_path: Path) -> None:
    live.add(corpus(3))
    another = tiny.save(tmp_path / "another")
    worker = Worker(replace(order, checkpoint=str(another)), counted)
    found = worker(read_block(block_table(0), str(live.path), 0, 9, 99))
    assert told(found)["kind"] == "CheckpointError"
    assert "give all nodes the same folder" in told(found)["message"]


def test_a_worker_whose_server_goes_away_says_so(live, order: Order, counted, rest) -> None:
    live.add(corpus(3))
    worker = Worker(order, counted)
    rest.failures = [(400, {})]
    assert "not now" in told(worker(read_block(block_table(0), str(live.path), 0, 9, 99)))["message"]


def test_a_block_that_kills_its_workers_is_given_up(live, order: Order, counted) -> None:
    live.add(corpus(3))
    worker, table = Worker(order, counted), read_block(block_table(0), str(live.path), 0, 9, 99)
    said = [told(worker(table)) for _ in range(5)]
    assert said[:4] == [{}] * 4
    assert "was begun 4 times" in said[4]["message"]


def test_an_index_that_a_node_does_not_have_is_named(tmp_path: Path, order: Order, counted) -> None:
    found = Worker(order, counted)(read_block(block_table(0), str(tmp_path / "none"), 0, 9, 99))
    assert "holds no index" in told(found)["message"]


# A build whose workers are played in this process


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, installed, counted) -> list[int]:
    """The builder in this process, and one worker; the blocks that it took."""
    taken: list[int] = []

    def confirmations(self: Driver):
        worker = Worker(self._order("cpu"), counted)
        root, base, ledger = str(self.draft.layout.root), self.draft.generation.base_seq, self.ledger
        for block in ledger.missing():
            taken.append(block)
            rows = read_block(block_table(block), root, ledger.first, ledger.chunk_texts, base)
            yield worker(rows).to_pylist()[0]

    def run(root, generation, *, ray, device=None, threads=None, progress=None, started=None) -> None:
        build = Build(root, generation, device, EncodeOnRay(RayJob.from_json(ray.to_json())))
        with closing(build.draft.backend), closing(build.draft.store):
            build.run(False)

    monkeypatch.setattr(Driver, "_confirmations", confirmations)
    monkeypatch.setattr(start, "run_builder", run)
    return taken


POOL = RayPool(workers=2, block=BLOCK)
PASSAGES = 4 * BLOCK + 7


class Killed(BaseException):
    """What a kill is to a builder that is played here."""


def kill_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Let the builder die when it has confirmed some blocks."""
    confirm, left = Ledger.confirm, [blocks]

    def dying(self: Ledger, block: int, passages: int) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        confirm(self, block, passages)

    monkeypatch.setattr(Ledger, "confirm", dying)


def test_a_driver_that_died_goes_on_after_what_was_confirmed(live, checkpoint, rest, played, monkeypatch) -> None:
    live.add(corpus(PASSAGES))
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            live.build(checkpoint, backend=rest.uri, ray=POOL)
    assert played == [0, 1, 2]  # the third was written to the server, and is not in the ledger
    live.add([Passage("p40", "the changed text"), Passage("new", "a new one")])
    live.delete(["p3", "p41"])
    generation = live.build(checkpoint, backend=rest.uri, ray=POOL)
    assert played == [0, 1, 2, 2, 3, 4]
    live.swap(generation)
    assert_complete(live, PASSAGES - 1)
    folder = live._core.layout.final(generation.id)
    assert not (folder / LEDGER_FILE).exists()
    progress = json.loads((folder / "progress.json").read_text())
    assert (progress["resumed"], progress["taken"]) == (2 * BLOCK, PASSAGES - 2 * BLOCK - 2)
    assert progress["encoded"] == PASSAGES - 2


def test_an_ordinary_build_goes_on_after_one_on_ray(live, checkpoint, rest, played, monkeypatch) -> None:
    live.add(corpus(PASSAGES))
    monkeypatch.setattr(driver_module, "TELL_EVERY", 0)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            live.build(checkpoint, backend=rest.uri, ray=POOL)
    entry = live.status()["generations"][-1]
    assert (entry["progress"]["encoded"], entry["progress"]["total"]) == (2 * BLOCK, PASSAGES)

    def ordinary(root, generation, **wishes) -> None:
        Build(root, generation, "cpu").run(False)

    monkeypatch.setattr(start, "run_builder", ordinary)
    generation = live.build(checkpoint, backend=rest.uri)
    assert json.loads((live._core.layout.final(generation.id) / "progress.json").read_text())["encoded"] == PASSAGES
    live.swap(generation)
    assert_complete(live, PASSAGES)


def test_what_the_server_has_lost_is_encoded_again(live, checkpoint, rest, played, monkeypatch) -> None:
    live.add(corpus(PASSAGES))
    lost = Driver._lost

    def losing(self: Driver) -> set[int]:
        if len(played) == 5:
            self.draft.backend.delete(["p20", "p70"])
        return lost(self)

    monkeypatch.setattr(Driver, "_lost", losing)
    live.swap(live.build(checkpoint, backend=rest.uri, ray=POOL))
    assert played == [0, 1, 2, 3, 4, 1, 4]
    assert_complete(live, PASSAGES)


def test_a_server_that_forgets_every_time_is_an_error(live, checkpoint, rest, played, monkeypatch) -> None:
    live.add(corpus(BLOCK))
    monkeypatch.setattr(Driver, "_lost", lambda self: {0})
    with pytest.raises(IndexStateError, match="confirmed 3 times"):
        live.build(checkpoint, backend=rest.uri, ray=POOL)
    assert played == [0, 0, 0]


def test_an_error_of_a_worker_is_raised_and_the_rest_is_kept(live, checkpoint, rest, played, monkeypatch) -> None:
    live.add(corpus(PASSAGES))
    prepare = Worker._prepare

    def failing(self: Worker) -> None:
        raise CheckpointError("another encoder")

    monkeypatch.setattr(Worker, "_prepare", failing)
    with pytest.raises(CheckpointError, match=r"another encoder \(what was confirmed is kept"):
        live.build(checkpoint, backend=rest.uri, ray=POOL)
    monkeypatch.setattr(Worker, "_prepare", prepare)
    live.swap(live.build(checkpoint, backend=rest.uri, ray=POOL))
    assert_complete(live, PASSAGES)


def test_an_empty_index_needs_no_ray(live, checkpoint, rest, played) -> None:
    live.swap(live.build(checkpoint, backend=rest.uri, ray=POOL))
    assert played == []
    live.add(corpus(2))
    assert_complete(live, 2)


# A real Ray with two workers, and Milvus Lite over TCP

real = pytest.mark.skipif(
    servers.missing("ray") is not None or servers.missing("milvus_lite") is not None,
    reason="ray (pip install -c constraints.txt '.[ray]'; `make` does not), or milvus_lite is not installed",
)
MANY = 40 * BLOCK


@pytest.fixture(scope="module")
def cluster():
    """A Ray with two CPUs on this machine; its address."""
    port = servers.free_port()
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        command = [sys.executable, "-m", "ray.scripts.scripts"]
        options = ["--num-cpus=2", f"--port={port}", "--include-dashboard=false", "--object-store-memory=200000000"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        head = subprocess.Popen(
            [*command, "start", "--head", "--block", "--node-ip-address=127.0.0.1", *options], **quiet
        )
        try:
            servers.wait_for(lambda: servers.listening(port), 120)
            yield SimpleNamespace(address=f"127.0.0.1:{port}", process=psutil.Process(head.pid))
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(60)


def workers(cluster) -> list[psutil.Process]:
    """The processes of the actors that encode."""
    found = []
    for process in cluster.process.children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def confirmed(live_path: Path, generation: int = 2) -> int:
    """The blocks that are in the ledger."""
    try:
        lines = (live_path / "generations" / f"{generation}.tmp" / LEDGER_FILE).read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max(0, len(lines) - 1)


def in_thread(work):
    """Run something beside the test; the result is asked for with `join`."""
    results: dict[str, object] = {}

    def run() -> None:
        try:
            results["value"] = work()
        except BaseException as error:
            results["error"] = error

    thread = threading.Thread(target=run)
    thread.start()

    def join():
        thread.join()
        if "error" in results:
            raise results["error"]  # type: ignore[misc]
        return results["value"]

    return join, thread


@real
def test_a_killed_worker_loses_and_doubles_nothing_while_writes_go_on(
    live, checkpoint, other, milvus_lite, cluster
) -> None:
    live.add(corpus(MANY))
    pool = RayPool(cluster.address, workers=2, block=BLOCK)
    join, thread = in_thread(lambda: live.build(checkpoint, backend=milvus_lite.uri, ray=pool))
    while confirmed(live.path) < 3 and thread.is_alive():
        time.sleep(0.02)
    victims = workers(cluster)
    assert victims, "no worker is at work"
    victims[0].send_signal(signal.SIGKILL)
    assert confirmed(live.path) < 30, "it was not in the middle"
    live.add([Passage("p600", "a changed text"), Passage("new", "a new one")])
    live.delete(["p5", "p639"])
    generation = join()
    progress = json.loads((live._core.layout.final(generation.id) / "progress.json").read_text())
    assert progress["encoded"] <= MANY
    live.swap(generation)
    assert_complete(live, MANY - 1)
    ids = [f"p{row}" for row in range(7, MANY - 1, 31)]
    found, expected = live.vectors(ids), other.encode([live.get(id).content for id in ids], progress=False)
    np.testing.assert_allclose(found.dense, expected.dense, atol=1e-5)
    for mine, theirs in zip(found.sparse.to_dicts(), expected.sparse.to_dicts(), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    lengths = expected.mask.sum(1)
    assert (found.mask.sum(1) == lengths).all()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found.colbert[row, :length], expected.colbert[row, :length], atol=1e-5)


@real
def test_a_driver_stopped_and_then_killed_goes_on(live, checkpoint, milvus_lite, cluster) -> None:
    live.add(corpus(MANY))
    path = live.path
    live.close()
    words = ["--backend", milvus_lite.uri, "--ray", cluster.address, "--workers", "2", "--block", str(BLOCK), "--json"]
    command = [sys.executable, "-m", "ultrarag.cli", "index", "build", str(path), str(checkpoint), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as stopped:
        while confirmed(path) < 2 and stopped.poll() is None:
            time.sleep(0.02)
        stopped.send_signal(signal.SIGINT)
        output, said = stopped.communicate(timeout=60)
    assert (stopped.returncode, output) == (130, ""), said
    before = confirmed(path)
    with subprocess.Popen(command, **pipes) as killed:
        while confirmed(path) < before + 3 and killed.poll() is None:
            time.sleep(0.02)
        for child in psutil.Process(killed.pid).children():
            child.send_signal(signal.SIGKILL)
        output, said = killed.communicate(timeout=60)
    assert (killed.returncode, output) == (1, "")
    assert "was killed by signal 9" in said
    kept = confirmed(path)
    assert 5 <= kept < 40
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    generation = json.loads(done.stdout)
    progress = json.loads((path / "generations" / str(generation["id"]) / "progress.json").read_text())
    assert (progress["resumed"], progress["taken"]) == (kept * BLOCK, MANY - kept * BLOCK)
    with LiveIndex.open(path, device="cpu") as again:
        again.swap(generation["id"])
        assert_complete(again, MANY)


@real
def test_a_node_with_another_checkpoint_stops_the_build(
    live, checkpoint, tiny, milvus_lite, cluster, tmp_path, monkeypatch
) -> None:
    live.add(corpus(3))
    another = tiny.save(tmp_path / "another")
    job = RayJob(RayPool(cluster.address, workers=1), str(another))
    monkeypatch.setattr(RayJob, "of", lambda *arguments: job)
    with pytest.raises(CheckpointError, match="another' is another encoder here than where"):
        live.build(checkpoint, backend=milvus_lite.uri, ray=job.pool)


@real
def test_a_ray_that_is_not_there_is_named(live, checkpoint, milvus_lite) -> None:
    live.add(corpus(3))
    address = f"127.0.0.1:{servers.free_port()}"
    with pytest.raises(IndexStateError, match=f"no connection to Ray at '{address}'.*ray start"):
        live.build(checkpoint, backend=milvus_lite.uri, ray=RayPool(address))


@real
def test_a_ray_of_its_own_in_folders_with_spaces(checkpoint, tiny, milvus_lite, tmp_path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    with LiveIndex.create(folder / "the index", tiny, backend="numpy") as live:
        live.add(corpus(5))
    model = shutil.copytree(checkpoint, folder / "the model")
    words = [str(folder / "the index"), str(model), "--backend", milvus_lite.uri, "--ray", "local", "--workers", "1"]
    command = [sys.executable, "-m", "ultrarag.cli", "index", "build", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["state"] == "ready"
    left = [process for process in psutil.process_iter(["cmdline"]) if str(folder) in str(process.info["cmdline"])]
    assert left == []


@real
def test_a_shared_index_is_built_on_ray(checkpoint, other, tiny, milvus_lite, tmp_path, cluster) -> None:
    uri = f"{milvus_lite.uri}onray"
    with (
        LiveIndex.create(tmp_path / "a", tiny, uri=uri) as live,
        LiveIndex.open(tmp_path / "b", tiny, uri=uri) as reader,
    ):
        live.add(corpus(40))
        live.swap(live.build(checkpoint, ray=RayPool(cluster.address, workers=2, block=16)))
        servers.wait_for(lambda: reader.fingerprint == other.fingerprint, 60)
        query = {"query": "the red apple near the hill", "k": 5, "heads": ["dense"]}
        assert [hit.id for hit in reader.search(**query)] == [hit.id for hit in live.search(**query)]
    remove_shared(uri)


@real
def test_a_passage_that_cannot_be_encoded_stops_no_worker(milvus_lite, tmp_path, cluster, poisoned) -> None:
    """The other passages of its block are encoded, also where the block is taken again by another worker."""
    uri = f"{milvus_lite.uri}poisoned"
    with LiveIndex.create(tmp_path / "kb", Encoder.load(poisoned / "sound", device="cpu"), backend="numpy") as live:
        live.add(corpus(MANY))
        live.add([Passage("poisoned", f"the {POISON} harbour")])
        pool = RayPool(cluster.address, workers=2, block=BLOCK)
        join, thread = in_thread(lambda: live.build(poisoned / "first", backend=uri, ray=pool))
        while confirmed(live.path) < 3 and thread.is_alive():
            time.sleep(0.02)
        if victims := workers(cluster):
            victims[0].send_signal(signal.SIGKILL)
        live.swap(join())
        assert live.status()["live"]["unencoded"] == {"poisoned": "its vector is not finite"}
        assert live._core.live.backend.count() == MANY
        live.rollback()
        assert live.status()["live"]["unencoded"] == {}
