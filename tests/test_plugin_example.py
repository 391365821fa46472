"""The example plugin, installed as a third party would: found, checked, trained, indexed, searched, swapped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import forked
from tests.finetune.test_run import ROWS
from ultrarag.testing.tiny import tiny_masked_lm

SOURCE = Path(__file__).parents[1] / "resources" / "plugin-example"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A directory into which pip has installed the plugin, and nothing else."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCE, folder / "source")  # setuptools builds beside the source
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder / "source"]
    subprocess.run(pip, check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def environment(site, tmp_path_factory) -> dict[str, str]:
    """The variables of a process that sees the plugin."""
    paths = os.pathsep.join([str(site), str(SOURCE.parents[1])])
    return {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny BERT with its masked-language-model head: a start for both adapters."""
    folder = tmp_path_factory.mktemp("model")
    tiny_masked_lm(folder)
    return folder


def flags(adapter: str, model: Path, folder: Path) -> dict[str, object]:
    """A training run of a second."""
    rows = folder / "train.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "adapter": adapter,
        "train_data": str(rows),
        "output_dir": str(folder / "checkpoint"),
        "train_group_size": 2,
        "query_max_len": 16,
        "passage_max_len": 24,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "use_cpu": True,
        "model_name_or_path": str(model),
    }


def finetune(settings: dict[str, object], environment: dict[str, str], processes: int = 1) -> dict:
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    done = forked.torchrun(["-m", "ultrarag.finetune", *words, "--json"], processes, env={**os.environ, **environment})
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def run_code(code: str, environment: dict[str, str]) -> str:
    """What code prints that sees the plugin."""
    done = forked.run(["-c", textwrap.dedent(code)], env={**os.environ, **environment})
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_found_by_name_and_conforming(environment):
    code = """
    import json
    from ultrarag.cli import main
    main(["plugins", "--json"])
    assert main(["plugins", "check", "acme-static"]) == 0
    assert main(["plugins", "check", "acme-splade"]) == 0
    """
    lines = run_code(code, environment).splitlines()
    rows = {row["name"]: row for row in json.loads(lines[0]) if row["package"] == "acme-ultrarag"}
    assert {name: (row["kind"], row["hooks"], row["problem"]) for name, row in rows.items()} == {
        "acme-static": ("adapter", ["load", "encode", "loss", "save"], ""),
        "acme-splade": ("adapter", ["load", "encode", "loss", "save"], ""),
        "acme-matryoshka": ("extension", ["loss"], ""),
        "acme-cache": ("extension", ["encode"], ""),
    }
    assert [line for line in lines if line.startswith("ok") and "sentence-transformers" in line]  # the static one


def test_trained_by_torchrun_in_two_processes(environment, model, tmp_path):
    found = finetune(flags("acme-splade", model, tmp_path), environment, processes=2)
    assert found["steps"] == len(ROWS) // 4
    manifest = json.loads((tmp_path / "checkpoint" / "ultrarag.json").read_text())
    assert (manifest["adapter"], manifest["settings"]["heads"]) == ("acme-splade", ["sparse"])


def test_trained_indexed_searched_and_swapped(environment, model, tmp_path):
    """The trained model goes live in the old one's place; the Matryoshka term changes the loss of the same run."""
    settings = flags("acme-static", model, tmp_path)
    plain = finetune(settings, environment)
    again = {**settings, "output_dir": str(tmp_path / "matryoshka"), "model": settings["model_name_or_path"]}
    del again["model_name_or_path"]
    code = f"""
    import os
    from ultrarag import Encoder, Passage
    from ultrarag.finetune import finetune
    from ultrarag.retrieve import LiveIndex

    seals = Passage("seals", "Seals sleep while they sink slowly.")
    bread = Passage("bread", "A hot oven turns the water in the dough into steam.")
    if __name__ == "__main__":
        encoder = Encoder.load({str(model)!r}, adapter="acme-static", device="cpu")
        with LiveIndex.create({str(tmp_path / "kb")!r}, encoder, bm25=False) as live:
            live.add([seals, bread])
            before = live.search("how do seals sleep?", k=1)[0]
            live.swap(live.build({plain["checkpoint"]!r}))
            after = live.search("how do seals sleep?", k=1)[0]
            print(before.id, after.id, live.encoder.adapter.name, before.score != after.score)
        os.environ["ACME_MATRYOSHKA_DIMS"] = "8,16"
        print(finetune(**{again!r}).loss)
    """
    searched, loss = run_code(code, environment).splitlines()
    assert searched == "seals seals acme-static True"
    assert float(loss) > plain["loss"] * 1.5


def test_the_cache_gives_the_same_vectors_and_no_other_model_s(environment, model, tiny_m3, tmp_path):
    code = f"""
    import os, pathlib, torch
    from ultrarag import Encoder, hookimpl
    from ultrarag.checkpoint.publishing import largest_difference
    from ultrarag.plugins import registry

    class Count:
        rows = 0

        @hookimpl(wrapper=True, trylast=True)  # innermost: sees what the cache hands on
        def encode(self, features):
            Count.rows += len(features["input_ids"]) if features["input_ids"].shape[1] > 1 else 0
            return (yield)

    registry().register(Count(), "count", kind="extension")
    texts = ["Seals sleep under water.", "a", "", "Why does bread need a hot oven?", "a"]
    folder = pathlib.Path({str(tmp_path / "cache")!r})
    for adapter, path in (("acme-static", {str(model)!r}), ("bgem3", {str(tiny_m3)!r})):
        os.environ.pop("ACME_CACHE", None)
        encoder = Encoder.load(path, adapter=adapter, device="cpu")
        def encode(texts):
            Count.rows = 0
            return encoder.encode(texts, progress=False)
        plain, rows = encode(texts), Count.rows
        os.environ["ACME_CACHE"] = str(folder)
        assert max(largest_difference(plain, encode(texts)).values()) < 1e-6
        assert rows == Count.rows == 5, (rows, Count.rows)
        assert max(largest_difference(plain, encode(texts)).values()) < 1e-6
        assert Count.rows == 0, Count.rows
        encode(texts + ["What is new?"])
        assert Count.rows == 1, Count.rows
        damaged = sorted(folder.rglob("*.npz"))
        for path in damaged:
            path.write_bytes(path.read_bytes()[:50])
        assert max(largest_difference(plain, encode(texts)).values()) < 1e-6
        assert Count.rows == 5, Count.rows
        with torch.no_grad():
            for parameter in encoder.model.parameters():
                parameter.data.add_(0.05)  # tells the version counter nothing
        assert max(largest_difference(plain, encode(texts)).values()) > 1e-4
        encoder.model.train()
        with torch.no_grad():
            features = encoder.features(encoder.tokenize(["new one"], "passage"))
            registry().adapter(adapter).encode(encoder.model, features)
        assert Count.rows == 6, Count.rows
        assert len(list(folder.rglob("*.npz"))) == len(damaged) + 4
    """
    run_code(code, environment)
