"""How a tool's arguments and results are wired into a pipeline: what UltraRAG's `build` writes into server.yaml."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from ultrarag.errors import DataError

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Wires(NamedTuple):
    """Where a tool's values come from and go to."""

    #: parameter -> variable of the pipeline; the others are called as in the signature
    inputs: Mapping[str, str]
    #: variables that the result sets
    outputs: tuple[str, ...]


def tool(inputs: Mapping[str, str] | None = None, *outputs: str) -> Callable[[_Function], _Function]:
    """Mark a method as a tool of a server, with its wires."""

    def marked(function: _Function) -> _Function:
        function.wires = Wires(inputs or {}, outputs)  # type: ignore[attr-defined]
        return function

    return marked


def tools_of(owner: object) -> dict[str, Callable[..., Any]]:
    """The tools of an object, by name, in the order of its class."""
    names = [name for name, value in vars(type(owner)).items() if hasattr(value, "wires")]
    return {name: getattr(owner, name) for name in names}


def write_server_file(parameter_file: str, tools: Mapping[str, Callable[..., Any]]) -> None:
    """Write server.yaml beside a parameter.yaml, as UltraRAG's own servers do when a pipeline is built.

    Raises:
        DataError: the parameters cannot be read, or the server's code is not where the pipeline will look for it.
    """
    file = Path(parameter_file)
    parameters = _parameters(file)
    code = parameters.get("path", str(file.parent / "src" / f"{file.parent.name}.py"))
    if not Path(code).exists():
        raise DataError(f"'{code}' is not there: a server's code is called as its folder; write the folder anew")
    entries = {name: _entry(function, parameters) for name, function in tools.items()}
    content = {"path": code, "parameter": parameter_file, "tools": entries, "prompts": {}}
    file.with_name("server.yaml").write_text(
        yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8"
    )


def _parameters(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"'{file}' cannot be read: {error}") from error
    if not isinstance(found or {}, dict):
        raise DataError(f"'{file}' holds a {type(found).__name__}; it must map names to values")
    return found or {}


def _entry(function: Callable[..., Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's wires; a $ says that the value is that of the parameter file."""
    wires: Wires = function.wires  # type: ignore[attr-defined]
    asked = {name: wires.inputs.get(name, name) for name in inspect.signature(function).parameters}
    entry: dict[str, Any] = {"input": {name: _variable(value, parameters) for name, value in asked.items()}}
    return entry | ({"output": [_variable(name, parameters) for name in wires.outputs]} if wires.outputs else {})


def _variable(name: str, parameters: Mapping[str, Any]) -> str:
    return f"${name}" if name in parameters else name
