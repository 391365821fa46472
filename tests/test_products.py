"""Linear layers by oneDNN: the same results and gradients, where it is used, and where it is not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

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


@pytest.mark.parametrize("shape", [(8, 24), (9, 24), (3, 5, 24)])
def test_what_follows_may_change_the_result_in_place(shape):
    """Such as an activation with inplace=True: autograd refuses it of a view that an operation of ours gives."""
    gradients = []
    for layer in pair():
        rows = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
        out = layer(rows)
        out += 1
        out.relu_().sum().backward()
        gradients.append(rows.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_a_frozen_layer_keeps_no_rows_for_its_backward():
    """As torch's: beside LoRA they are most of what a step keeps."""
    kept = []
    for layer in pair():
        layer.requires_grad_(False)
        rows, shapes = torch.randn(9, 24, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda one, seen=shapes: seen.append(one.shape) or one, id):
            layer(rows)
        kept.append(shapes)
    assert kept[1] == [(40, 24)]
    assert sum(shape.numel() for shape in kept[1]) <= sum(shape.numel() for shape in kept[0])


def test_rows_that_overlap_in_memory_train():
    """Windows of a signal: oneDNN takes them as rows, and not as the weight that they are of the weight's gradient."""
    rows = torch.linspace(-1, 1, 24 + 2 * 39).unfold(0, 24, 2)
    gradients = []
    for layer in pair():
        layer(rows).pow(2).sum().backward()
        gradients.append(layer.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [8, 9])
def test_gradients_of_gradients(number):
    """A penalty on the gradient, of the rows' and of the weight's."""
    found = []
    for layer in pair():
        rows = torch.linspace(-1, 1, number * 24).view(number, 24).requires_grad_()
        of_rows, of_weight = torch.autograd.grad(layer(rows).pow(3).mean(), [rows, layer.weight], create_graph=True)
        (of_rows.pow(2).sum() + of_weight.pow(2).sum()).backward()
        found.append([rows.grad, *(weight.grad for weight in layer.parameters())])
    for expected, other in zip(*found, strict=True):
        assert expected.any()
        assert torch.allclose(expected, other, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # jacfwd's own
def test_transforms_of_torch_func_and_derivatives_forward():
    plain, fast = pair()
    rows = torch.linspace(-1, 1, 9 * 24).view(9, 24)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(transform(plain)(rows), transform(fast)(rows), atol=1e-5)
    with torch.no_grad(), forward_ad.dual_level():
        found = [forward_ad.unpack_dual(layer(forward_ad.make_dual(rows, rows))).tangent for layer in (plain, fast)]
    assert torch.allclose(*found, atol=1e-5)


def test_rows_of_another_width_are_refused_as_by_torch():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pair()[1](torch.randn(96, 8))


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


def test_only_what_lies_on_a_cpu_is_looked_at_before_each_product(minilm):
    encoder = Encoder.load(minilm, device="meta")
    assert not any(isinstance(layer, OneDnnLinear) for layer in encoder.model.modules())
