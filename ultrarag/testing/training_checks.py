"""Checks on training: gradients arrive, steps help, and the loss sees nothing but Embeddings."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ultrarag.checkpoint import write_checkpoint
from ultrarag.encoder import Encoder, adapted_part
from ultrarag.finetune.flags import LoraArguments
from ultrarag.finetune.step import LORA_FILE, Trainable, add_lora, by_texts, cached_step
from ultrarag.hookspecs import Features
from ultrarag.loss_arguments import LossArguments
from ultrarag.packages import install
from ultrarag.scores import head_scores
from ultrarag.testing.subject import GROUP, Failed, NotApplicable, Subject, difference
from ultrarag.types import Embeddings

#: Learning rates that are tried, largest first: tiny random models need the first, real ones the last.
RATES = (1e-2, 1e-3, 1e-4, 1e-5)
STEPS = 8
#: Largest relative difference between GradCache's gradient and the plain one.
GRADIENT_TOLERANCE = 1e-4
#: Largest difference of a component between a model with adapters and the same with them in its weights.
MERGED_TOLERANCE = 1e-4
#: Texts per piece in the GradCache check; no divisor of the batch, so that the last piece is smaller.
CHUNK = 3


def check_gradients(subject: Subject) -> str:
    """Every parameter that is to be trained has a gradient, in each way of training."""
    counts = []
    for unified in subject.modes():
        encoder = subject.fresh()
        module = subject.trainable(encoder, unified)
        _backward(subject, encoder, module, subject.arguments(encoder, unified))
        wanted = [(name, p) for name, p in module.model.named_parameters() if p.requires_grad]
        without = [name for name, p in wanted if p.grad is None]
        heads = ", ".join(module.heads)
        if without:
            raise Failed(
                f"{len(without)} of {len(wanted)} parameters get no gradient when the heads {heads} are trained, "
                f"first '{without[0]}' (several processes would refuse to train)",
                "compute nothing under no_grad or detached in 'encode'; call the layers of the other heads "
                "'sparse_linear' and 'colbert_linear', which are frozen when unused; remove layers that nothing uses",
            )
        _check_finite(wanted)
        _check_effect(subject.sides(encoder), module, wanted)
        counts.append(f"{len(wanted)} for {heads}")
    return f"parameters reached: {'; '.join(counts)}"


def _check_finite(wanted: Sequence[tuple[str, Tensor]]) -> None:
    bad = [name for name, p in wanted if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    if bad:
        raise Failed(f"the gradient of '{bad[0]}' is not finite", "look for sqrt, log or a norm of zero in 'encode'")


def _check_effect(sides: Sequence[Features], module: Trainable, wanted: Sequence[tuple[str, Tensor]]) -> None:
    """Every parameter moves the embeddings (the loss may cancel one, as it does a cross-encoder's last bias)."""
    module.zero_grad()
    generator = torch.Generator().manual_seed(0)
    arrays = [array for side in module(sides) for array in side.arrays() if array.requires_grad]
    directions = [torch.randn(array.shape, generator=generator).to(array.device) for array in arrays]
    torch.stack(
        [(array * direction).sum() for array, direction in zip(arrays, directions, strict=True)]
    ).sum().backward()
    zero = [name for name, p in wanted if p.grad is None or not bool(p.grad.any())]
    if zero:
        raise Failed(
            f"the gradient of '{zero[0]}' is exactly zero when the heads {', '.join(module.heads)} are trained",
            "find where its effect is multiplied by zero or cut by a step function; set requires_grad to False in "
            "'load' for what is not to be trained",
        )


def check_loss_falls(subject: Subject) -> str:
    """A few steps on the toy batch lower the loss, and lift positives above the other passages."""
    encoder = subject.fresh()
    module = subject.trainable(encoder, subject.modes()[0])
    arguments = subject.arguments(encoder, subject.modes()[0])
    start = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    found = []
    for rate in RATES:
        encoder.model.load_state_dict(start)
        losses, margins = _train(subject, encoder, module, arguments, rate)
        found.append(losses)
        if losses[-1] < losses[0] - 0.02 * abs(losses[0]):
            if margins[-1] <= margins[0]:
                raise Failed(
                    f"the loss fell from {losses[0]:.4g} to {losses[-1]:.4g}, but the positives' lead over other "
                    f"passages fell too, from {margins[0]:.4g} to {margins[-1]:.4g}",
                    f"in 'loss', query i's positive is passage i*G (G = args.group_size, here {GROUP}); "
                    "a smaller loss must mean a higher score for it",
                )
            return f"{losses[0]:.4g} to {losses[-1]:.4g} in {STEPS} steps at learning rate {rate:g}"
    tried = ", ".join(f"{rate:g}: {losses[-1]:.4g}" for rate, losses in zip(RATES, found, strict=True))
    raise Failed(
        f"the loss does not fall in {STEPS} steps of AdamW: it is {found[0][0]:.4g}, then, by learning rate, {tried}",
        "the loss must depend on the model through the Embeddings, and smaller must mean better",
    )


def _train(
    subject: Subject, encoder: Encoder, module: Trainable, arguments: LossArguments, rate: float
) -> tuple[list[float], list[float]]:
    """The losses and the positives' leads before each step, and after the last."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    sides = subject.sides(encoder)
    losses, margins = [], []
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        embeddings = module(sides)
        loss = subject.loss(encoder, embeddings, arguments)
        losses.append(loss.item())
        margins.append(_margin([side.detach() for side in embeddings]))
        if step < STEPS and loss.requires_grad:
            loss.backward()
            optimizer.step()
    return losses, margins


def _margin(embeddings: Sequence[Embeddings]) -> float:
    """How far positives' scores stand above the others', in the mean over heads and queries."""
    if embeddings[0].scores is not None:
        scores = embeddings[0].scores
        layers = scores.unbind(1) if scores.ndim == 2 else [scores]
        matrices = [layer.view(-1, GROUP) for layer in layers]
        positive = torch.zeros(matrices[0].shape[0], 1, dtype=torch.int64, device=matrices[0].device)
    else:
        matrices = list(head_scores(*embeddings).values())
        positive = torch.arange(matrices[0].shape[0], device=matrices[0].device)[:, None] * GROUP
    leads = []
    for scores in matrices:
        others = (scores.sum(1, keepdim=True) - scores.gather(1, positive)) / (scores.shape[1] - 1)
        leads.append((scores.gather(1, positive) - others).mean())
    return float(torch.stack(leads).mean())


def check_gradcache(subject: Subject) -> str:
    """Encoding in pieces gives the same loss and the same gradient: the loss sees nothing but Embeddings."""
    encoder = subject.fresh()
    unified = subject.modes()[0]
    module, arguments = subject.trainable(encoder, unified), subject.arguments(encoder, unified)
    loss = _backward(subject, encoder, module, arguments)
    plain = _take_gradients(module)
    cached = cached_step(
        subject.sides(encoder),
        module,
        lambda embeddings: subject.loss(encoder, embeddings, arguments),
        lambda value: value.backward(),
        by_texts(CHUNK),
        contextlib.nullcontext,
    )
    gradient = _take_gradients(module)
    size = max(float(plain.norm()), 1e-12)
    off = max(float((gradient - plain).norm()) / size, abs(float(cached) - loss) / max(abs(loss), 1e-12))
    if not off <= GRADIENT_TOLERANCE:
        raise Failed(
            f"--sub_batch_size would train differently: loss {float(cached):.6g} instead of {loss:.6g}, gradient "
            f"{float(gradient.norm()):.6g} instead of {size:.6g}, off by {off:.2g} (at most {GRADIENT_TOLERANCE:g})",
            "let 'loss' depend on the model through `query` and `passage` alone, and no row of 'encode' on another",
        )
    return f"loss and gradient in pieces of {CHUNK} agree to {off:.1g}"


def check_other_devices(subject: Subject) -> str:
    """The loss accepts negatives beyond its own candidates (--negatives_cross_device)."""
    if subject.pairs:
        raise NotApplicable("a cross-encoder has no in-batch negatives")
    encoder = subject.encoder
    unified = subject.modes()[0]
    module, arguments = subject.trainable(encoder, unified), subject.arguments(encoder, unified)
    with torch.no_grad():
        query, passage = module(subject.sides(encoder))
        more = Embeddings.cat([passage, passage[1:4]])
        remedy = f"passages after the first queries x G are negatives; G is args.group_size, here {GROUP}"
        try:
            alone, among = (subject.loss(encoder, [query, side], arguments) for side in (passage, more))
            local = subject.loss(encoder, [query, passage], replace(arguments, in_batch_negatives=False))
        except (IndexError, RuntimeError, ValueError) as error:
            raise Failed(f"more passages than queries x G stop 'loss': {error}", remedy) from error
    values = [float(value) for value in (alone, among, local)]
    if not all(torch.isfinite(value) for value in (alone, among, local)) or values[0] == values[1]:
        raise Failed(f"with 3 more negatives the loss is {values[1]:.6g}, without {values[0]:.6g}", remedy)
    return f"loss {values[0]:.4g}, with 3 more negatives {values[1]:.4g}"


def check_lora(subject: Subject) -> str:
    """Low-rank adapters (--use_lora) learn, are saved merged, and leave the model as it was in all else."""
    if importlib.util.find_spec("peft") is None:
        raise NotApplicable(f"the package peft is not installed: {install('peft')}")
    encoder, rows = subject.fresh(), subject.rows
    if not any(isinstance(module, nn.Linear) for module in adapted_part(encoder.model).modules()):
        raise NotApplicable("the model has no linear layer")
    features = subject.features(encoder, rows)
    before, names = subject.embed(encoder, features), set(encoder.model.state_dict())
    unified = subject.modes()[0]
    arguments = subject.arguments(encoder, unified)
    module = subject.trainable(encoder, unified)
    lora = add_lora(encoder, LoraArguments(use_lora=True, lora_rank=4, lora_alpha=8, lora_dropout=0.0))
    _same(before, subject.embed(encoder, features), "adding adapters, which are zero at first, changes the vectors")
    _train(subject, encoder, module, arguments, RATES[0])
    trained = subject.embed(encoder, features)
    if not difference(before, trained)[0] > 0:
        raise Failed(f"{STEPS} steps of the adapters move no vector", _LAYERS)
    folder = subject.scratch / "lora"
    folder.mkdir()
    matrices = lora.matrices()
    with lora.merged():
        _same(trained, subject.embed(encoder, features), "merging the adapters into the weights changes the vectors")
        write_checkpoint(encoder, folder, encoder.model.state_dict(), more=partial(lora.save, matrices=matrices))
    _same(trained, subject.embed(encoder, features), "after a save in the middle of training the vectors are others")
    loaded = Encoder.load(folder, device=subject.device)
    _same(trained, subject.embed(loaded, features), "the saved model, with the adapters in its weights, is another")
    lora.remove()
    if set(encoder.model.state_dict()) != names:
        raise Failed("with the adapters merged for good the model has other weights than before", _LAYERS)
    if load_file(folder / LORA_FILE).keys() != matrices.keys():
        raise Failed(f"{LORA_FILE} does not hold the adapters", _LAYERS)
    count = sum(tensor.numel() for tensor in matrices.values())
    return f"{count:,} numbers in adapters, merged and saved without a difference"


_LAYERS = "call the layers of the backbone as they are; do not compute with a layer's `weight`, or hold it elsewhere"


def _same(wanted: Embeddings, found: Embeddings, what: str) -> None:
    off, head = difference(wanted, found)
    if not off <= MERGED_TOLERANCE:
        raise Failed(f"{what}: by {off:.3g} in head '{head}' (at most {MERGED_TOLERANCE:g})", _LAYERS)


def _backward(subject: Subject, encoder: Encoder, module: Trainable, arguments: LossArguments) -> float:
    loss = subject.loss(encoder, module(subject.sides(encoder)), arguments)
    if not loss.requires_grad:
        raise Failed(
            "the loss has no gradient at all", "compute nothing under no_grad or detached in 'encode' and 'loss'"
        )
    loss.backward()
    return loss.item()


def _take_gradients(module: Trainable) -> Tensor:
    parts = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters() if p.requires_grad
    ]
    module.zero_grad()
    return torch.cat(parts).double()
