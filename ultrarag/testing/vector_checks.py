"""Checks on what `encode` gives, and that saving and loading changes none of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultrarag.encoder import Encoder, render
from ultrarag.errors import UltraragError
from ultrarag.hookspecs import LoadOptions
from ultrarag.io import quiet_progress
from ultrarag.testing.subject import Failed, NotApplicable, Subject, difference
from ultrarag.testing.tiny import TEXTS
from ultrarag.types import Embeddings, Sparse

#: Largest difference of a component between two ways of encoding one text.
TOLERANCE = 1e-5
#: Largest difference between two runs of the same batch; 0 on a CPU.
SAME = 1e-6
#: Tokens of the over-long text where the model declares no limit.
LONG = 2048


def check_load(subject: Subject) -> str:
    """The model is what ultrarag relies on: float32, with a tokenizer that pads."""
    encoder = subject.encoder
    odd = [name for name, p in encoder.model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32]
    if odd:
        raise Failed(f"the weight '{odd[0]}' is not float32", "load in float32; precision is chosen by the caller")
    if encoder.tokenizer.pad_token_id is None:
        raise Failed("the tokenizer has no padding token", "give it one in 'load', such as its eos token")
    unknown = [head for head in encoder.heads if head not in encoder.adapter.declared.heads]
    if unknown:
        raise Failed(
            f"the model says it has the head '{unknown[0]}', which the adapter does not declare",
            "name every head that a model can have in the adapter's `heads`",
        )
    count = sum(p.numel() for p in encoder.model.parameters())
    return f"{type(encoder.model).__name__}, {count:,} parameters, heads {', '.join(encoder.heads)}"


def check_shapes(subject: Subject) -> str:
    """Every head has the shape and dtype that `Embeddings` documents, and only the heads asked for are there."""
    encoder = subject.encoder
    features = subject.features(encoder, subject.rows)
    everything = subject.embed(encoder, features)
    if everything.heads != encoder.heads:
        raise Failed(
            f"'encode' gave the heads {everything.heads} of a model with {encoder.heads}",
            "compute all heads of the model where features has no 'heads', and set model.settings.heads in 'load'",
        )
    for head in encoder.heads:
        alone = subject.embed(encoder, features, (head,))
        if alone.heads != (head,):
            raise Failed(f"asked for '{head}' alone, 'encode' gave {alone.heads}", "obey features['heads']")
        _check_head(alone, head, len(subject.rows))
        if encoder.settings.normalize and head == "dense":
            _check_unit_length(alone.dense)
    return ", ".join(f"{head} {_shape(everything, head)}" for head in encoder.heads)


def _check_head(embeddings: Embeddings, head: str, rows: int) -> None:
    for array in embeddings.arrays():
        if not isinstance(array, Tensor) or array.shape[0] != rows:
            raise Failed(f"head '{head}' holds {_describe(array)} for {rows} texts", "return one row per text")
        if array.is_floating_point() and not bool(torch.isfinite(array).all()):
            raise Failed(f"head '{head}' holds values that are not finite", "look for a division by zero, or a log")
    if head == "sparse":
        assert embeddings.sparse is not None
        _check_sparse(embeddings.sparse)
    elif head == "colbert":
        _check_colbert(embeddings.colbert, embeddings.mask)
    else:
        array = getattr(embeddings, head)
        wanted = 1 if head == "scores" else 2
        if array.ndim != wanted or not array.is_floating_point():
            raise Failed(
                f"head '{head}' is {_describe(array)}",
                f"return floats of {'(batch,)' if wanted == 1 else '(batch, dim)'}",
            )


def _check_sparse(sparse: Sparse) -> None:
    ids, weights = sparse.ids, sparse.weights
    remedy = "return ids and weights of (batch, tokens): distinct ids ascending, then Sparse.PAD_ID with weight 0"
    if ids.shape != weights.shape or ids.ndim != 2 or ids.dtype != torch.int64 or not weights.is_floating_point():
        raise Failed(f"head 'sparse' has ids {_describe(ids)} and weights {_describe(weights)}", remedy)
    real = ids >= 0
    both = real[:, 1:]
    if bool((both & ~real[:, :-1]).any()) or bool(((ids[:, 1:] <= ids[:, :-1]) & both).any()):
        raise Failed("head 'sparse' has ids that are not ascending, repeat, or follow padding", remedy)
    if bool((weights[~real] != 0).any()):
        raise Failed("head 'sparse' gives padding a weight", remedy)
    if bool((weights < 0).any()):
        raise Failed("head 'sparse' has negative weights, which no index stores", "apply ReLU or softplus")


def _check_colbert(vectors: Tensor, mask: Tensor | None) -> None:
    if mask is None or vectors.ndim != 3 or mask.shape != vectors.shape[:2]:
        found = f"{_describe(vectors)} with the mask {_describe(mask)}"
        raise Failed(f"head 'colbert' is {found}", "return (batch, tokens, dim) and a mask of (batch, tokens)")
    if bool((vectors[~mask.bool()] != 0).any()):
        raise Failed("head 'colbert' is not zero at padding", "multiply by the mask before normalising")


def _check_unit_length(dense: Tensor) -> None:
    off = float((dense.norm(dim=-1) - 1).abs().max())
    if off > 1e-3:
        raise Failed(
            f"settings.normalize is true, and a dense vector's length is off by {off:.3g}",
            "normalise in 'encode', or set model.settings.normalize to False",
        )


def check_determinism(subject: Subject) -> str:
    """The same batch gives the same vectors twice."""
    features = subject.features(subject.encoder, subject.rows)
    first, second = (subject.embed(subject.encoder, features) for _ in range(2))
    return _agree(
        difference(first, second),
        "the same batch encoded twice differs",
        "leave dropout and sampling to training mode (self.training)",
        SAME,
    )


def check_batch_invariance(subject: Subject) -> str:
    """A text's vector is the same alone, among others, and in another order."""
    encoder, rows = subject.encoder, subject.rows
    together = subject.embed(encoder, subject.features(encoder, rows))
    reversed_ = subject.embed(encoder, subject.features(encoder, rows[::-1]))
    order = np.arange(len(rows))[::-1].copy()
    found = [difference(together, reversed_[order])]
    for number, row in enumerate(rows):
        alone = subject.embed(encoder, subject.features(encoder, [row]))
        found.append(difference(together[number : number + 1], alone))
    return _agree(
        max(found),
        "a text alone and among others differs",
        "use features['attention_mask'] in attention and pooling, and let no row see another",
    )


def check_padding(subject: Subject) -> str:
    """Padding at the tokenizer's side changes nothing, however much of it there is."""
    encoder, rows = subject.encoder, subject.rows
    own = encoder.tokenizer.padding_side
    other = "left" if own == "right" else "right"
    plain = subject.embed(encoder, subject.features(encoder, rows))
    plain_width = subject.features(encoder, rows)["input_ids"].shape[1]
    width = plain_width + 3 if encoder.limit is None else min(plain_width + 3, encoder.limit)
    _agree(
        difference(plain, subject.embed(encoder, subject.features(encoder, rows, own, width))),
        f"{width - plain_width} more columns of padding on the {own} change a vector",
        "find the first and last token by features['attention_mask'], and count positions from the first",
    )
    off, _ = difference(plain, subject.embed(encoder, subject.features(encoder, rows, other, width)))
    if off <= TOLERANCE:
        return "left and right, as much as you like"
    return f"holds on the {own}, the tokenizer's side; on the {other} vectors differ by {off:.2g}: keep padding_side"


def check_odd_texts(subject: Subject) -> str:
    """Empty texts have finite vectors, and over-long ones are cut to the model's length."""
    encoder = subject.encoder
    limit = encoder.max_length("passage")
    words = " ".join([*TEXTS] * (1 + (limit or LONG) // 40))
    empty, long = (("", ""), (TEXTS[0], words)) if subject.pairs else ("", words)
    for text, what in ((empty, "the empty text"), (long, "an over-long text")):
        tokens = subject.tokens(encoder, [text])
        if limit is not None and len(tokens.ids[0]) > limit:
            raise Failed(f"{what} became {len(tokens.ids[0])} tokens of at most {limit}", "cut texts to the limit")
        try:
            found = subject.embed(encoder, subject.features(encoder, [text]))
        except (IndexError, RuntimeError) as error:
            raise Failed(
                f"{what} ({len(tokens.ids[0])} tokens) stops 'encode': {type(error).__name__}: {error}",
                "declare the limit as config.max_position_embeddings, tokenizer.model_max_length or "
                "settings.passage_max_length",
            ) from error
        if not all(bool(torch.isfinite(array).all()) for array in found.arrays()):
            raise Failed(f"{what} gives values that are not finite", "guard the division by the number of tokens")
    return f"empty, and {len(tokens.ids[0])} tokens ({f'cut at {limit}' if limit else 'no limit declared'})"


def _agree(found: tuple[float, str], what: str, remedy: str, tolerance: float = TOLERANCE) -> str:
    """Raise Failed when a difference is above the tolerance, else say how large it is."""
    value, head = found
    if not value <= tolerance:
        raise Failed(f"{what} by {value:.3g} in head '{head}' (at most {tolerance:g})", remedy)
    return f"largest difference {value:.2g}"


def _describe(array: object) -> str:
    if not isinstance(array, Tensor):
        return type(array).__name__
    return f"{str(array.dtype).removeprefix('torch.')} of {tuple(array.shape)}"


def _shape(embeddings: Embeddings, head: str) -> tuple[int, ...]:
    array = embeddings.sparse.ids if embeddings.sparse and head == "sparse" else getattr(embeddings, head)
    return tuple(array.shape)


_REMEDY = "write everything that 'encode' depends on in 'save', out of `state_dict`, and read it in 'load'"


def check_save(subject: Subject) -> str:
    """`save` writes the weights that it is given, and `load` brings all of them back."""
    encoder = subject.fresh()
    original = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    _disturb(encoder)
    changed = {name: tensor.detach().clone() for name, tensor in encoder.model.state_dict().items()}
    wanted, identity = _vectors(subject, encoder), content_fingerprint(encoder)
    encoder.model.load_state_dict(original)  # a sharded run gathers its weights: the model does not hold them
    folder = subject.scratch / "given weights"
    folder.mkdir()
    with quiet_progress():
        encoder.adapter.save(encoder.model, str(folder), changed)
    loaded = subject.fresh(folder, _as_loaded(encoder))
    value, head = difference(wanted, _vectors(subject, loaded))
    if not value <= TOLERANCE:
        raise Failed(f"after saving and loading, head '{head}' differs by {value:.3g} (at most {TOLERANCE:g})", _REMEDY)
    loaded.settings = encoder.settings  # prompts and lengths come back with the manifest: see `check_publish`
    if content_fingerprint(loaded) != identity:
        raise Failed("after saving and loading, the vectors agree but the fingerprint is another", _fingerprint_remedy)
    return f"changed weights come back: largest difference {value:.2g}, same fingerprint"


def check_publish(subject: Subject) -> str:
    """A published checkpoint names its adapter, and loads as the same model."""
    encoder = subject.fresh()
    _disturb(encoder)
    wanted = _vectors(subject, encoder)
    try:
        encoder.save(_published(subject))
    except UltraragError as error:
        raise Failed(str(error), _REMEDY) from error
    loaded = Encoder.load(_published(subject), device=subject.device)
    value, head = difference(wanted, _vectors(subject, loaded))
    if not value <= TOLERANCE:
        raise Failed(f"the published checkpoint differs by {value:.3g} in head '{head}'", _REMEDY)
    if loaded.fingerprint != content_fingerprint(encoder):
        raise Failed("the published checkpoint has another fingerprint than the model", _fingerprint_remedy)
    return f"largest difference {value:.2g}, fingerprint {loaded.fingerprint[:12]}"


def check_fingerprint(subject: Subject) -> str:
    """The fingerprint is that of the content: stable over loads, places and use, changed by one weight."""
    encoder = subject.fresh()
    first = content_fingerprint(encoder)
    elsewhere = subject.scratch / "another name"
    elsewhere.symlink_to(subject.path.resolve(), target_is_directory=True)
    if content_fingerprint(subject.fresh(elsewhere)) != first:
        raise Failed(
            "the same files loaded twice have two fingerprints", "draw no random weights in 'load'; use no paths"
        )
    _vectors(subject, encoder)
    if content_fingerprint(encoder) != first:
        raise Failed("encoding changes the fingerprint", "keep what changes in use out of the model's state_dict")
    with torch.no_grad():
        next(p for p in encoder.model.parameters() if p.is_floating_point()).view(-1)[0].add_(1.0)
    if content_fingerprint(encoder) == first:
        raise Failed("changing a weight leaves the fingerprint as it was", "let state_dict() hold every weight")
    return f"{first[:12]}, the same from another folder and after use"


def check_sentence_transformers(subject: Subject) -> str:
    """sentence-transformers gives the same vectors (or, for a cross-encoder, scores) from the saved checkpoint."""
    folder = _published(subject)
    if not folder.is_dir():
        raise NotApplicable("no checkpoint could be saved")
    encoder = Encoder.load(folder, device=subject.device)
    ours, theirs = _scores(subject, encoder, folder) if subject.pairs else _dense(subject, encoder, folder)
    off = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
    off /= max(1.0, float(np.abs(ours).max()))
    if not off <= 10 * TOLERANCE:
        raise Failed(
            f"sentence-transformers gives other {'scores' if subject.pairs else 'vectors'} from the saved folder: "
            f"{theirs.shape} against {ours.shape}, largest difference {off:.3g} (at most {10 * TOLERANCE:g})",
            "let modules.json say the pooling and the normalisation that 'encode' does, or leave the file out",
        )
    return f"same {'scores' if subject.pairs else 'dense vectors'} to {off:.1g}"


def _dense(subject: Subject, encoder: Encoder, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    if "dense" not in encoder.heads:
        raise NotApplicable("the model has no dense head")
    if not (folder / "modules.json").is_file():
        raise NotApplicable("the saved checkpoint has no modules.json")
    from sentence_transformers import SentenceTransformer

    texts: Any = subject.rows
    with quiet_progress():
        model = SentenceTransformer(str(folder), device=subject.device)
        theirs = model.encode(
            render(encoder.settings, texts, "passage"),
            prompt="",
            convert_to_numpy=True,
            show_progress_bar=False,
            normalize_embeddings=bool(encoder.settings.normalize),  # which it undoes where it truncates
        )
    ours = encoder.encode(texts, "passage", heads=("dense",), progress=False).dense
    return ours, np.asarray(theirs)


def _scores(subject: Subject, encoder: Encoder, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    architecture = next(iter(getattr(encoder.model.config, "architectures", None) or [""]))
    if not architecture.endswith("ForSequenceClassification") and not (folder / "modules.json").is_file():
        raise NotApplicable(f"a {architecture or 'model of this kind'} is no CrossEncoder of sentence-transformers")
    from sentence_transformers import CrossEncoder

    pairs: Any = subject.rows
    with quiet_progress():
        model = CrossEncoder(str(folder), device=subject.device)
        theirs = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    features = subject.features(encoder, pairs)
    return subject.embed(encoder, features).numpy().scores, np.asarray(theirs).reshape(-1)


def content_fingerprint(encoder: Encoder) -> str:
    """The identity of the model as it is now (`Encoder.fingerprint` is computed once)."""
    return encoder.identity().fingerprint


_fingerprint_remedy = "bring back every weight and the tokenizer exactly as they were"


def _published(subject: Subject) -> Path:
    return subject.scratch / "published"


def _as_loaded(encoder: Encoder) -> LoadOptions:
    """The options with which a checkpoint of this model is loaded where no manifest says them."""
    settings = encoder.settings
    return LoadOptions(heads=encoder.heads, pooling=settings.pooling, normalize=settings.normalize)


def _vectors(subject: Subject, encoder: Encoder) -> Embeddings:
    return subject.embed(encoder, subject.features(encoder, subject.rows))


def _disturb(encoder: Encoder) -> None:
    """Move every weight a little, so that no original file can pass for what was saved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.add_(noise * 0.02 * (parameter.abs().mean() + 0.01))
