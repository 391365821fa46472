"""The benchmarks' results as one HTML page of tables and plots, and the tables in benchmarks/README.md.

    python benchmarks/page.py [--check]

Reads benchmarks/results/*.json; writes benchmarks/results/index.html, which stands alone, and what is between the
markers in benchmarks/README.md. --check writes nothing, and fails where either does not say what the results say.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from page_charts import charts
from page_parts import markdown, values
from targets import table as targets_table

from ultrarag.report.page import document, section, text

HERE = Path(__file__).parent
#: With this a script's docstring shows how to call it; parts of scripts have no such line.
COMMAND = "    python benchmarks/"


def main(arguments: list[str] | None = None) -> int:
    """Write both files, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is not up to date")
    options = parser.parse_args(arguments)
    reports = read_reports(HERE / "results")
    readme = HERE / "README.md"
    wanted = {
        HERE / "results" / "index.html": build(reports),
        readme: filled(readme.read_text(encoding="utf-8"), reports),
    }
    if options.check:
        stale = [path for path, content in wanted.items() if not holds(path, content)]
        for path in stale:
            print(f"{path} is not what the results say: run python benchmarks/page.py", file=sys.stderr)
        return 1 if stale else 0
    for path, content in wanted.items():
        path.write_text(content, encoding="utf-8")
        print(f"written: {path}", file=sys.stderr)
    return 0


def read_reports(folder: Path) -> dict[str, Any]:
    """What every results file holds, by its name without .json."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def holds(path: Path, content: str) -> bool:
    """Whether the file is this."""
    return path.exists() and path.read_text(encoding="utf-8") == content


def build(reports: dict[str, Any]) -> str:
    """The page."""
    contents = ", ".join(f'<a href="#{text(name)}">{text(name)}</a>' for name in reports)
    parts = [
        "<h1>Benchmarks</h1>",
        f"<p>{contents}</p>",
        section("Targets", markdown(targets_table(reports))),
        *(f'<div id="{text(name)}">{section(name, result(name, report))}</div>' for name, report in reports.items()),
    ]
    return document("ultrarag: benchmarks", "\n".join(parts))


def result(name: str, report: dict[str, Any]) -> str:
    """One result: what was measured, where, when and how to do it again, the plots and the tables."""
    script = script_of(name)
    # a script that renders its report does it again from the numbers; of the others the numbers are shown
    render = getattr(importlib.import_module(script.stem), "render", None)
    origin = [
        ("", summary(script)),
        ("Machine", report.get("machine", "not recorded")),
        ("Date", report.get("date", "not recorded")),
        ("Note", report.get("note") or report.get("what") or "" if render is None else ""),
    ]
    lines = [f"<p>{text(f'{label}: {told}' if label else told)}</p>" for label, told in origin if told]
    lines.append(f"<p>Again: <code>{text(report.get('command') or usage(script))}</code></p>")
    return "\n".join([*lines, charts(name, report), markdown(render(report)) if render else values(report)])


def script_of(name: str) -> Path:
    """The script that wrote a result: the one with the longest name that the result's begins with."""
    found = [path for path in HERE.glob("*.py") if name.startswith(path.stem)]
    if not found:
        raise SystemExit(f"results/{name}.json: no script in {HERE} has a name that this begins with")
    return max(found, key=lambda path: len(path.stem))


def docstring(script: Path) -> str:
    """What a script says of itself."""
    return ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""


def summary(script: Path) -> str:
    """The docstring's first line."""
    return docstring(script).split("\n")[0].split(";")[0].rstrip(":.") + "."


def usage(script: Path) -> str:
    """The docstring's first command."""
    lines = [line.strip() for line in docstring(script).splitlines() if line.startswith(COMMAND)]
    return re.split(r"\s{2,}", lines[0])[0] if lines else f"python benchmarks/{script.name}"


def scripts_table() -> str:
    """What each script measures."""
    scripts = [path for path in sorted(HERE.glob("*.py")) if COMMAND in docstring(path)]
    rows = [f"| `{path.name}` | {summary(path)} | `{usage(path)}` |" for path in scripts]
    return "\n".join(["| script | what it measures | command |", "|---|---|---|", *rows])


def filled(readme: str, reports: dict[str, Any]) -> str:
    """The README with its tables made anew."""
    for name, content in (("scripts", scripts_table()), ("targets", targets_table(reports))):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in readme or end not in readme:
            raise SystemExit(f"{HERE / 'README.md'} lacks the marker '{begin}' or '{end}'")
        readme = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", readme, flags=re.DOTALL)  # noqa: B023
    return readme


if __name__ == "__main__":
    sys.exit(main())
