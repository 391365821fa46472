"""The registry: finds adapters and extensions, refuses the ones that cannot work, and calls their hooks.

Plugins are loaded one by one when first needed, so that one broken package harms nobody else, and listing them
imports no deep-learning library of ours.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, cast

import pluggy

from ultrarag.claims import Claim, ModelFolder, Refusal
from ultrarag.errors import PluginError, did_you_mean
from ultrarag.hookspecs import Features, Hooks, LoadOptions
from ultrarag.plugin_checks import (
    GROUPS,
    Declared,
    PluginKind,
    check_plugin,
    checked_answer,
    contract_text,
    declarations,
    hook_functions,
)
from ultrarag.types import Embeddings
from ultrarag.untrusted import only_tensors, only_trusted_code

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ultrarag.loss_arguments import LossArguments

#: Comma-separated `name` or `package:name` of plugins that are not to be loaded.
DISABLE_VARIABLE = "ULTRARAG_DISABLE_PLUGINS"


@dataclass(frozen=True)
class PluginInfo:
    """One row of `ultrarag plugins`."""

    name: str
    kind: PluginKind
    package: str
    version: str
    hooks: tuple[str, ...] = ()
    #: why it cannot be used; empty when it can
    problem: str = ""


@dataclass
class _Source:
    """Where a plugin comes from: an entry point of an installed package, or an object registered in code."""

    name: str
    kind: PluginKind
    package: str
    version: str
    entry_point: EntryPoint | None = None
    plugin: Any = None
    problem: str = ""

    @property
    def disabled(self) -> bool:
        switched_off = {item.strip() for item in os.environ.get(DISABLE_VARIABLE, "").split(",")}
        return self.name in switched_off or f"{self.package}:{self.name}" in switched_off

    def __str__(self) -> str:
        return f"{self.kind} '{self.name}' of package '{self.package}' {self.version}".rstrip()


class Registry:
    """All plugins of one process."""

    def __init__(self, discover: bool = True) -> None:
        self._manager = pluggy.PluginManager("ultrarag")
        self._manager.add_hookspecs(Hooks)
        self._sources: list[_Source] = _discover() if discover else []
        self._extensions_loaded = False

    def register(self, plugin: Any, name: str, kind: PluginKind = "adapter") -> None:
        """Add a plugin object from code, as an entry point would.

        Raises:
            PluginError: when the name is taken or the plugin cannot work; names the hook and what to do.
        """
        if self._named(name, kind):
            raise PluginError(f"{kind} '{name}' is registered already; choose another name or unregister it")
        source = _Source(name, kind, _package_of(plugin), "", plugin=None)
        self._admit(source, plugin)
        self._sources.append(source)

    def unregister(self, name: str, kind: PluginKind = "adapter") -> None:
        """Remove a plugin by name."""
        for source in self._named(name, kind):
            if source.plugin is not None:
                self._manager.unregister(source.plugin)
            self._sources.remove(source)

    def names(self) -> list[str]:
        """The names of all adapters that are not switched off, sorted; nothing is loaded."""
        return sorted({s.name for s in self._sources if s.kind == "adapter" and not s.disabled})

    def adapter(self, name: str) -> Adapter:
        """Return the named adapter, loading it if need be.

        Raises:
            PluginError: unknown (names the nearest), switched off, ambiguous, or broken (with the reason).
        """
        found = self._named(name, "adapter")
        if not found:
            known = self.names()
            raise PluginError(
                f"no adapter is called '{name}'{did_you_mean(name, known)} installed: {', '.join(known) or 'none'}"
            )
        found = [source for source in found if not source.disabled]
        if not found:
            raise PluginError(f"adapter '{name}' is switched off by {DISABLE_VARIABLE}")
        if len(found) > 1:
            packages = ", ".join(f"'{source.package}'" for source in found)
            raise PluginError(
                f"adapter '{name}' is offered by {packages}; switch all but one off, for example "
                f"{DISABLE_VARIABLE}={found[-1].package}:{name}"
            )
        self._load_extensions()
        self._load(found[0])
        if found[0].problem:
            raise PluginError(found[0].problem)
        return Adapter(self, name, Declared(**declarations(found[0].plugin)))

    def plugins(self) -> list[PluginInfo]:
        """Every plugin with its hooks or its problem, sorted by kind and name; loads them to find out."""
        rows = []
        for source in self._sources:
            if source.disabled:
                problem = f"switched off by {DISABLE_VARIABLE}"
            else:
                self._load(source)
                problem = source.problem
            if not problem and len(self._active(source.name, source.kind)) > 1:
                problem = "the same name is offered by another package"
            hooks = tuple(hook_functions(source.plugin)) if source.plugin is not None else ()
            rows.append(PluginInfo(source.name, source.kind, source.package, source.version, hooks, problem))
        return sorted(rows, key=lambda row: (row.kind, row.name, row.package))

    def answers(self, folder: ModelFolder) -> dict[str, Claim | Refusal | None]:
        """What each adapter that works says to a model folder, by name; one that declares no claims says nothing.

        An adapter whose `claims` fails is left out with a warning: it is no reason for the others not to work.
        """
        found = {}
        for name in self.names():
            try:
                found[name] = self.answer(name, folder)
            except PluginError as error:
                warnings.warn(f"{error}; it is not asked about {folder}", stacklevel=3)
        return found

    def answer(self, name: str, folder: ModelFolder) -> Claim | Refusal | None:
        """What one adapter says to a model folder.

        Raises:
            PluginError: it cannot be used, or its `claims` raises or returns something else.
        """
        claims = self.adapter(name).declared.claims
        if claims is None:
            return None
        try:
            answer = claims(folder)
        except Exception as error:
            raise PluginError(f"{self.describe(name)}: claims raised {type(error).__name__}: {error}") from error
        return checked_answer(answer, self.describe(name))

    def call(self, adapter: str, hook: str, **arguments: Any) -> Any:
        """Call one hook of one adapter, with the extensions' wrappers around it.

        The caller is built anew each time (5 to 8 microseconds): a cached one would let adapters registered
        later answer for this one.
        """
        chosen = self._active(adapter, "adapter")[0].plugin
        others = [s.plugin for s in self._sources if s.kind == "adapter" and s.plugin not in (None, chosen)]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        return caller(**arguments)

    def describe(self, name: str) -> str:
        """The adapter and its package, for error messages."""
        return str(self._active(name, "adapter")[0])

    def plugin(self, name: str) -> object:
        """An adapter's plugin object itself."""
        return self._active(name, "adapter")[0].plugin

    def around(self, hook: str) -> list[PluginInfo]:
        """The extensions that wrap a hook."""
        return [row for row in self.plugins() if row.kind == "extension" and not row.problem and hook in row.hooks]

    def threaded_encode(self, name: str) -> bool:
        """Whether an adapter and every extension around its `encode` may run in several threads at once."""
        return all(
            getattr(plugin, "threaded_encode", False) for plugin in [self.plugin(name), *self.wrapping("encode")]
        )

    def wrapping(self, hook: str) -> list[object]:
        """The plugins of the extensions in use that wrap a hook; see `around`."""
        sources = [s for s in self._sources if s.kind == "extension" and s.plugin is not None and not s.disabled]
        return [s.plugin for s in sources if hook in hook_functions(s.plugin)]

    def _named(self, name: str, kind: PluginKind) -> list[_Source]:
        return [source for source in self._sources if source.name == name and source.kind == kind]

    def _active(self, name: str, kind: PluginKind) -> list[_Source]:
        return [source for source in self._named(name, kind) if not source.disabled]

    def _load_extensions(self) -> None:
        if self._extensions_loaded:
            return
        self._extensions_loaded = True
        for source in self._sources:
            if source.kind == "extension" and not source.disabled:
                self._load(source)
                if source.problem:
                    warnings.warn(f"{source.problem}; it is left out", stacklevel=4)

    def _load(self, source: _Source) -> None:
        """Import and admit a plugin once; what goes wrong is kept in `source.problem`."""
        if source.plugin is not None or source.problem or source.entry_point is None:
            return
        try:
            plugin = source.entry_point.load()
        except Exception as error:
            source.problem = f"{source} cannot be imported: {type(error).__name__}: {error}"
            return
        try:
            self._admit(source, plugin)
        except PluginError as error:
            source.problem = str(error)

    def _admit(self, source: _Source, plugin: Any) -> None:
        check_plugin(plugin, source.kind, str(source))
        try:
            self._manager.register(plugin, f"{source.kind}:{source.package}:{source.name}")
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            raise PluginError(f"{source} is refused: {str(error).strip()}; {contract_text()}") from error
        source.plugin = plugin


@dataclass(frozen=True)
class Adapter:
    """A typed front on one adapter's hooks; raises when a hook gives nothing, or the wrong thing."""

    registry: Registry
    name: str
    declared: Declared

    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Return the model at `path`."""
        with only_tensors(path), only_trusted_code(path, options.trust_remote_code):
            model = self.registry.call(self.name, "load", path=path, options=options)
        missing = [name for name in ("config", "tokenizer", "state_dict") if not hasattr(model, name)]
        if missing:
            raise self._wrong("load", model, f"a torch module with .{' and .'.join(missing)}")
        return cast("nn.Module", model)

    def encode(self, model: nn.Module, features: Features) -> Embeddings:
        """Return the Embeddings of a batch; a plugin of the first contract is not told of what kind the texts are."""
        if self.declared.contract < 2 and "kind" in features:
            features = cast(Features, {name: value for name, value in features.items() if name != "kind"})
        result = self.registry.call(self.name, "encode", model=model, features=features)
        if not isinstance(result, Embeddings) or not result.heads:
            raise self._wrong("encode", result, "an Embeddings with at least one head")
        return result

    def loss(
        self,
        model: nn.Module,
        query: Embeddings | None,
        passage: Embeddings,
        teacher: Tensor | None,
        step: int,
        args: LossArguments,
    ) -> Tensor:
        """Return the scalar loss."""
        result = self.registry.call(
            self.name, "loss", model=model, query=query, passage=passage, teacher=teacher, step=step, args=args
        )
        if getattr(result, "ndim", None) != 0:
            raise self._wrong("loss", result, "a scalar tensor")
        return cast("Tensor", result)

    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write the model into the directory `path`."""
        self.registry.call(self.name, "save", model=model, path=path, state_dict=state_dict)

    def describe(self) -> str:
        """The adapter and its package, for messages."""
        return self.registry.describe(self.name)

    def _wrong(self, hook: str, result: Any, wanted: str) -> PluginError:
        got = "None (is a `return` missing?)" if result is None else f"a {type(result).__name__}"
        others = " and ".join(f"'{row.name}' of {row.package}" for row in self.registry.around(hook))
        whose = f" (or the extension {others} around it lost the result)" if others else ""
        return PluginError(f"{self.describe()}: hook '{hook}' returned {got}{whose}; return {wanted}")


@cache
def registry() -> Registry:
    """The process's registry, filled from the installed packages' entry points."""
    return Registry()


def _discover() -> list[_Source]:
    return [
        _Source(
            point.name,
            kind,
            point.dist.name if point.dist else "?",
            point.dist.version if point.dist else "",
            entry_point=point,
        )
        for kind, group in GROUPS.items()
        for point in entry_points(group=group)
    ]


def _package_of(plugin: Any) -> str:
    module = plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__module__
    return str(module).split(".")[0]
