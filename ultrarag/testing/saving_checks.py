"""Checks on checkpoints: what is saved is what is loaded, here and elsewhere, and has one identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ultrarag.encoder import Encoder, render
from ultrarag.errors import UltraragError
from ultrarag.hookspecs import LoadOptions
from ultrarag.io import quiet_progress
from ultrarag.testing.subject import Failed, NotApplicable, Subject, difference
from ultrarag.testing.vector_checks import TOLERANCE
from ultrarag.types import Embeddings

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
            render(encoder.settings, texts, "passage"), prompt="", convert_to_numpy=True, show_progress_bar=False
        )
    ours = encoder.encode(texts, "passage", heads=("dense",), progress=False).dense
    return ours, np.asarray(theirs)


def _scores(subject: Subject, encoder: Encoder, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    architecture = next(iter(getattr(encoder.model.config, "architectures", None) or [""]))
    if not architecture.endswith("ForSequenceClassification"):
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
    from ultrarag.checkpoint import fingerprint

    return fingerprint(encoder.model, encoder.adapter.name, encoder.settings)


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
