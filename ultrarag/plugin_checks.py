"""What a plugin must be like: refuses, by name and with the remedy, what pluggy would accept and never call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from ultrarag.claims import LEVELS, Answer, Claim, ModelFolder, Refusal
from ultrarag.errors import PluginError, did_you_mean
from ultrarag.hookspecs import CONTRACT, Hooks
from ultrarag.types import HEADS

PluginKind = Literal["adapter", "extension"]
GROUPS: dict[PluginKind, str] = {"adapter": "ultrarag.adapters", "extension": "ultrarag.extensions"}
HOOKS = tuple(name for name in vars(Hooks) if not name.startswith("_"))


@dataclass(frozen=True)
class Declared:
    """The plain data that an adapter may declare, as attributes of these names on the plugin object."""

    #: the heads that its models can have
    heads: tuple[str, ...] = ("dense",)
    #: True for a cross-encoder, which reads (query, passage) pairs and gives `scores`
    pair_input: bool = False
    #: True where `encode` may run in several threads at once on one model that is not in training
    threaded_encode: bool = False
    #: defaults of fine-tuning flags that differ for this adapter
    finetune_defaults: Mapping[str, Any] = field(default_factory=dict)
    #: `claims(folder)`: whether it is the one for a model folder; None: it has to be named
    claims: Callable[[ModelFolder], Answer] | None = None
    #: the version of the hook contract it was written for; in the first, `features` had no `kind`
    contract: int = 1


class Marked(NamedTuple):
    """A function that carries the @hookimpl mark."""

    function: Any
    wrapper: bool


def check_plugin(plugin: Any, kind: PluginKind, label: str) -> None:
    """Raise PluginError when `plugin` cannot work as an adapter or extension; `label` names it in the message."""
    if inspect.isclass(plugin):
        raise PluginError(f"{label} is the class '{plugin.__name__}'; register an instance: {plugin.__name__}()")
    _check_declarations(plugin, label)
    _check_names(plugin, label)
    for name, function in hook_functions(plugin).items():
        _check_signature(name, function.function, label)
    if kind == "adapter":
        _check_adapter(plugin, label)
    else:
        _check_extension(plugin, label)


def hook_functions(plugin: Any) -> dict[str, Marked]:
    """The plugin's implementations of our hooks, in the contract's order."""
    marked = _marked(plugin)
    return {name: marked[name] for name in HOOKS if name in marked}


def declarations(plugin: Any) -> dict[str, Any]:
    """The attributes of `Declared` that the plugin has."""
    return {item.name: getattr(plugin, item.name) for item in fields(Declared) if hasattr(plugin, item.name)}


def contract_text() -> str:
    """One sentence that names every hook of an adapter with its arguments."""
    return "an adapter implements " + ", ".join(_signature(hook) for hook in HOOKS)


def _check_names(plugin: Any, label: str) -> None:
    misspelt = [name for name in _marked(plugin) if name not in HOOKS]
    if misspelt:
        raise PluginError(
            f"{label}: '{misspelt[0]}' is marked @hookimpl but is no hook{did_you_mean(misspelt[0], HOOKS)} "
            f"(hooks: {', '.join(HOOKS)})"
        )


def _check_adapter(plugin: Any, label: str) -> None:
    found = hook_functions(plugin)
    missing = [name for name in HOOKS if name not in found]
    undecorated = [name for name in missing if callable(getattr(plugin, name, None))]
    if undecorated:
        raise PluginError(f"{label} defines '{undecorated[0]}' without @ultrarag.hookimpl above it; add it")
    if missing:
        raise PluginError(f"{label} lacks the hook '{missing[0]}'; {contract_text()}")
    wrappers = [name for name, mark in found.items() if mark.wrapper]
    if wrappers:
        raise PluginError(f"{label} wraps '{wrappers[0]}' instead of implementing it; wrappers are extensions")


def _check_extension(plugin: Any, label: str) -> None:
    found = hook_functions(plugin)
    if not found:
        raise PluginError(f"{label} implements no hook: mark at least one with @hookimpl(wrapper=True)")
    plain = [name for name, mark in found.items() if not mark.wrapper]
    if plain:
        raise PluginError(
            f"{label} implements '{plain[0]}' itself; an extension wraps: use @hookimpl(wrapper=True), "
            f"or offer it as an adapter under '{GROUPS['adapter']}'"
        )


def _check_signature(name: str, function: Any, label: str) -> None:
    known = inspect.signature(getattr(Hooks, name)).parameters
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            problem = f"takes '{parameter}', which never receives anything"
        elif parameter.kind is parameter.KEYWORD_ONLY:
            problem = f"has the keyword-only argument '{parameter.name}', which cannot be passed"
        elif parameter.name not in known:
            problem = f"has the argument '{parameter.name}', which does not exist"
        else:
            continue
        raise PluginError(f"{label}: hook '{name}{signature}' {problem}; use {_signature(name)}, or fewer of them")


def _check_declarations(plugin: Any, label: str) -> None:
    declared = declarations(plugin)
    contract = declared.get("contract", CONTRACT)
    if not isinstance(contract, int) or contract > CONTRACT:
        raise PluginError(
            f"{label} was written for contract {contract} of the hooks, this ultrarag has {CONTRACT}: "
            "upgrade ultrarag, or install an older release of the plugin"
        )
    heads = declared.get("heads", ("dense",))
    unknown = [heads] if isinstance(heads, str) else [head for head in heads if head not in HEADS]
    if unknown:
        raise PluginError(f"{label} declares heads = {heads!r}; it must be a tuple out of {', '.join(HEADS)}")
    claims = declared.get("claims")
    if claims is not None and not _takes_one(claims):
        raise PluginError(f"{label} declares claims = {claims!r}; it must be a function of one argument, the folder")


def _takes_one(function: Any) -> bool:
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def checked_answer(answer: object, label: str) -> Claim | Refusal | None:
    """What an adapter's `claims` returned, a bare text as a Claim; PluginError when it is something else."""
    if isinstance(answer, str):
        answer = Claim(answer)
    if isinstance(answer, Claim) and answer.reason and answer.level in LEVELS:
        return answer
    if answer is None or (isinstance(answer, Refusal) and answer.reason):
        return answer
    raise PluginError(
        f"{label}: claims returned {answer!r}; return the reason as text, a Claim with a level out of "
        f"{', '.join(LEVELS)}, "
        "a Refusal, or None (ultrarag.claims)"
    )


def _marked(plugin: Any) -> dict[str, Marked]:
    """Every function that carries the @hookimpl mark, by the name of the hook it is meant for."""
    marks = {}
    for name in dir(plugin):
        if name.startswith("__"):
            continue
        function = getattr(plugin, name, None)
        options = getattr(function, "ultrarag_impl", None)
        if isinstance(options, dict):
            marks[options.get("specname") or name] = Marked(function, bool(options.get("wrapper")))
    return marks


def _signature(hook: str) -> str:
    arguments = [name for name in inspect.signature(getattr(Hooks, hook)).parameters if name != "self"]
    return f"{hook}({', '.join(arguments)})"
