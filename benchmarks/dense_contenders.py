"""The contenders of `dense_engines.py`: each builds an index in a folder, opens it, and gives candidates for a query.

What each returns are rows, which the benchmark scores anew with float16 vectors from the disk, except where a library
does that by itself with vectors that it keeps on the disk (`rescores`).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

#: edges at a node and candidates while a graph is built, for every graph
M, EF_CONSTRUCT = 16, 128
BATCH = 10_000


class Contender:
    """One way to find candidates."""

    #: how much a search does, ascending: the benchmark takes the first that reaches the recall
    efforts: tuple[int, ...] = (32, 64, 128, 256, 512)
    #: candidates that are scored anew, for each hit
    oversampling = 10
    rescores = False

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder, self.dim = folder, dim

    def build(self, vectors: np.ndarray) -> None:
        """Index all vectors, durably."""
        raise NotImplementedError

    def open(self) -> None:
        """Read what was built."""
        raise NotImplementedError

    def search(self, query: np.ndarray, count: int, effort: int) -> np.ndarray:
        """The rows of the best candidates."""
        raise NotImplementedError

    def filtered(self, query: np.ndarray, count: int, effort: int, passing: np.ndarray, label: str) -> np.ndarray:
        """The same of the rows that pass, (rows,) bool; what stores metadata was given `label`."""
        raise NotImplementedError

    def add(self, first: int, vectors: np.ndarray) -> None:
        """Add rows from the number `first` on."""
        raise NotImplementedError

    def delete(self, rows: np.ndarray) -> None:
        """Delete rows."""
        raise NotImplementedError


def batches(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(vectors), BATCH):
        yield start, np.ascontiguousarray(vectors[start : start + BATCH], np.float32)


def labels(row: int) -> dict[str, int]:
    """The metadata that filters of 10 % and 1 % are about: pseudo-random, so that no filter is a range of rows."""
    mixed = row * 2654435761 % 2**32
    return {"tenth": mixed // 7 % 10, "hundredth": mixed // 7 % 100}


class Faiss(Contender):
    """An index of faiss, written to one file."""

    def _made(self, vectors: np.ndarray) -> Any:
        raise NotImplementedError

    def build(self, vectors: np.ndarray) -> None:
        import faiss

        index = self._made(vectors)
        for _, part in batches(vectors):
            index.add(part)
        faiss.write_index(index, str(self.folder / "index"))

    def open(self) -> None:
        import faiss

        self.index = faiss.read_index(str(self.folder / "index"))
        self.dead = np.zeros(self.index.ntotal, bool)

    def search(self, query: np.ndarray, count: int, effort: int) -> np.ndarray:
        selected = self._selecting(~self.dead) if self.dead.any() else None
        return self._found(query, count, effort, selected)

    def filtered(self, query: np.ndarray, count: int, effort: int, passing: np.ndarray, label: str) -> np.ndarray:
        return self._found(query, count, effort, self._selecting(passing))

    def add(self, first: int, vectors: np.ndarray) -> None:
        self.index.add(np.ascontiguousarray(vectors))
        self.dead = np.concatenate([self.dead, np.zeros(len(vectors), bool)])

    def delete(self, rows: np.ndarray) -> None:
        self.dead[rows] = True  # a graph of faiss cannot remove, and a list does so by a scan

    def _found(self, query: np.ndarray, count: int, effort: int, selected: Any) -> np.ndarray:
        found = self.index.search(query[None], count, params=self._parameters(effort, selected))[1][0]
        return found[found >= 0]

    def _parameters(self, effort: int, selected: Any) -> Any:
        raise NotImplementedError

    def _selecting(self, passing: np.ndarray) -> Any:
        import faiss

        self._bits = np.packbits(passing, bitorder="little")
        return faiss.IDSelectorBitmap(len(passing), faiss.swig_ptr(self._bits))


class FaissLists(Faiss):
    """Inverted lists around the centres of k-means, 64 vectors of the sample for each centre."""

    efforts = (8, 16, 24, 32, 48, 64, 96, 128, 256, 512)
    codes = "RaBitQ"

    def _made(self, vectors: np.ndarray) -> Any:
        import faiss

        lists = int(2 ** np.round(np.log2(4 * np.sqrt(len(vectors)))))
        index = faiss.index_factory(self.dim, f"IVF{lists},{self.codes}", faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.max_points_per_centroid = 8, 64
        sample = np.random.default_rng(0).choice(len(vectors), min(len(vectors), 64 * lists), replace=False)
        index.train(np.ascontiguousarray(vectors[np.sort(sample)], np.float32))
        return index

    def _parameters(self, effort: int, selected: Any) -> Any:
        import faiss

        kind = faiss.IVFRaBitQSearchParameters if "RaBitQ" in self.codes else faiss.SearchParametersIVF
        return kind(nprobe=effort, sel=selected)


class FaissFastLists(FaissLists):
    """The same, with codes laid out for the shuffles of vector units."""

    codes = "RaBitQfs"


class FaissBytes(FaissLists):
    """The same lists with a byte for a dimension."""

    codes = "SQ8"
    oversampling = 3


class FaissGraph(Faiss):
    """HNSW over a byte for a dimension."""

    oversampling = 3

    def _made(self, vectors: np.ndarray) -> Any:
        import faiss

        index = faiss.IndexHNSWSQ(self.dim, faiss.ScalarQuantizer.QT_8bit, M, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = EF_CONSTRUCT
        index.train(np.ascontiguousarray(vectors[:BATCH], np.float32))
        return index

    def _parameters(self, effort: int, selected: Any) -> Any:
        import faiss

        return faiss.SearchParametersHNSW(efSearch=effort, sel=selected)


class Usearch(Contender):
    """usearch: a graph; filters cannot be given to it from Python, so they are applied to a wider search."""

    dtype, oversampling = "f16", 3

    def _index(self) -> Any:
        from usearch.index import Index

        return Index(ndim=self.dim, metric="ip", dtype=self.dtype, connectivity=M, expansion_add=EF_CONSTRUCT)

    def build(self, vectors: np.ndarray) -> None:
        index = self._index()
        for start, part in batches(vectors):
            index.add(np.arange(start, start + len(part)), part, threads=1)
        index.save(str(self.folder / "index"))

    def open(self) -> None:
        self.index = self._index()
        self.index.load(str(self.folder / "index"))

    def search(self, query: np.ndarray, count: int, effort: int) -> np.ndarray:
        self.index.expansion_search = effort
        return self.index.search(query, count, threads=1).keys.astype(np.int64)

    def filtered(self, query: np.ndarray, count: int, effort: int, passing: np.ndarray, label: str) -> np.ndarray:
        wide = int(count / passing.mean())
        found = self.search(query, wide, max(effort, wide))
        return found[passing[found]][:count]

    def add(self, first: int, vectors: np.ndarray) -> None:
        self.index.add(np.arange(first, first + len(vectors)), vectors, threads=1)

    def delete(self, rows: np.ndarray) -> None:
        self.index.remove(rows)


class UsearchBytes(Usearch):
    """The same with a byte for a dimension."""

    dtype = "i8"


class Turbovec(Contender):
    """turbovec: a scan of all codes, whose only effort is how many candidates are scored anew."""

    efforts, bits = (1, 2, 4), 2

    def build(self, vectors: np.ndarray) -> None:
        import turbovec

        index = turbovec.IdMapIndex(self.dim, self.bits)
        sample = np.random.default_rng(0).choice(len(vectors), 1024, replace=False)
        index.calibrate(np.ascontiguousarray(vectors[np.sort(sample)], np.float32))
        for start, part in batches(vectors):
            index.add_with_ids(part, np.arange(start, start + len(part), dtype=np.uint64))
        index.sync(str(self.folder / "index"))

    def open(self) -> None:
        import turbovec

        self.index = turbovec.IdMapIndex.load(str(self.folder / "index"))
        self.index.prepare()

    def search(self, query: np.ndarray, count: int, effort: int) -> np.ndarray:
        return self.index.search(query[None], count * effort)[1][0].astype(np.int64)

    def filtered(self, query: np.ndarray, count: int, effort: int, passing: np.ndarray, label: str) -> np.ndarray:
        allowed = np.flatnonzero(passing).astype(np.uint64)
        return self.index.search(query[None], count * effort, allowlist=allowed)[1][0].astype(np.int64)

    def add(self, first: int, vectors: np.ndarray) -> None:
        ids = np.arange(first, first + len(vectors), dtype=np.uint64)
        self.index.add_with_ids(np.ascontiguousarray(vectors), ids)
        self.index.sync(str(self.folder / "index"))

    def delete(self, rows: np.ndarray) -> None:
        for row in rows:
            self.index.remove(int(row))
        self.index.sync(str(self.folder / "index"))


class TurbovecFour(Turbovec):
    """The same with four bits."""

    bits, oversampling = 4, 3


class Qdrant(Contender):
    """qdrant-edge as the library uses it today: float32 in a graph."""

    efforts, rescores = (64, 128, 256, 512), True

    def _quantized(self) -> Any:
        return None

    def build(self, vectors: np.ndarray) -> None:
        import qdrant_edge as qdrant

        keep = qdrant.Memory.Cold if self._quantized() else None
        dense = qdrant.EdgeVectorParams(
            size=self.dim, distance=qdrant.Distance.Dot, quantization_config=self._quantized(), memory=keep
        )
        config = qdrant.EdgeConfig(
            vectors={"dense": dense},
            hnsw_config=qdrant.HnswIndexConfig(M, EF_CONSTRUCT, full_scan_threshold=5000),
            optimizers=qdrant.EdgeOptimizersConfig(indexing_threshold=20_000),
        )
        shard = qdrant.EdgeShard.create(str(self.folder), config)
        for name in ("tenth", "hundredth"):
            shard.update(qdrant.UpdateOperation.create_field_index(name, qdrant.IntegerIndexParams()))
        for start, part in batches(vectors):
            shard.update(qdrant.UpdateOperation.upsert_points(self._points(start, part)))
        while shard.optimize():
            pass
        shard.flush()
        shard.close()

    def open(self) -> None:
        import qdrant_edge as qdrant

        self.shard = qdrant.EdgeShard.load(str(self.folder))

    def search(self, query: np.ndarray, count: int, effort: int) -> np.ndarray:
        return self._found(query, count, effort, None)

    def filtered(self, query: np.ndarray, count: int, effort: int, passing: np.ndarray, label: str) -> np.ndarray:
        import qdrant_edge as qdrant

        only = qdrant.FieldCondition(label, match=qdrant.MatchValue(3))
        return self._found(query, count, effort, qdrant.Filter(must=[only]))

    def add(self, first: int, vectors: np.ndarray) -> None:
        import qdrant_edge as qdrant

        self.shard.update(qdrant.UpdateOperation.upsert_points(self._points(first, vectors)))

    def delete(self, rows: np.ndarray) -> None:
        import qdrant_edge as qdrant

        self.shard.update(qdrant.UpdateOperation.delete_points([int(row) for row in rows]))

    def _points(self, first: int, vectors: np.ndarray) -> list[Any]:
        import qdrant_edge as qdrant

        return [qdrant.Point(first + row, {"dense": part}, labels(first + row)) for row, part in enumerate(vectors)]

    def _found(self, query: np.ndarray, count: int, effort: int, only: Any) -> np.ndarray:
        import qdrant_edge as qdrant

        anew = qdrant.QuantizationSearchParams(rescore=True, oversampling=4.0) if self._quantized() else None
        request = qdrant.QueryRequest(
            limit=10,
            query=qdrant.Query.Nearest(query, using="dense"),
            filter=only,
            params=qdrant.SearchParams(hnsw_ef=effort, quantization=anew),
        )
        return np.array([point.id for point in self.shard.query(request)], np.int64)


class QdrantBytes(Qdrant):
    """qdrant-edge with a byte for a dimension in memory, and the vectors on the disk."""

    def _quantized(self) -> Any:
        import qdrant_edge as qdrant

        return qdrant.ScalarQuantizationConfig(qdrant.ScalarType.Int8, 0.99, memory=qdrant.Memory.Pinned)


class QdrantBits(Qdrant):
    """qdrant-edge with a bit for a dimension in memory, and the vectors on the disk."""

    def _quantized(self) -> Any:
        import qdrant_edge as qdrant

        return qdrant.BinaryQuantizationConfig(memory=qdrant.Memory.Pinned)


class Zvec(Contender):
    """zvec: inverted lists of RaBitQ codes, scored anew by itself."""

    efforts, rescores = (8, 16, 32, 64, 128, 256), True

    def _index(self, size: int) -> Any:
        import zvec

        lists = int(2 ** np.round(np.log2(4 * np.sqrt(size))))
        return zvec.IvfRabitqIndexParam(zvec.MetricType.IP, nlist=lists, total_bits=1, sample_count=64 * lists)

    def _query(self, effort: int) -> Any:
        import zvec

        return zvec.IvfRabitqQueryParam(nprobe=effort, is_using_refiner=True, scale_factor=10.0)

    def build(self, vectors: np.ndarray) -> None:
        import zvec

        zvec.init(query_threads=1, optimize_threads=1, log_level=zvec.LogLevel.ERROR)
        number = lambda name: zvec.FieldSchema(name, zvec.DataType.INT64, index_param=zvec.InvertIndexParam())  # noqa: E731
        dense = zvec.VectorSchema("dense", zvec.DataType.VECTOR_FP32, self.dim, self._index(len(vectors)))
        schema = zvec.CollectionSchema("vectors", [number("tenth"), number("hundredth")], [dense])
        held = zvec.create_and_open(str(self.folder / "index"), schema)
        for start, part in batches(vectors):
            self._insert(held, start, part)
        held.optimize(zvec.OptimizeOption(concurrency=1))
        held.flush()

    def open(self) -> None:
        import zvec

        zvec.init(query_threads=1, optimize_threads=1, log_level=zvec.LogLevel.ERROR)
        self.held = zvec.open(str(self.folder / "index"))

    def search(self, query: np.ndarray, count: int, effort: int) -> np.ndarray:
        return self._found(query, effort, None)

    def filtered(self, query: np.ndarray, count: int, effort: int, passing: np.ndarray, label: str) -> np.ndarray:
        return self._found(query, effort, f"{label} = 3")

    def add(self, first: int, vectors: np.ndarray) -> None:
        self._insert(self.held, first, vectors)

    def delete(self, rows: np.ndarray) -> None:
        self.held.delete([str(row) for row in rows])

    def _insert(self, held: Any, first: int, vectors: np.ndarray) -> None:
        import zvec

        made = [
            zvec.Doc(id=str(first + row), vectors={"dense": part.tolist()}, fields=labels(first + row))
            for row, part in enumerate(vectors)
        ]
        for start in range(0, len(made), 1000):
            for status in held.insert(made[start : start + 1000]):
                if not status.ok():
                    raise RuntimeError(f"zvec refused a vector: {status}")

    def _found(self, query: np.ndarray, effort: int, only: str | None) -> np.ndarray:
        import zvec

        asked = zvec.Query(field_name="dense", vector=query.tolist(), param=self._query(effort))
        return np.array([int(doc.id) for doc in self.held.query(asked, topk=10, filter=only, output_fields=[])])


class ZvecGraph(Zvec):
    """zvec: a graph over RaBitQ codes, scored anew by itself."""

    efforts = (64, 128, 256, 512)

    def _index(self, size: int) -> Any:
        import zvec

        return zvec.HnswRabitqIndexParam(zvec.MetricType.IP, 4, 16, M, EF_CONSTRUCT)

    def _query(self, effort: int) -> Any:
        import zvec

        return zvec.HnswRabitqQueryParam(ef=effort, is_using_refiner=True)


class Ours(Contender):
    """The library's engine `ivf`, through what every engine of it does: ids, metadata, filters, durable writes."""

    efforts, rescores = (48, 64, 96, 128, 192), True  # the first is the default
    name, where = "ivf", ("ultrarag.retrieve.engines.ivf.codes", "PROBES")

    def build(self, vectors: np.ndarray) -> None:
        from ultrarag.retrieve.engines import Schema, create

        engine = create(self.folder / "index", Schema(dense=self.dim), self.name)
        for start, part in batches(vectors):
            self._write(engine, start, part)
        engine.optimize()
        engine.close()

    def open(self) -> None:
        from ultrarag.retrieve.engines import open_backend

        self.engine = open_backend(self.folder / "index", verify=False)

    def search(self, query: np.ndarray, count: int, effort: int) -> np.ndarray:
        return self._found(query, effort, None)

    def filtered(self, query: np.ndarray, count: int, effort: int, passing: np.ndarray, label: str) -> np.ndarray:
        return self._found(query, effort, {label: 3})

    def add(self, first: int, vectors: np.ndarray) -> None:
        self._write(self.engine, first, vectors)

    def delete(self, rows: np.ndarray) -> None:
        self.engine.delete([f"p{row}" for row in rows])

    def _write(self, engine: Any, first: int, vectors: np.ndarray) -> None:
        from ultrarag.types import Embeddings

        numbers = range(first, first + len(vectors))
        for start in range(0, len(vectors), 1000):
            part = slice(start, start + 1000)
            rows = [f"p{row}" for row in numbers[part]]
            engine.upsert(rows, Embeddings(dense=vectors[part]), [labels(row) for row in numbers[part]])
        engine.flush()

    def _found(self, query: np.ndarray, effort: int, only: Any) -> np.ndarray:
        module, constant = self.where
        setattr(import_module(module), constant, effort)
        return np.array([int(id[1:]) for id, _ in self.engine.search_dense(query, 10, only)])


class OursGraph(Ours):
    """The library's engine `qdrant-edge`, the default for fewer passages, in the same way."""

    efforts, name = (128, 256, 512), "qdrant-edge"
    where = ("ultrarag.retrieve.engines.qdrant.embedded", "HNSW_EF")


CONTENDERS: dict[str, type[Contender]] = {
    "ultrarag ivf": Ours,
    "ultrarag qdrant-edge": OursGraph,
    "qdrant-edge, HNSW float32 (until now)": Qdrant,
    "qdrant-edge, HNSW int8": QdrantBytes,
    "qdrant-edge, HNSW binary": QdrantBits,
    "faiss IVF-RaBitQ": FaissLists,
    "faiss IVF-RaBitQ, fast scan": FaissFastLists,
    "faiss IVF-SQ8": FaissBytes,
    "faiss HNSW-SQ8": FaissGraph,
    "usearch HNSW f16": Usearch,
    "usearch HNSW i8": UsearchBytes,
    "turbovec 2 bits": Turbovec,
    "turbovec 4 bits": TurbovecFour,
    "zvec IVF-RaBitQ": Zvec,
    "zvec HNSW-RaBitQ": ZvecGraph,
}
