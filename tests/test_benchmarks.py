"""The benchmarks run, say what they find as it is, and their page and tables are those of the committed results."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked

HERE = Path(__file__).parents[1] / "benchmarks"
#: Parts of scripts have no command line of their own.
SCRIPTS = sorted(path for path in HERE.glob("*.py") if "    python benchmarks/" in path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The scripts import one another by name."""
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))


#: A script's help, as a fork that need not import torch anew.
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=HERE.parent, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_has_help(path):
    done = forked.run(["-c", HELP, path])
    assert done.returncode == 0, done.stderr
    assert f"usage: {path.name}" in done.stdout


def test_page_and_readme_say_what_the_results_say():
    done = script(str(HERE / "page.py"), "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("--data=/data/scifact /a/b-c/medquad data/cmrc", "--data=scifact medquad data/cmrc"),
        ('File "/root/lib/python3.11/json/encoder.py", line 201', 'File "encoder.py", line 201'),
        ("http://127.0.0.1:8080/v1/search and/or ../up/one", "http://127.0.0.1:8080/v1/search and/or ../up/one"),
    ],
)
def test_a_result_names_no_folder_of_its_machine(given, kept, monkeypatch):
    from machine import origin, without_folders

    assert without_folders(given) == kept
    monkeypatch.setattr(sys, "argv", ["/checkout/benchmarks/bm25.py", "--data", "/mnt/data/scifact", "--output=/tmp/x"])
    assert origin()["command"] == "python benchmarks/bm25.py --data scifact --output=x"


@pytest.mark.parametrize("path", sorted((HERE / "results").iterdir()), ids=lambda path: path.name)
def test_committed_results_name_no_folder_of_their_machine(path):
    from machine import without_folders

    def strings(value):
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)
        elif isinstance(value, str):
            yield value

    if path.suffix == ".json":
        found = strings(json.loads(path.read_text(encoding="utf-8")))
        assert not [text for text in found if without_folders(text) != text]
    else:
        assert not re.search(r"/(home|root|tmp|work)/", path.read_text(encoding="utf-8"))


def test_page_stands_alone():
    import page

    reports = page.read_reports(HERE / "results")
    html = page.build(reports)
    for name in reports:
        assert f"<h2>{name}</h2>" in html
    assert html.count("Again: <code>python benchmarks/") == len(reports)
    assert "<svg" in html
    assert "<script" not in html
    assert not re.search(r"src=|url\(|href=.(?!#)", html)


def test_targets_are_met_not_met_or_not_measured():
    from targets import table

    def rows(memory: float) -> str:
        report = {"memory of the largest to the smallest": memory, "time of chunks to plain": {"processor": 1.2}}
        return table({"gradcache": report})

    assert "| at most 1.30x | 1.25x | met |" in rows(1.25)
    assert "| at most 1.30x | 1.31x | **not met** |" in rows(1.31)
    assert "| at most 1.30x | 1.302x | **not met** |" in rows(1.302)
    assert "| at least 45.0 % |  | not measured |" in rows(1.25)


@pytest.mark.long
def test_gpu_on_a_cpu_with_tiny_sizes(tmp_path):
    output = tmp_path / "gpu.md"
    words = ("--tiny", "--device", "cpu", "--contenders", "ultrarag", "FlagEmbedding", "--output", str(output))
    done = script(str(HERE / "gpu.py"), *words)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert [row["name"].split(",")[0] for row in report["tasks"]] == [
        "encode",
        "encode",
        "train unified",
        "train dense",
    ]
    assert all(row["contenders"]["ultrarag"]["tokens_per_second"] > 0 for row in report["tasks"])
    assert report["skipped"] == {"FlagEmbedding": "no --peer-python was given"}
    assert "FlagEmbedding, as no --peer-python was given" in output.read_text(encoding="utf-8")


@pytest.mark.long
def test_serving_in_its_small_form_beside_an_older_commit(tmp_path):
    if subprocess.run(
        ["git", "-C", str(HERE), "cat-file", "-e", "dee4ec6"], capture_output=True, check=False
    ).returncode:
        pytest.skip("the history of this checkout does not reach back to the commit that is compared with")
    output = tmp_path / "serving.json"
    done = script(str(HERE / "serving.py"), "--small", "--output", str(output))
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text(encoding="utf-8"))
    found = report["clients"]["2"]
    assert found["searches per second, new to old"] > 0
    assert all(found[name]["p99_ms"] > 0 and found[name]["peak_mib"] > 0 for name in ("old", "new"))
    assert report["start_seconds"]["new to old"] > 0


def test_gpu_summary_compares_by_rounds_and_names_failures():
    from gpu_page import render, summarise
    from gpu_work import TINY, make_plan

    options = argparse.Namespace(
        texts=4, full_texts=2, batches=[2], group=2, steps=1, device="cuda", precision="bf16", batch_tokens=None
    )
    plan = make_plan(Path("model"), TINY, argparse.Namespace(**vars(options), encode_batch=2))
    told = {"device": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2"}}
    report = {"machine": "m", "date": "d", "precision": "bf16", "rounds": 2, "sizes": TINY, "skipped": {}}
    report["contenders"] = {"ultrarag": told, "FlagEmbedding": told}
    names = [task["name"] for task in plan["tasks"]]

    def answers(seconds: float, gib: float) -> dict:
        return {name: {"seconds": seconds, "peak_gib": gib, "vectors": [[0.0, 1.0]]} for name in names}

    runs = [
        {"ultrarag": answers(1.0, 2.0), "FlagEmbedding": {**answers(2.0, 8.0), names[2]: {"failed": "out of memory"}}},
        {"ultrarag": answers(3.0, 2.0), "FlagEmbedding": answers(9.0, 8.0)},
    ]
    summarise(report, plan, runs, None)
    mixed, _, unified, _ = report["tasks"]
    assert report["peak_tflops"] == 989
    assert mixed["ultrarag to"]["FlagEmbedding"] == {"rate": 2.5, "memory": 0.25, "least_cosine": 1.0}
    ours = mixed["contenders"]["ultrarag"]
    assert ours["mfu"] == pytest.approx(mixed["flops"] / 2.0 / 989e12)
    assert unified["contenders"]["FlagEmbedding"] == {"failed": "out of memory"}
    assert unified["ultrarag to"] == {}
    assert "| train unified, batch 2 | FlagEmbedding | out of memory |" in render(report)


def point(x: int, seconds: float, items: int = 1000) -> dict:
    return {"x": x, "wall": seconds, "processor": seconds, "items": items, "peak_mib": 400.0 + x, "round": 0}


def test_a_curve_says_where_attention_weighs():
    from scaling_page import curve

    about = {"title": "t", "kind": "length", "x": "tokens", "unit": "tokens"}
    runs = [point(x, 1000 * (1e-4 + 1e-6 * x)) for x in (16, 64, 256, 512)]
    assert "it passes 25% of the time at 33 tokens" in curve(about, runs, "wall")["remark"]  # b x = a / 3


def test_a_curve_says_what_a_forward_costs():
    from scaling_page import curve

    about = {"title": "t", "kind": "batch", "x": "tokens per forward", "unit": "tokens"}
    runs = [point(x, 1000 * (1e-4 + 0.01 / x)) for x in (256, 512, 1024, 2048, 4096)]
    remark = curve(about, runs, "wall")["remark"]
    assert "the times fit 10.0 ms that each costs" in remark
    assert "gains less than 5% from 1024 on" in remark


def test_a_curve_says_from_where_the_start_is_nothing():
    from scaling_page import curve

    about = {"title": "t", "kind": "size", "x": "texts", "unit": "texts"}
    runs = [point(x, 10 + 0.01 * x, x) for x in (250, 1000, 4000)]
    remark = curve(about, runs, "wall")["remark"]
    assert "takes 10.0 s and 10.00 ms for each of the texts: the start is under 5% of the time from 19000 on" in remark


def test_a_point_of_each_kind_is_measured(tmp_path):
    from scaling import tiny_model
    from scaling_points import POINTS

    options = argparse.Namespace(model=tiny_model(tmp_path), device="cpu", tokens=256, steps=1)
    for name, x in (("encode_length", 16), ("encode_batch", 64), ("train_length", 16), ("train_batch", 2)):
        found = POINTS[name](x, options)
        assert found["wall"] > 0
        assert found["items"] > 0
        assert found["peak_mib"] > 0
    assert POINTS["encode_corpus"](5, options)["items"] == 5


def test_increments_share_no_document_and_are_shown_with_their_lowest_guard():
    import increments

    rows = [{"query": f"question {n}", "pos": [f"Title {n // 3}\npart {n}"]} for n in range(30)]
    parts = increments.parts_of(rows, 5)
    assert [len(part) for part in parts] == [6] * 5
    titles = [{row["pos"][0].partition("\n")[0] for row in part} for part in parts]
    assert sum(map(len, titles)) == len(set.union(*titles)) == 10
    steps = [
        {"cpu_seconds": 2.0, "refused": None, "metrics": {"a": 0.5, "guard": 0.6}},
        {"cpu_seconds": 3.0, "refused": None, "metrics": {"a": 0.7, "guard": 0.65}},
    ]
    report = {"guard": "guard", "before": {"a": 0.4, "guard": 0.66}, "efforts": {"query": steps}, "at once": steps[1]}
    page = increments.render(report)
    assert "| query | 0.7000 | 0.7000 | 0.6500 | 0.6000 | 5 |" in page
