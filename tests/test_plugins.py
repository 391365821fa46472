"""The registry: what it finds, what it refuses and in which words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from ultrarag import hookimpl
from ultrarag.errors import PluginError
from ultrarag.hookspecs import CONTRACT, LoadOptions
from ultrarag.loss_arguments import LossArguments
from ultrarag.plugin_checks import HOOKS
from ultrarag.plugins import Registry
from ultrarag.types import Embeddings


class Bow:
    """A small working adapter: the mean of an embedding table."""

    heads = ("dense",)

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    @hookimpl
    def load(self, path):
        model = torch.nn.Module()
        model.config, model.tokenizer = object(), object()
        return model

    @hookimpl
    def encode(self, features):
        return Embeddings(dense=features["input_ids"].float() + self.shift)

    @hookimpl
    def loss(self, query, passage):
        return (query.dense - passage.dense).square().mean()

    @hookimpl
    def save(self, path):
        return None


def features():
    return {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3)}


@pytest.fixture
def registry():
    return Registry(discover=False)


def test_each_adapter_answers_for_itself_alone(registry):
    registry.register(Bow(1.0), "one")
    one = registry.adapter("one")
    assert one.encode(None, features()).dense[0, 0] == 2
    registry.register(Bow(5.0), "five")  # an adapter that comes later must not answer for the first
    assert one.encode(None, features()).dense[0, 0] == 2
    assert registry.adapter("five").encode(None, features()).dense[0, 0] == 6


def test_hooks_pass_by_argument_name(registry):
    registry.register(Bow(), "bow")
    adapter = registry.adapter("bow")
    assert isinstance(adapter.load("x", LoadOptions()), torch.nn.Module)
    vectors = adapter.encode(None, features())
    assert adapter.loss(None, vectors, vectors, None, 0, LossArguments()) == 0
    adapter.save(None, "x", {})


def test_extension_wraps_every_adapter(registry):
    class Doubled:
        @hookimpl(wrapper=True)
        def loss(self, args):
            value = yield
            return value * 2 + 1

    registry.register(Bow(), "bow")
    registry.register(Doubled(), "doubled", kind="extension")
    vectors = Embeddings(dense=torch.zeros(2, 3))
    assert registry.adapter("bow").loss(None, vectors, vectors, None, 0, LossArguments()) == 1


@pytest.mark.parametrize(("contract", "told"), [(None, False), (1, False), (2, True)])
def test_a_plugin_of_the_first_contract_is_not_told_of_what_kind_texts_are(registry, contract, told):
    seen = []

    class Strict(Bow):
        @hookimpl
        def encode(self, features):
            seen.append(set(features))
            return Embeddings(dense=features["input_ids"].float())

    plugin = Strict()
    if contract:
        plugin.contract = contract
    registry.register(plugin, "strict")
    batch = features() | {"kind": "query"}
    registry.adapter("strict").encode(None, batch)
    assert ("kind" in seen[0]) == told
    assert batch["kind"] == "query"  # the caller's batch is left as it is


def test_unknown_name_suggests_the_nearest(registry):
    registry.register(Bow(), "bgem3")
    with pytest.raises(PluginError, match=r"no adapter is called 'bge-m3'; did you mean 'bgem3'\? installed: bgem3"):
        registry.adapter("bge-m3")


def test_name_taken(registry):
    registry.register(Bow(), "bow")
    with pytest.raises(PluginError, match="adapter 'bow' is registered already"):
        registry.register(Bow(), "bow")
    registry.unregister("bow")
    registry.register(Bow(), "bow")


class WithoutSave(Bow):
    save = None


class Misspelt(Bow):
    @hookimpl
    def encoed(self, model, features):
        return None


class Undecorated(Bow):
    def encode(self, model, features):
        return None


class CatchesAll(Bow):
    @hookimpl
    def encode(self, **everything):
        return None


class KeywordOnly(Bow):
    @hookimpl
    def encode(self, *, features):
        return None


class WrongArgument(Bow):
    @hookimpl
    def encode(self, model, feature):
        return None


class Newer(Bow):
    contract = CONTRACT + 1


class WrongHeads(Bow):
    heads = ("dens",)


class Inert:
    pass


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (WithoutSave(), ["lacks the hook 'save'", "save(model, path, state_dict)"]),
        (Misspelt(), ["'encoed' is marked @hookimpl but is no hook; did you mean 'encode'?"]),
        (Undecorated(), ["defines 'encode' without @ultrarag.hookimpl"]),
        (CatchesAll(), ["hook 'encode(**everything)' takes '**everything'", "use encode(model, features)"]),
        (KeywordOnly(), ["keyword-only argument 'features'", "use encode(model, features)"]),
        (WrongArgument(), ["has the argument 'feature', which does not exist", "use encode(model, features)"]),
        (Newer(), [f"written for contract {CONTRACT + 1}", "upgrade ultrarag"]),
        (WrongHeads(), ["declares heads = ('dens',)", "dense, sparse, colbert, scores"]),
        (Inert(), ["lacks the hook 'load'"]),
        (Bow, ["is the class 'Bow'; register an instance: Bow()"]),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__) if not isinstance(value, list) else "",
)
def test_refused_with_the_reason_and_the_remedy(registry, plugin, words):
    with pytest.raises(PluginError) as caught:
        registry.register(plugin, "bad")
    for word in ["adapter 'bad'", *words]:
        assert word in str(caught.value)
    assert registry.names() == []


def test_extension_must_wrap(registry):
    with pytest.raises(PluginError, match=r"extension 'bow' .* implements 'load' itself; an extension wraps"):
        registry.register(Bow(), "bow", kind="extension")
    with pytest.raises(PluginError, match="implements no hook"):
        registry.register(Inert(), "inert", kind="extension")


class MisspeltWrapper:
    @hookimpl(wrapper=True)
    def los(self):
        return (yield)


class WrongWrapper:
    @hookimpl(wrapper=True)
    def loss(self, queries):
        return (yield)


class NewerExtension:
    contract = CONTRACT + 1

    @hookimpl(wrapper=True)
    def loss(self):
        return (yield)


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (MisspeltWrapper(), "'los' is marked @hookimpl but is no hook; did you mean 'loss'"),
        (WrongWrapper(), "has the argument 'queries', which does not exist; use loss"),
        (NewerExtension(), f"written for contract {CONTRACT + 1}"),
        (MisspeltWrapper, r"is the class 'MisspeltWrapper'; register an instance"),
    ],
    ids=["misspelt", "wrong argument", "newer", "class"],
)
def test_an_extension_is_refused_for_the_same_reasons(registry, plugin, words):
    with pytest.raises(PluginError, match=rf"extension 'bad'.*{words}"):
        registry.register(plugin, "bad", kind="extension")


def test_an_adapter_does_not_wrap(registry):
    class Wrapping(Bow):
        @hookimpl(wrapper=True)
        def loss(self):
            return (yield)

    with pytest.raises(PluginError, match=r"wraps 'loss' instead of implementing it; wrappers are extensions"):
        registry.register(Wrapping(), "bad")


def test_an_extension_that_loses_the_result_is_not_silent(registry):
    class Loses:
        @hookimpl(wrapper=True)
        def encode(self):
            yield

    registry.register(Bow(), "bow")
    registry.register(Loses(), "loses", kind="extension")
    with pytest.raises(PluginError, match="hook 'encode' returned None"):
        registry.adapter("bow").encode(None, features())


class Forgetful(Bow):
    @hookimpl
    def encode(self, features):
        Embeddings(dense=features["input_ids"])

    @hookimpl
    def load(self, path):
        return "model"

    @hookimpl
    def loss(self, query):
        return query.dense


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: a.encode(None, features()), "hook 'encode' returned None .is a `return` missing"),
        (lambda a: a.load("x", LoadOptions()), "hook 'load' returned a str; return a torch module with .config"),
        (
            lambda a: a.loss(None, Embeddings(dense=torch.zeros(2)), None, None, 0, LossArguments()),
            "hook 'loss' returned a Tensor; return a scalar tensor",
        ),
    ],
)
def test_a_hook_that_returns_the_wrong_thing_is_named(registry, call, words):
    registry.register(Forgetful(), "forgetful")
    with pytest.raises(PluginError, match=f"adapter 'forgetful'.*{words}"):
        call(registry.adapter("forgetful"))


@pytest.fixture
def installed(tmp_path):
    """A function that makes an importable package with entry points, and runs Python with it."""

    def install(name, code, entry_points):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))

    def run(*words, **variables):
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, **variables}
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)

    install.run = run
    return install


def test_listing_shows_broken_plugins_with_their_reason_and_imports_no_torch(installed):
    installed("acme_broken", "import does_not_exist", "[ultrarag.adapters]\nacme = acme_broken:adapter\n")
    code = (
        "import sys; from ultrarag.cli import main; status = main(['plugins', '--json']); "
        "print(status, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    lines = installed.run("-c", code).stdout.splitlines()
    rows = {row["name"]: row for row in json.loads(lines[0])}
    assert lines[1] == "1 []"
    assert rows["acme"]["package"] == "acme_broken"
    assert rows["acme"]["version"] == "1.2"
    assert "cannot be imported: ModuleNotFoundError: No module named 'does_not_exist'" in rows["acme"]["problem"]
    assert rows["bgem3"]["problem"] == ""
    assert rows["bgem3"]["hooks"] == list(HOOKS)


def test_broken_adapter_raises_when_named_and_harms_no_other(installed):
    installed("acme_broken", "1 / 0", "[ultrarag.adapters]\nacme = acme_broken:adapter\n")
    code = "from ultrarag.plugins import registry; registry().adapter('bge'); registry().adapter('acme')"
    errors = installed.run("-c", code).stderr
    assert "adapter 'acme' of package 'acme_broken' 1.2 cannot be imported: ZeroDivisionError" in errors


def test_broken_extension_is_reported_and_left_out(installed):
    installed("acme_ext", "1 / 0", "[ultrarag.extensions]\nacme-ext = acme_ext\n")
    found = installed.run("-c", "from ultrarag.plugins import registry; print(registry().adapter('bge').name)")
    assert found.stdout == "bge\n"
    assert "extension 'acme-ext' of package 'acme_ext' 1.2 cannot be imported" in found.stderr
    assert "it is left out" in found.stderr


def test_name_collision_names_both_packages_and_the_way_out(installed):
    installed(
        "acme_bge",
        "from ultrarag.adapters.embedders import bge as adapter",
        "[ultrarag.adapters]\nbge = acme_bge:adapter\n",
    )
    code = "from ultrarag.plugins import registry; print(registry().adapter('bge').describe())"
    clash = installed.run("-c", code)
    assert "adapter 'bge' is offered by" in clash.stderr
    assert "'acme_bge'" in clash.stderr
    solved = installed.run("-c", code, ULTRARAG_DISABLE_PLUGINS="acme_bge:bge")
    assert solved.stdout == "adapter 'bge' of package 'ultrarag-retrieval' 0.1.0\n"


def test_switched_off_by_environment(installed):
    found = installed.run(
        "-c", "from ultrarag.plugins import registry; registry().adapter('bge')", ULTRARAG_DISABLE_PLUGINS="bge"
    )
    assert "adapter 'bge' is switched off by ULTRARAG_DISABLE_PLUGINS" in found.stderr


def test_an_entry_point_to_nothing_is_named(installed):
    installed("acme_empty", "", "[ultrarag.adapters]\nacme = acme_empty:adapter\n")
    errors = installed.run("-c", "from ultrarag.plugins import registry; registry().adapter('acme')").stderr
    assert "adapter 'acme' of package 'acme_empty' 1.2 cannot be imported: AttributeError" in errors


def test_an_extension_is_switched_off_by_environment(installed):
    installed("acme_ext", "1 / 0", "[ultrarag.extensions]\nacme-ext = acme_ext\n")
    code = (
        "from ultrarag.plugins import registry; print(registry().adapter('bge').name, registry().plugins()[-1].problem)"
    )
    found = installed.run("-W", "error", "-c", code, ULTRARAG_DISABLE_PLUGINS="other, acme_ext:acme-ext")
    assert found.stdout == "bge switched off by ULTRARAG_DISABLE_PLUGINS\n"
