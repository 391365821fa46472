"""docs/plugins.md: complete, exact, and every snippet of it run."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest

from tests.finetune.test_run import ROWS
from ultrarag import plugin_checks, plugins
from ultrarag.claims import FAMILIES
from ultrarag.hookspecs import Features, Hooks, LoadOptions
from ultrarag.plugin_checks import HOOKS, Declared
from ultrarag.testing import CHECKS
from ultrarag.testing.tiny import tiny_bert
from ultrarag.types import Embeddings

TEXT = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
#: (language, file name or "", content)
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", TEXT, flags=re.S | re.M)
FILES = {name: content for _, name, content in BLOCKS if name}


def section(heading: str) -> str:
    """The text under a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", TEXT, flags=re.S | re.M)
    assert found, f"docs/plugins.md lacks the heading '{heading}'"
    return found.group(1)


def first_column(text: str) -> set[str]:
    """The names in backticks in the first column of the tables."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return {name for cell in cells[1:] for name in re.findall(r"`([\w -]+)`", cell)}


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_there_with_its_exact_arguments(hook):
    arguments = [name for name in inspect.signature(getattr(Hooks, hook)).parameters if name != "self"]
    assert section(f"`{hook}({', '.join(arguments)})`").strip()


def test_no_other_hook_is_described():
    assert re.findall(r"^### `(\w+)", TEXT, flags=re.M) == list(HOOKS)


def test_everything_that_hooks_exchange_is_listed():
    assert first_column(section("`load(path, options)`")) == {item.name for item in fields(LoadOptions)}
    known = set(Features.__annotations__) | {item.name for item in fields(Embeddings)} | {"Embeddings"}
    assert first_column(section("`encode(model, features)`")) == known
    for name in ("query", "passage", "teacher", "step", "args"):
        assert f"`{name}`" in section("`loss(model, query, passage, teacher, step, args)`")


def test_all_declared_data_is_listed_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section("What an adapter declares"), flags=re.M))
    assert {name: ast.literal_eval(value) for name, value in rows.items()} == {
        item.name: getattr(Declared(), item.name) for item in fields(Declared)
    }


def test_all_checks_are_listed_in_order():
    names = re.findall(r"^\| `([\w -]+)` \|", section("Conformance"), flags=re.M)
    assert names == ["hooks", *CHECKS]


def test_the_claims_on_the_page_are_answers(tmp_path):
    from ultrarag.claims import Claim, ModelFolder, Refusal

    page: dict = {}
    exec(FILES["acme_claims.py"], page)
    expected = {"acme": Claim("config.json: model_type acme", "exact"), "bert": None}
    for kind, answer in expected.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["Model"]}))
        assert page["claims"](ModelFolder(tmp_path)) == answer
    assert isinstance(page["claims"](ModelFolder(tmp_path / "nothing")), Refusal)
    rows = first_column(section("Which adapter a folder gets"))
    assert rows >= set(FAMILIES)


def test_messages_are_those_of_the_code():
    code = inspect.getsource(plugins) + inspect.getsource(plugin_checks)
    messages = re.findall(r"^\| `(.*?)` \| ", section("When something is wrong"), flags=re.M)
    assert len(messages) == 17
    missing = [text for text in messages if text.replace("\\`", "`") not in code]
    assert not missing


def test_the_adapter_fits_into_forty_lines():
    assert len(FILES["acme_mean.py"].splitlines()) <= 40


#: Runs the page's commands and code in their order, in one process: each would import torch anew.
DRIVER = """
import json, os, runpy, shlex, subprocess, sys
from pathlib import Path

def command(line):
    words = shlex.split(line)
    if words[0].startswith("ULTRARAG_") or words[0] == "pip":
        return subprocess.run(line, shell=True).returncode
    if words[0] == "ultrarag":
        from ultrarag.cli import main
        return main(words[1:])
    assert words[:3] == ["python", "-m", "ultrarag.finetune"], line
    from ultrarag.finetune.__main__ import main
    return main(words[3:])

for language, content in json.load(open("blocks.json")):
    if language == "bash":
        for line in content.replace("\\\\\\n", " ").strip().splitlines():
            assert command(line) == 0, line
    else:
        exec(compile(content, content, "exec"), {"__name__": "snippet"})
import test_acme_mean
test_acme_mean.test_conformance()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A package as the page describes it, rows to train on, and a small model."""
    path = tmp_path_factory.mktemp("docs")
    tiny_bert(path / "model")
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    for name, content in FILES.items():
        (path / name).write_text(small(content))
    with (path / "pyproject.toml").open("a") as file:  # the extension, in the same package
        file.write(next(content for language, name, content in BLOCKS if language == "toml" and not name))
    text = (path / "pyproject.toml").read_text()
    (path / "pyproject.toml").write_text(text.replace('["acme_mean"]', '["acme_mean", "acme_penalty"]'))
    return path


def small(text: str) -> str:
    return text.replace("BAAI/bge-small-en-v1.5", "./model")


def test_every_snippet_runs(folder):
    blocks = [(language, small(text)) for language, name, text in BLOCKS if not name and language != "toml"]
    (folder / "blocks.json").write_text(json.dumps(blocks))
    # what pip would fetch, and an isolated build, need a network
    pip = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_TARGET": str(folder / "site")}
    paths = os.pathsep.join([str(folder / "site"), str(Path(__file__).parents[1]), str(folder)])
    first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**pip, "PYTHONPATH": paths, "PATH": first, "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(DRIVER)],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "acme-mean" in done.stdout
    states = re.findall(r"^acme-mean +adapter +acme-mean +0.1.0 +(.*)$", done.stdout, flags=re.M)
    assert [" ".join(state.split()) for state in states] == [
        "load, encode, loss, save ok",
        "switched off by ULTRARAG_DISABLE_PLUGINS",
    ]
    assert "\n(1, 32)\n" in done.stdout


def test_the_extension_adds_its_penalty(monkeypatch):
    import torch

    from ultrarag.loss_arguments import LossArguments
    from ultrarag.plugins import registry

    module = type(sys)("acme_penalty")
    exec(FILES["acme_penalty.py"], module.__dict__)
    registry().register(module, "acme-penalty", kind="extension")
    try:
        side = Embeddings(dense=torch.eye(2))
        plain = registry().adapter("bge").loss(None, side, side, None, 0, LossArguments())
        monkeypatch.setenv("ACME_PENALTY", "3")
        assert registry().adapter("bge").loss(None, side, side, None, 0, LossArguments()) == plain + 3
    finally:
        registry().unregister("acme-penalty", kind="extension")
