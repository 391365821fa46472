"""The exchange between ranks: few messages, each array as it was. What it does to losses is in test_golden_ddp."""

from __future__ import annotations

import torch

from ultrarag.finetune.step import distributed


def test_arrays_of_a_dtype_travel_together(monkeypatch):
    sent = []

    def exchange(array: torch.Tensor, rows: list[int]) -> torch.Tensor:
        sent.append(array.shape)
        return torch.cat([array, -array])  # a second rank with the opposite

    monkeypatch.setattr(distributed, "_own_first", exchange)
    dense, ids, weights = torch.rand(4, 8), torch.arange(12).view(4, 3), torch.rand(4, 3)
    colbert, mask, scores = torch.rand(4, 5, 2), torch.ones(4, 5, dtype=torch.int64), torch.rand(4)
    arrays = [dense, ids, weights, colbert, mask, scores]
    found = distributed._all_own_first(arrays, [4, 4])
    assert sent == [(4, 8 + 3 + 10 + 1), (4, 3 + 5)]
    for array, both in zip(arrays, found, strict=True):
        assert torch.equal(both, torch.cat([array, -array]))
        assert both.dtype == array.dtype
