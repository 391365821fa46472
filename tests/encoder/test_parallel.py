"""Forwards side by side on a CPU: same vectors, and torch's threads as they were."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ultrarag import Encoder
from ultrarag.encoder.device import map_side_by_side, side_by_side
from ultrarag.encoder.tokens import batches_by_tokens
from ultrarag.testing.tiny import TEXTS, tiny_bert, tiny_minicpm


def test_each_worker_has_its_share_and_the_others_keep_theirs(two_threads):
    seen = list(map_side_by_side(lambda item: (item, torch.get_num_threads()), range(6), 2))
    assert seen == [(item, (item, 1)) for item in range(6)]
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:  # a thread that has not used torch yet
        assert pool.submit(torch.get_num_threads).result() == 2


def test_one_forward_at_a_time_stays_in_the_calling_thread():
    names = [name for _, name in map_side_by_side(lambda item: threading.current_thread().name, [1, 2], 1)]
    assert names == [threading.current_thread().name] * 2


def test_an_error_ends_the_rest(two_threads):
    done = []

    def fail(item: int) -> None:
        done.append(item)
        time.sleep(0.002)
        if item == 1:
            raise ValueError("1")

    with pytest.raises(ValueError, match="1"):
        list(map_side_by_side(fail, range(1000), 2))
    assert len(done) < 1000
    assert torch.get_num_threads() == 2


def test_encoding_side_by_side_gives_the_same_vectors(tmp_path, two_threads, monkeypatch):
    tiny_bert(tmp_path)
    encoder = Encoder.load(tmp_path, "bge", device="cpu")
    texts = [text * (1 + number % 3) for number, text in enumerate(TEXTS * 4)]
    threads = set()
    forward = Encoder._forward

    def noting(self, *arguments):
        threads.add(threading.current_thread().name)
        return forward(self, *arguments)

    monkeypatch.setattr(Encoder, "_forward", noting)
    together = encoder.encode(texts, batch_tokens=64, progress=False).dense
    assert threads
    assert threading.current_thread().name not in threads
    monkeypatch.setattr(Encoder, "_workers", lambda self, dtype: 1)
    one_by_one = encoder.encode(texts, batch_tokens=64, progress=False).dense
    np.testing.assert_allclose(together, one_by_one, atol=1e-6)


def test_batches_for_several_workers_get_smaller_towards_the_end():
    lengths = [100, 7, 60, 300] * 50
    alone, shared = (list(batches_by_tokens(lengths, 2048, workers)) for workers in (1, 2))
    tokens = [[sum(lengths[row] for row in batch) for batch in batches] for batches in (alone, shared)]
    assert sorted(row for batch in shared for row in batch) == list(range(200))
    assert shared[:3] == alone[:3]
    assert max(tokens[1][-4:]) <= 512 < max(tokens[0][-4:])
    # one batch's worth is divided too, down to what is worth a forward of its own
    assert len(list(batches_by_tokens([100] * 20, 2048, 2))) == 4
    assert len(list(batches_by_tokens([100] * 5, 2048, 2))) == 1


def test_only_plugins_that_say_so_are_called_in_threads(tmp_path, two_threads):
    tiny_bert(tmp_path / "bert")
    tiny_minicpm(tmp_path / "minicpm")
    assert Encoder.load(tmp_path / "bert", "bge", device="cpu")._workers(None) == 2
    assert Encoder.load(tmp_path / "minicpm", "minicpm-embedding", device="cpu")._workers(None) == 1
    torch.set_num_threads(1)
    assert side_by_side() == 1


def test_a_batch_whose_padding_is_computed_has_rows_of_like_length():
    lengths = [57, 35, 56, 10, 49, 48, 36]
    batches = list(batches_by_tokens(lengths, 2048, fill=0.85))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert [[lengths[row] for row in batch] for batch in batches] == [[57, 56, 49], [48], [36, 35], [10]]
    assert len(list(batches_by_tokens(lengths, 2048))) == 1
