"""What speed was asked for, and where it stands by the results files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Reports = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One figure that was asked for."""

    what: str
    #: the result (a file's name without .json) that holds it
    result: str
    limit: float
    #: at most the limit, or at least
    at_most: bool
    #: the figure, out of the result; LookupError or TypeError where the result does not hold it
    find: Callable[[Any], float]
    unit: str = "x"

    def row(self, reports: Reports) -> str:
        """A line of the table."""
        word = "at most" if self.at_most else "at least"
        found, shown, verdict = self.measured(reports), "", "not measured"
        if found is not None:
            met = found <= self.limit if self.at_most else found >= self.limit
            verdict, shown = "met" if met else "**not met**", self.show(found)
            if not met and shown == self.show(self.limit):
                shown = self.show(found, more=1)
        return f"| {self.what} | {word} {self.show(self.limit)} | {shown} | {verdict} | `{self.result}` |"

    def measured(self, reports: Reports) -> float | None:
        """The figure, where there is one."""
        try:
            return float(self.find(reports[self.result]))
        except (LookupError, TypeError, StopIteration):
            return None

    def show(self, value: float, more: int = 0) -> str:
        """A figure with its unit, and so many digits more than usual."""
        if self.unit == "%":
            return f"{100 * value:.{1 + more}f} %"
        return f"{value:.{(6 if self.unit == '' else 2) + more}f}{self.unit}"


def contender(name: str, key: str, beside: str = "sentence-transformers") -> Callable[[Any], float]:
    """A contender's speed (or another key) in `encode`; speeds are to the one beside it."""

    def find(report: Any) -> float:
        rows = {row["name"]: row for row in report["results"]}
        value: float = rows[name][key]
        return value / rows[beside][key] if key.startswith("speed") else value

    return find


def int8_batch(report: Any) -> float:
    """Speed of a batch to the peer's."""
    return float(report["batch"]["ultrarag, int8"]["to sentence-transformers"])


def engines(work: str, contender: str) -> Callable[[Any], float]:
    """A contender's speed to sentence-transformers' at some work of `engines`, by the beginning of its name."""

    def find(report: Any) -> float:
        rows = next(rows for name, rows in report["work"].items() if name.startswith(work))
        return float(rows[contender]["to sentence-transformers"])

    return find


def training(contender: str, beside: str) -> Callable[[Any], float]:
    """A contender's speed to another one's in `train_step`, by processor seconds."""
    return lambda report: (
        report["median seconds"][beside]["processor"] / report["median seconds"][contender]["processor"]
    )


def int8_loss(report: Any) -> float:
    """The largest loss of any set with queries and passages in int8."""
    both = [pair for pair in report["quality"] if (pair["passages"], pair["queries"]) == ("int8", "int8")]
    return float(max(pair["float32"] - pair["found"] for pair in both))


def unified(vocabulary: int, key: str) -> Callable[[Any], float]:
    """Ours to the peer's in `unified_step`, at the first batch that both survived."""
    return lambda report: next(row for row in report["rows"] if row["vocabulary"] == vocabulary and "ratio" in row)[
        "ratio"
    ][key]


def gpu(task: str, key: str, of_all: Callable[..., float] = min) -> Callable[[Any], float]:
    """Ours to the peers' in `gpu`, over the tasks whose names begin so."""
    return lambda report: worst(report, task, lambda row: [r[key] for r in row["ultrarag to"].values()], of_all)


def gpu_mfu(report: Any) -> float:
    """The share of the peak on texts of full length."""
    full = next(row for row in report["tasks"] if row["name"].startswith("encode") and "mixed" not in row["name"])
    return float(full["contenders"]["ultrarag"]["mfu"])


def worst(report: Any, task: str, of: Callable[[Any], list[float]], of_all: Callable[..., float]) -> float:
    """The value that is hardest to meet."""
    found = [value for row in report["tasks"] if row["name"].startswith(task) for value in of(row)]
    if not found:
        raise LookupError(task)
    return of_all(found)


def mean_of(kind: str, key: str) -> Callable[[Any], float]:
    """The mean over the seeds of what a kind of training reached in `incremental`, such as domain or guard."""

    def find(report: Any) -> float:
        values = [run[kind][key] for seed in report["runs"].values() for run in seed.values() if kind in run]
        if not values:
            raise LookupError(kind)
        return sum(values) / len(values)

    return find


def lost_on_guard(report: Any) -> float:
    """What the guard lost, in nDCG@10, when old rows were replayed."""
    return float(report["before"]["guard"]) - mean_of("replay", "guard")(report)


def won_by_mining(report: Any) -> float:
    """What mined negatives add on the domain, in nDCG@10."""
    return mean_of("mined", "domain")(report) - mean_of("plain", "domain")(report)


def one_query(contender: str, what: str) -> Callable[[Any], float]:
    """Seconds of the processor, to the older code's, in `one_query`."""
    return lambda report: float(report["contenders"][contender][what]["processor to old"])


def bm25(key: str, beside: str) -> Callable[[Any], float]:
    """Ours to another one's in `bm25`, at the most passages that were measured, which must be a million."""

    def find(report: Any) -> float:
        largest = max(report["sizes"], key=lambda row: row["passages"])
        if largest["passages"] < 1_000_000:
            raise LookupError(key)
        return float(largest["ours to"][beside][key] if beside else largest["hybrid"][key])

    return find


def ivf(*keys: str) -> Callable[[Any], float]:
    """A figure of our engine for many dense vectors, in `dense_engines_real_1000000`."""

    def find(report: Any) -> float:
        found = report["contenders"]["ultrarag ivf"]
        for key in keys:
            found = found[key]
        return float(found)

    return find


def sparse(report: Any) -> float:
    """The p50 of our engine for many passages in `sparse_engines_1000000`, where its recall@10 is 0.99; ms."""
    found = report["contenders"]["ultrarag ivf"]
    if found["recall@10"] < 0.99:
        raise LookupError("recall@10")
    return float(found["p50 ms"])


def ten_million(stage: str, *keys: str) -> Callable[[Any], float]:
    """A figure of a stage of `ten_million`, which must be of ten million passages."""

    def find(report: Any) -> float:
        if report["passages"] < 10_000_000:
            raise LookupError(stage)
        found = report["stages"][stage]
        for key in keys:
            found = found[key]
        return float(found)

    return find


def most_resident(report: Any) -> float:
    """The most that any stage of `ten_million` held, GiB."""
    return max(ten_million(stage, "resident at most, GiB")(report) for stage in report["stages"])


def peers_cached_loss(pair: str, figure: str) -> Callable[[Any], float]:
    """Ours to sentence-transformers'."""
    return lambda report: report["ours to the peer's"][pair][figure]


#: Contenders of `one_query`.
OPENVINO_FLOAT, OPENVINO_INT8 = "new, openvino, float32", "new, openvino, int8"

TARGETS = (
    Target("Encoding, fp32, texts/s to sentence-transformers", "encode", 1.5, False, contender("ultrarag", "speed")),
    Target("the same by processor seconds", "encode", 1.5, False, contender("ultrarag", "speed_processor")),
    Target(
        "Encoding, fp32, texts/s to FlagEmbedding",
        "encode",
        1.5,
        False,
        contender("ultrarag", "speed", "FlagEmbedding"),
    ),
    Target(
        "Encoding, fp32, least cosine of the vectors", "encode", 0.99999, False, contender("ultrarag", "cosine"), ""
    ),
    Target(
        "Encoding, bf16 on a CPU with AMX, texts/s to sentence-transformers",
        "encode",
        3,
        False,
        contender("ultrarag, precision=bf16", "speed"),
    ),
    Target("Encoding 200 texts, fp32, to sentence-transformers", "engines", 2.5, False, engines("200", "torch, fp32")),
    Target("the same, engine openvino", "engines", 2.5, False, engines("200", "openvino, fp32")),
    Target(
        "Cross-encoder, 100 pairs of 256 tokens, fp32, to sentence-transformers",
        "engines",
        2.5,
        False,
        engines("100", "torch, fp32"),
    ),
    Target("the same in bf16", "engines", 2.5, False, engines("100", "torch, bf16")),
    Target(
        "bge-m3's size, all three heads, fp32, to FlagEmbedding, by processor seconds",
        "bgem3",
        3,
        False,
        lambda report: report["contenders"]["ultrarag, torch"]["speed to FlagEmbedding"],
    ),
    Target("Encoding, int8, to sentence-transformers, by processor seconds", "int8", 7, False, int8_batch),
    Target("One query, fp32, engine openvino, to before", "one_query", 0.35, True, one_query(OPENVINO_FLOAT, "encode")),
    Target("the same in int8", "one_query", 0.2, True, one_query(OPENVINO_INT8, "encode")),
    Target("the same, most nDCG@10 lost on a set, int8 on both sides", "int8", 0.005, True, int8_loss, ""),
    Target(
        "Training step, batch 32, its default (bf16) to that of before (fp32, torch's products)",
        "train_step",
        2,
        False,
        training("ultrarag, bf16", "ultrarag, torch's products"),
    ),
    Target(
        "the same, nDCG@10 of medquad that it costs, mean of three seeds",
        "training_precision",
        0.003,
        True,
        lambda report: report["mean nDCG@10"]["float32"] - report["mean nDCG@10"]["bf16"],
        "",
    ),
    Target("Unified step, vocabulary 30522, time to FlagEmbedding", "unified_step", 0.6, True, unified(30522, "wall")),
    Target(
        "Unified step, vocabulary 250002 (a batch that the peer survives), time",
        "unified_step",
        0.35,
        True,
        unified(250002, "wall"),
    ),
    Target("Unified step, vocabulary 30522, peak memory", "unified_step", 0.5, True, unified(30522, "peak memory")),
    Target("the same, peak memory", "unified_step", 0.5, True, unified(250002, "peak memory")),
    Target(
        "GradCache, memory of batch 4096 to batch 64",
        "gradcache",
        1.3,
        True,
        lambda report: report["memory of the largest to the smallest"],
    ),
    Target(
        "GradCache, time to the plain step",
        "gradcache",
        1.45,
        True,
        lambda report: report["time of chunks to plain"]["processor"],
    ),
    Target(
        "GradCache, batch 1024, to sentence-transformers' cached loss, both in bf16, processor time",
        "gradcache_peer",
        0.7,
        True,
        peers_cached_loss("bf16, tokens", "processor"),
    ),
    Target("both in float32", "gradcache_peer", 0.7, True, peers_cached_loss("float32, tokens", "processor")),
    Target("memory, both in bf16", "gradcache_peer", 0.7, True, peers_cached_loss("bf16, tokens", "step MiB")),
    Target("memory, both in float32", "gradcache_peer", 0.7, True, peers_cached_loss("float32, tokens", "step MiB")),
    Target("Replay, medquad nDCG@10, three seeds", "incremental_replay", 0.8, False, mean_of("replay", "domain"), ""),
    Target("the same, nDCG@10 that scifact loses", "incremental_replay", 0.005, True, lost_on_guard, ""),
    Target("Mined negatives, medquad nDCG@10 more than without", "incremental_mined", 0.0, False, won_by_mining, ""),
    Target(
        "Mining, share of the time that is searching", "mine", 0.1, True, lambda report: report["search_share"], "%"
    ),
    Target("GPU, unified training rate to FlagEmbedding", "gpu", 2, False, gpu("train unified", "rate")),
    Target("GPU, unified training memory to FlagEmbedding", "gpu", 0.5, True, gpu("train unified", "memory", max)),
    Target("GPU, encoding 512-token passages, MFU", "gpu", 0.45, False, gpu_mfu, "%"),
    Target(
        "Live index, build to encoding alone, time",
        "live_index_cost",
        1.1,
        True,
        lambda report: report["build_to_encode"]["processor"],
    ),
    Target(
        "Live index, build beside two searchers without a pause, time to alone",
        "live_index_share",
        2,
        True,
        lambda report: report["2 searchers"]["build: time to alone"],
    ),
    Target(
        "the same searches beside `add`, searches per second to without",
        "live_index_share",
        0.5,
        False,
        lambda report: report["2 searchers"]["add: searches per second to without"],
    ),
    Target(
        "16 clients, searches per second to before",
        "serving",
        3,
        False,
        lambda report: report["clients"]["16"]["searches per second, new to old"],
    ),
    Target(
        "the same with the engine that a race on that CPU chooses",
        "serving",
        3,
        False,
        lambda report: report["clients"]["16"]["searches per second, new, engine auto to old"],
    ),
    Target(
        "the same in int8",
        "serving",
        3,
        False,
        lambda report: report["clients"]["16"]["searches per second, new, int8 to old"],
    ),
    Target(
        "16 clients, p99 while 60 passages are added, to idle",
        "serving",
        2,
        True,
        lambda report: report["clients"]["16"]["new"]["adding p99 to idle"],
    ),
    Target(
        "Start of `ultrarag index search`, to before",
        "serving",
        0.5,
        True,
        lambda report: report["start_seconds"]["new to old"],
    ),
    Target(
        "the same with the engine that a race on that CPU chooses",
        "serving",
        0.5,
        True,
        lambda report: report["start_seconds"]["new, engine auto to old"],
    ),
    Target(
        "Live index, p99 during a build to idle, the worse of two kinds of search",
        "live_index",
        2,
        True,
        lambda report: max(row["p99_build_to_idle"] for row in report["live"]["searches"].values()),
    ),
    Target(
        "BM25, a million passages, build to the older code's, passages/s",
        "bm25",
        10,
        False,
        bm25("passages/s", "before"),
    ),
    Target("the same, p50 to tantivy's", "bm25", 1, True, bm25("p50 ms", "tantivy")),
    Target("the same, bytes on disk to tantivy's", "bm25", 1.2, True, bm25("disk", "tantivy")),
    Target("Dense and BM25 together, a million passages, p50", "bm25", 12, True, bm25("p50 ms", ""), " ms"),
    Target(
        "Learned sparse weights, a million passages, engine `ivf`, p50 at a recall@10 of 0.99",
        "sparse_engines_1000000",
        1,
        True,
        sparse,
        " ms",
    ),
    *(
        Target(f"Dense engine `ivf`, 1M x 384, {what}", "dense_engines_real_1000000", limit, at_most, ivf(*keys), unit)
        for what, limit, at_most, keys, unit in (
            ("built per core second", 4000, False, ["vectors per core second"], " vectors"),
            ("memory of a passage", 560, True, ["memory, bytes a passage"], " bytes"),
            ("p50 of a search, processor time", 1.5, True, ["no filter", "p50 ms"], " ms"),
            ("its recall@10", 0.97, False, ["no filter", "recall@10"], ""),
            ("recall@10 with a filter of 1 %", 0.97, False, ["1 %", "recall@10"], ""),
        )
    ),
    Target(
        "10M x 384, with words and texts: resident at most, any stage", "ten_million", 8, True, most_resident, " GiB"
    ),
    *(
        Target(f"the same, {what}", "ten_million", limit, at_most, ten_million(*keys), unit)
        for what, limit, at_most, keys, unit in (
            ("build, core minutes", 60, True, ["build", "core minutes"], " min"),
            ("dense search, p50 by the clock", 10, True, ["search", "searches", "dense", "p50 ms"], " ms"),
            ("its processor time", 10, True, ["search", "searches", "dense", "processor p50 ms"], " ms"),
            ("its recall@10", 0.95, False, ["search", "searches", "dense", "recall@10"], ""),
        )
    ),
)


def table(reports: Reports) -> str:
    """All targets as a Markdown table.

    Args:
        reports: result -> what its file holds.
    """
    header = ["| target | wanted | measured | | result |", "|---|---|---|---|---|"]
    return "\n".join([*header, *(target.row(reports) for target in TARGETS)])
