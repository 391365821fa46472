"""What the tests of UltraRAG v3 share: its checkout with our servers, a corpus, and a language model's stand-in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from ultrarag.doors.ultrarag_v3 import write_servers

DOOR = Path(sys.prefix)
CHECKOUT, PEER = DOOR / "checkout", DOOR / "peer" / "bin"

#: About the questions of UltraRAG's own data/sample_nq_10.jsonl; the chunks of one article have its id.
CORPUS = [
    {"id": "moon", "contents": "Apollo 17 left the Moon on 14 December 1972 UTC: nobody has been there since."},
    {"id": "moon", "contents": "The Moon turns the same face to the Earth at all times."},
    {
        "id": "heavy",
        "contents": "He Ain't Heavy, He's My Brother has music by Bobby Scott, lyrics by Bob Russell.",
    },
    {"id": "series", "contents": "The Bastard Executioner was a television series of one season."},
    {"id": "eagles", "contents": "The Philadelphia Eagles won the Super Bowl of the season of 2017."},
    {"id": "ncaa", "contents": "South Carolina won the women's basketball championship of the NCAA."},
    {"id": "wight", "contents": "The Isle of Wight was cut off from the mainland during the last Ice Age."},
    {"id": "bieber", "contents": "Listeners asked whether Love Yourself by Justin Bieber is about Rihanna."},
    {"id": "king", "contents": "James I was the ruler of England in 1616."},
    {"id": "coffee", "contents": "Hot Coffee is a normally inaccessible mini-game in Grand Theft Auto: San Andreas."},
    {"id": "wifi", "contents": "The standard 802.11a has a maximum data rate of 54 Mbit/s."},
    {"id": "bread", "contents": "Sourdough rises by the yeasts that live in flour."},
    {"id": "river", "contents": "The Danube flows through ten countries into the Black Sea."},
    {"id": "river", "contents": "Salmon swim up rivers to the place where they hatched."},
]


def write_corpus(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in CORPUS), encoding="utf-8")
    return path


class Model:
    """A language model's stand-in at /v1/chat/completions: `answer` makes its answer of the prompt."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        #: what it was asked, in order
        self.prompts: list[str] = []
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                model.prompts.append(prompt)
                message = {"role": "assistant", "content": answer(prompt)}
                found = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
                found["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
                data = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


#: What the stand-in asks for when it is to ask for more, and the text that answers it.
SUB_QUESTION, SUB_ANSWER = "who was the ruler of england in 1616", "James I was the ruler of England in 1616."


def read(prompt: str) -> str:
    """Answer as a reader would who believes the first document, and wants to know who ruled England in 1616."""
    if "output <stop>" in prompt:
        return "<stop>" if SUB_ANSWER in prompt else "<search>"
    if "Generate ONE new sub-question" in prompt:
        return f"\\boxed{{{SUB_QUESTION}}}"
    found = re.search(r"Documents:\n(.*)", prompt)
    return f"I read it. \\boxed{{{found[1] if found else 'unknown'}}}"


class Ultrarag:
    """A copy of UltraRAG's checkout, and its own command in its own environment."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        shutil.copytree(CHECKOUT, folder, ignore=shutil.ignore_patterns(".git", "ui", "docs"))
        write_servers(folder, url)
        with (folder / "servers" / "prompt" / "parameter.yaml").open("a") as file:  # as its comments there say
            file.write("\ncheck_psg_template: prompt/check_passages.jinja\ngen_subq_template: prompt/gen_subq.jinja\n")
        self.environment = {**os.environ, "PATH": f"{PEER}{os.pathsep}{os.environ['PATH']}"}

    def example(self, name: str, servers: Mapping[str, str] | None = None) -> Path:
        """One of its example pipelines, such as demos/RAG, with other folders for some servers."""
        file = self.folder / "examples" / f"{name}.yaml"
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        content["servers"] |= {alias: f"servers/{folder}" for alias, folder in (servers or {}).items()}
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return file

    def built(self, file: Path, parameters: Mapping[str, Mapping[str, Any]]) -> Path:
        """Build a pipeline, and change parameters in the file that this writes."""
        self.call("build", file)
        written = file.parent / "parameter" / f"{file.stem}_parameter.yaml"
        found = yaml.safe_load(written.read_text(encoding="utf-8")) or {}
        for server, values in parameters.items():
            merge(found.setdefault(server, {}), values)
        written.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
        return file

    def run(self, file: Path, seconds: float = 600) -> dict[str, Any]:
        """Run a pipeline that was built; the last value of each variable."""
        output = self.folder / "output"
        shutil.rmtree(output, ignore_errors=True)
        self.call("run", file, seconds=seconds)
        [memory] = output.glob("memory_*.json")
        steps = json.loads(memory.read_text(encoding="utf-8"))
        return {name.removeprefix("memory_"): value for step in steps for name, value in step["memory"].items()}

    def call(self, *words: object, fails: bool = False, seconds: float = 600) -> str:
        command = [str(PEER / "ultrarag"), *map(str, words)]
        options: dict[str, Any] = {"cwd": self.folder, "env": self.environment, "timeout": seconds}
        done = subprocess.run(command, capture_output=True, text=True, **options)
        said = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, said[-6000:]
        return said


def merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set values in nested mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(name), dict):
            merge(into[name], value)
        else:
            into[name] = value
