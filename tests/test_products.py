"""Linear layers by oneDNN: the same results and gradients, where it is used, and where it is not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ultrarag import Encoder, products
from ultrarag.errors import UsageError
from ultrarag.products import OneDnnLinear, multiply_by_onednn, rounded

pytestmark = pytest.mark.skipif(not products._agrees(), reason="this torch has no such product")


@pytest.fixture(autouse=True)
def on(monkeypatch):
    monkeypatch.setenv(products.SETTING, "on")


@pytest.fixture
def multiplied(monkeypatch):
    """The numbers of rows that oneDNN multiplied."""
    seen = []
    original = products._multiply
    monkeypatch.setattr(products, "_multiply", lambda rows, *rest: seen.append(len(rows)) or original(rows, *rest))
    return seen


def pair(bias=True):
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    fast = copy.deepcopy(plain)
    multiply_by_onednn(fast)
    assert type(fast) is OneDnnLinear
    return plain, fast


@pytest.mark.parametrize("shape", [(8, 24), (33, 24), (3, 17, 24), (1, 300, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_those_of_torch(shape, bias, multiplied):
    plain, fast = pair(bias)
    found = []
    for layer in (plain, fast):
        rows = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
        out = layer(rows)
        (out**2).sum().backward()
        found.append([out, rows.grad, *(weight.grad for weight in layer.parameters())])
    for expected, other in zip(*found, strict=True):
        assert torch.allclose(expected, other, rtol=1e-4, atol=1e-4)
    assert len(multiplied) == 3


def test_what_is_not_contiguous(multiplied):
    plain, fast = pair()
    rows = torch.randn(24, 50).t()
    assert torch.allclose(plain(rows), fast(rows), atol=1e-5)
    gradients = []
    for layer in (plain, fast):
        rows = torch.linspace(0, 1, 50 * 24).view(50, 24).requires_grad_()
        layer(rows).sum().backward()  # its gradient is one number, expanded
        gradients.append(rows.grad)
    assert torch.allclose(*gradients, rtol=1e-5)
    assert len(multiplied) == 4


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_only_the_gradients_that_are_asked_for(trained):
    _, fast = pair()
    for name, weight in fast.named_parameters():
        weight.requires_grad = name == trained
    fast(torch.randn(9, 24)).sum().backward()
    assert {name for name, weight in fast.named_parameters() if weight.grad is not None} == {trained}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_everything_else_is_torchs(multiplied):
    _, fast = pair()
    fast(torch.randn(7, 24))
    fast(torch.randn(0, 24))
    fast.double()(torch.randn(9, 24, dtype=torch.float64))
    fast.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(torch.randn(9, 24)).dtype is torch.bfloat16
    torch.jit.trace(fast, torch.randn(9, 24), check_trace=False)
    assert fast.to("meta")(torch.randn(9, 24, device="meta")).shape == (9, 40)
    assert multiplied == []


def test_numbers_of_rows_are_few_and_never_much_more():
    numbers = [rounded(rows) for rows in range(1, 4097)]
    assert len(set(numbers)) < 110
    assert all(rows <= number <= max(rows + 7, rows * 17 / 16) for rows, number in enumerate(numbers, 1))
    assert [rounded(number) for number in numbers] == numbers


def test_a_layer_is_copied_pickled_and_saved_as_ever():
    plain, fast = pair()
    rows = torch.randn(9, 24)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(again(rows), fast(rows))
    assert plain.state_dict().keys() == fast.state_dict().keys()


def test_layers_of_other_kinds_are_let_be():
    class Own(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    patched = nn.Linear(8, 8)
    patched.forward = lambda input: input
    model = nn.Sequential(Own(8, 8), nn.Linear(8, 8), patched)
    multiply_by_onednn(model)
    assert [type(layer) for layer in model] == [Own, OneDnnLinear, nn.Linear]


def test_an_encoder_gives_the_same_vectors(minilm, monkeypatch, multiplied):
    texts = ["a", "four words are here", "a longer text, " * 9] * 4
    fast = Encoder.load(minilm, device="cpu")
    found = fast.encode(texts, "passage").dense
    assert multiplied
    assert set(multiplied) <= {rounded(rows) for rows in multiplied}
    monkeypatch.setenv(products.SETTING, "off")
    multiplied.clear()
    expected = Encoder.load(minilm, device="cpu").encode(texts, "passage").dense
    assert not multiplied
    assert abs(found - expected).max() < 1e-5


def test_a_processor_that_gains_nothing_keeps_torchs(monkeypatch):
    monkeypatch.setenv(products.SETTING, "")
    monkeypatch.setattr(products, "_slow_without", lambda: False)
    layer = nn.Linear(8, 8)
    multiply_by_onednn(layer)
    assert type(layer) is nn.Linear


def test_a_setting_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv(products.SETTING, "yes")
    with pytest.raises(UsageError, match="ULTRARAG_ONEDNN is 'yes'"):
        multiply_by_onednn(nn.Linear(8, 8))
