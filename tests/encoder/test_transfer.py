"""Between CPU and GPU: what is known on the CPU is not fetched, and results come in order."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ultrarag import Encoder
from ultrarag.encoder.device import in_background, one_ahead
from ultrarag.finetune.batches import make_collator, make_loader, make_plan, read_data
from ultrarag.finetune.flags.arguments import parse_command_line
from ultrarag.finetune.step import load_encoder
from ultrarag.finetune.step.gradcache import by_texts
from ultrarag.testing.tiny import TEXTS, tiny_m3
from ultrarag.transfer import on_host, remember_host, to_device, to_host
from ultrarag.types import Embeddings, Sparse

CPU = torch.device("cpu")


def test_each_item_starts_before_the_last_ones_result_is_fetched():
    events: list[str] = []

    def start(item: int):
        events.append(f"start {item}")

        def wait() -> int:
            events.append(f"fetch {item}")
            return item * item

        return wait

    assert list(one_ahead(start, [1, 2, 3])) == [(1, 1), (2, 4), (3, 9)]
    assert events == ["start 1", "start 2", "fetch 1", "start 3", "fetch 2", "fetch 3"]
    assert list(one_ahead(start, [])) == []


def test_an_error_of_a_start_ends_it():
    def start(item: int):
        if item == 2:
            raise ValueError("2")
        return lambda: item

    with pytest.raises(ValueError, match="2"):
        list(one_ahead(start, [1, 2, 3]))


def test_items_are_made_in_a_thread_while_one_is_used():
    made: list[tuple[int, str]] = []
    second = threading.Event()

    def make(number: int) -> int:
        made.append((number, threading.current_thread().name))
        if number == 1:
            second.set()
        return number

    found = in_background(make, range(3))
    assert next(found) == 0
    assert second.wait(10)
    assert list(found) == [1, 2]
    assert [number for number, _ in made] == [0, 1, 2]
    assert threading.current_thread().name not in {name for _, name in made}


def test_what_is_raised_comes_where_its_result_would():
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("2")
        return number

    found = in_background(make, [1, 2, 3])
    assert next(found) == 1
    with pytest.raises(ValueError, match="2"):
        next(found)


def test_a_loader_that_works_ahead_gives_the_same_batches(tmp_path):
    data = Path(tmp_path) / "rows.jsonl"
    rows = ({"query": f"query {n}", "pos": [f"passage {n}"], "neg": ["other"]} for n in range(10))
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    tiny_m3(tmp_path / "model")
    given = f"--model_name_or_path {tmp_path}/model --train_data {data} --output_dir {tmp_path}/out --use_cpu True"
    arguments = parse_command_line([*given.split(), "--cache_path", f"{tmp_path}/cache", "--adapter", "bgem3"], None)
    encoder = load_encoder(arguments, print)
    plan = make_plan(arguments, read_data(arguments), pairs=False)
    loader = make_loader(plan, make_collator(arguments.data, encoder), 0, arguments.training)
    assert not loader.ahead
    expected = list(loader)
    loader.ahead = True
    found = list(loader)
    assert [batch["sources"] for batch in found] == [batch["sources"] for batch in expected]
    assert all(
        torch.equal(one["passages"]["input_ids"], other["passages"]["input_ids"])
        for one, other in zip(found, expected, strict=True)
    )
    assert len(found) > 1


def test_parts_of_a_moved_batch_know_their_masks():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    features = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": remember_host(mask.clone(), mask)}
    parts = [part for _, part in by_texts(2)(features)]
    assert [part["input_ids"].shape for part in parts] == [(2, 3), (1, 1)]
    assert all(torch.equal(on_host(part["attention_mask"]), part["attention_mask"]) for part in parts)
    assert all(on_host(part["attention_mask"]) is not part["attention_mask"] for part in parts)


def test_a_moved_mask_remembers_where_it_came_from():
    mask = torch.tensor([[1, 1, 0]])
    moved = remember_host(torch.empty(1, 3, device="meta"), mask)
    assert on_host(moved) is mask
    assert on_host(mask) is mask
    assert remember_host(mask, mask) is mask
    assert to_device(mask, CPU) is mask


def test_embeddings_come_to_the_cpu_as_float32():
    found = Embeddings(
        dense=torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True),
        sparse=Sparse(torch.tensor([[4], [5]]), torch.ones(2, 1)),
    )
    host = to_host(found)()
    assert host.dense.dtype == np.float32
    assert host.sparse.ids.dtype == np.int64
    assert host.sparse.weights.tolist() == [[1.0], [1.0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_vectors_of_the_cpu(tmp_path, precision):
    tiny_m3(tmp_path)
    texts = [" ".join(TEXTS[: 1 + number % len(TEXTS)]) for number in range(40)]
    there, here = (
        Encoder.load(tmp_path, "bgem3", device=device, precision=kind).encode(texts, batch_tokens=128, progress=False)
        for device, kind in (("cuda", precision), ("cpu", "fp32"))
    )
    tolerance = 1e-3 if precision == "fp32" else 0.05
    np.testing.assert_allclose(there.dense, here.dense, atol=tolerance)
    np.testing.assert_allclose(there.colbert, here.colbert, atol=tolerance)
