"""Run each door's tests beside its framework, in an environment of its own, and write the table of docs/doors.md.

    python tests/doors/run.py [langchain ...] [--fast] [--keep-page]

An environment lies in .doors/NAME: what its requirements.txt pins, over the packages of .venv (of a package that both
have, its own counts). `peer.txt`, where a door has one, is installed into .doors/NAME/peer, which sees nothing of ours.
`checkout.txt` (address and tag) names a framework that comes from a repository alone: it is cloned into
.doors/NAME/checkout, from the address or from a clone that the variable DOORS_SOURCE_NAME names, and installed into the
peer. Where neither can be had, what needs it is skipped with that reason.
Every test file is a row of the table, under the first line of its docstring. `--fast` leaves out what is marked long.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PLACE = ROOT / ".doors"
PAGE = ROOT / "docs" / "doors.md"
START, END = "<!-- results: made by tests/doors/run.py -->\n", "<!-- end of results -->\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the doors that are named, or all; 0 when every test passed."""
    asked = parse(arguments)
    failed = [name for name in asked.doors if not run(name, asked.fast)]
    if not asked.keep_page:
        write_page()
    print("all doors passed" if not failed else f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def doors() -> list[str]:
    """Every folder here that has a requirements.txt."""
    return sorted(file.parent.name for file in HERE.glob("*/requirements.txt"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("doors", nargs="*", metavar="DOOR", help=f"of {', '.join(doors())} (default: all)")
    parser.add_argument("--fast", action="store_true", help="leave out the tests marked long")
    parser.add_argument("--keep-page", action="store_true", help="do not write results and docs/doors.md")
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.doors) - set(doors()))
    if unknown:
        parser.error(f"no door '{unknown[0]}': there are {', '.join(doors())}")
    asked.doors = asked.doors or doors()
    asked.keep_page = asked.keep_page or asked.fast
    return asked


def run(name: str, fast: bool) -> bool:
    """Run one door's tests, whose counts are kept beside them; True when none failed and some passed."""
    print(f"== {name}", file=sys.stderr)
    python = environment(name)
    junit = PLACE / name / "junit.xml"
    junit.unlink(missing_ok=True)
    only = ["-m", "not long"] if fast else ["-m", ""]
    config = ["-c", str(HERE / "pytest.ini"), f"--rootdir={ROOT}"]
    command = [python, "-m", "pytest", *config, "-n", "0", *only, f"--junitxml={junit}", str(HERE / name)]
    started = time.time()
    status = subprocess.run(command, cwd=ROOT).returncode
    rows = counted(name, junit) if junit.is_file() else []
    print(f"== {name}: {time.time() - started:.0f} s", file=sys.stderr)
    if rows and not fast:
        result = {"versions": versions(name), "python": sys.version.split()[0], "suites": rows}
        (HERE / name / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return status == 0 and any(row["passed"] for row in rows)


def environment(name: str) -> str:
    """Make .doors/NAME if it is not there or its requirements have changed; return its Python."""
    place, wanted = PLACE / name, HERE / name / "requirements.txt"
    peer, repository = HERE / name / "peer.txt", HERE / name / "checkout.txt"
    stamp = place / ".ready"
    digest = hashlib.sha256(
        b"".join(f.read_bytes() for f in (wanted, peer, repository, ROOT / "setup.cfg") if f.is_file())
    ).hexdigest()
    python = str(place / "bin" / "python")
    if not (stamp.is_file() and stamp.read_text() == digest):
        stamp.unlink(missing_ok=True)
        make(name, place, wanted, peer)
        stamp.write_text(digest, encoding="utf-8")
    if repository.is_file() and not (place / "checkout").is_dir():
        clone(name, place, *repository.read_text(encoding="utf-8").split())
    return python


def make(name: str, place: Path, wanted: Path, peer: Path) -> None:
    """Make the environment, and its peer."""
    python = str(place / "bin" / "python")
    new(place)
    site = place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # .pth lines are added after the folder itself: what is installed here comes first. addsitedir reads the .pth files
    # of .venv too, and with them this checkout
    (site / "1-base.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n", encoding="utf-8"
    )
    (site / "0-checkout.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    install(python, "-r", str(wanted))
    if peer.is_file():
        new(place / "peer")
        install(str(place / "peer" / "bin" / "python"), "-r", str(peer))


def clone(name: str, place: Path, address: str, tag: str) -> None:
    """Get a framework's repository at a tag, and install it into the peer; say so where that cannot be done."""
    source = os.environ.get(f"DOORS_SOURCE_{name.upper()}", address)
    unfinished = place / "checkout.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    words = ["git", "-c", "advice.detachedHead=false", "clone", "-q", "--depth", "1", "--branch", tag]
    where = source if "://" in source else Path(source).resolve().as_uri()  # --depth needs an address
    done = subprocess.run([*words, where, str(unfinished)], env={**os.environ, "GIT_TERMINAL_PROMPT": "0"})
    if done.returncode:
        print(f"== {name}: {source} cannot be cloned; DOORS_SOURCE_{name.upper()} may name a clone", file=sys.stderr)
        return
    copy = place / "build"  # setuptools writes into what it builds
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(unfinished, copy, ignore=shutil.ignore_patterns(".git"))
    python = str(place / "peer" / "bin" / "python")
    install(python, "--no-deps", str(copy))
    shutil.rmtree(copy)
    unfinished.rename(place / "checkout")


def new(place: Path) -> None:
    """Make an environment without a pip of its own: ours installs into it."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(place)], check=True)


def install(python: str, *what: str) -> None:
    compiling = "--compile" if sys.dont_write_bytecode else "--no-compile"  # as in the Makefile
    words = [sys.executable, "-m", "pip", "--python", python, "install", "--disable-pip-version-check", "-q", compiling]
    subprocess.run([*words, *what], check=True, cwd=ROOT, env={**os.environ, "PIP_NO_WARN_CONFLICTS": "1"})


def versions(name: str) -> dict[str, str]:
    """What the door's requirements pin, by name, and the framework's repository, or else its peer's packages."""
    repository = HERE / name / "checkout.txt"
    files = [HERE / name / "requirements.txt", *([] if repository.is_file() else [HERE / name / "peer.txt"])]
    lines = [line.strip() for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()]
    if repository.is_file():
        address, tag = repository.read_text(encoding="utf-8").split()
        lines.insert(0, f"{address.rpartition('/')[2]}=={tag.removeprefix('v')}")
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))  # type: ignore[misc]


def counted(name: str, junit: Path) -> list[dict[str, Any]]:
    """Passed, failed and skipped of each test file, with the reasons of those skipped."""
    files: dict[str, Counter[str]] = {}
    reasons: dict[str, set[str]] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        file = next(p for p in case.get("classname", "").split(".") if p.startswith("test_"))
        skip = case.find("skipped")
        bad = case.find("failure") is not None or case.find("error") is not None
        files.setdefault(file, Counter())["failed" if bad else "skipped" if skip is not None else "passed"] += 1
        if skip is not None:
            reasons.setdefault(file, set()).add(skip.get("message", "")[:200])
    return [
        {"file": file, "suite": title(name, file), **{k: files[file][k] for k in ("passed", "failed", "skipped")}}
        | ({"reasons": sorted(reasons[file])} if file in reasons else {})
        for file in sorted(files)
    ]


def title(name: str, file: str) -> str:
    """The first line of the test file's docstring."""
    tree = ast.parse((HERE / name / f"{file}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or file).splitlines()[0]


def table() -> str:
    """The results of all doors, as a table in Markdown."""
    lines = ["| door | versions | suite | passed | failed | skipped |", "|---|---|---|---|---|---|"]
    for file in sorted(HERE.glob("*/result.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        pinned = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        for row in result["suites"]:
            skipped = f"{row['skipped']}: {'; '.join(row['reasons'])}" if row.get("reasons") else row["skipped"]
            lines.append(
                f"| {file.parent.name} | {pinned} | {row['suite']} | {row['passed']} | {row['failed']} | {skipped} |"
            )
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/doors.md with the table of what is kept now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + table() + END + rest.partition(END)[2]


def write_page() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
