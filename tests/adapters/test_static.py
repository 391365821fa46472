"""Static embeddings, and EmbeddingGemma 2 as published: what sentence-transformers gives, before and after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ultrarag import Encoder
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.finetune import finetune
from ultrarag.retrieve import LiveIndex
from ultrarag.testing.tiny import TEXTS, tiny_embedding_gemma2, tiny_static

ROWS = [{"query": TEXTS[i], "pos": [TEXTS[i + 1]], "neg": [TEXTS[(i + 3) % 8]]} for i in (0, 2, 4, 6)]
SMALL: dict[str, Any] = {"train_group_size": 2, "per_device_train_batch_size": 2, "num_train_epochs": 1}
SMALL |= {"save_strategy": "no", "report_to": "none", "skip_data_check": True}
#: With a word that nothing knows, a padding token as a word, and nothing at all.
HARD = [*TEXTS, "zzz 𝛼 unknown", "a [PAD] b", ""]


def theirs(folder: Path) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return np.asarray(SentenceTransformer(str(folder), device="cpu").encode(HARD, show_progress_bar=False))


@pytest.mark.parametrize("model2vec", [False, True])
def test_static_embeddings_are_those_of_sentence_transformers(tmp_path: Path, model2vec: bool) -> None:
    tiny_static(tmp_path / "model", model2vec)
    encoder = Encoder.load(tmp_path / "model")
    assert encoder.adapter.name == "static"
    before = encoder.encode(HARD).dense
    assert np.abs(before - theirs(tmp_path / "model")).max() < 1e-5
    normalize = encoder.settings.normalize
    finetune(tmp_path / "model", ROWS, tmp_path / "out", learning_rate=1e-2, normalize_embeddings=normalize, **SMALL)
    trained = Encoder.load(tmp_path / "out")
    after = trained.encode(HARD).dense
    assert np.abs(after - before).max() > 1e-3
    assert np.abs(after - theirs(tmp_path / "out")).max() < 1e-5
    assert (tmp_path / "out" / "config.json").exists() == model2vec  # where model2vec looks for its own
    with LiveIndex.create(tmp_path / "index", trained, backend="numpy") as live:
        live.add([{"id": str(number), "text": text} for number, text in enumerate(TEXTS)])
        assert live.search(TEXTS[3], k=1)[0].id == "3"


def test_static_embeddings_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    tiny_static(tmp_path / "model")
    with pytest.raises(UsageError, match="static embeddings have the mean alone"):
        Encoder.load(tmp_path / "model", options=_pooling("cls"))
    modules = json.loads((tmp_path / "model" / "modules.json").read_text())
    more = [*modules, {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"}]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(more))
    with pytest.raises(CheckpointError, match=r"module sentence_transformers.models.Dense.*with or without Normalize"):
        Encoder.load(tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    from safetensors.torch import save_file

    save_file({"embedding.weight": torch.zeros(3, 4)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match="tokens and the table 3 rows"):
        Encoder.load(tmp_path / "model")


def _pooling(name: str) -> Any:
    from ultrarag.hookspecs import LoadOptions

    return LoadOptions(pooling=name)


def test_embedding_gemma_2_keeps_what_it_was_published_with(tmp_path: Path) -> None:
    from transformers import AutoModel

    published, out = tmp_path / "model", tmp_path / "out"
    tiny_embedding_gemma2(published)
    encoder = Encoder.load(published)
    assert (encoder.adapter.name, encoder.dim) == ("bge", 48)
    assert np.abs(encoder.encode(HARD[:-1]).dense - _text_part(published, tmp_path / "text")).max() < 1e-5
    finetune(published, ROWS, out, learning_rate=1e-3, **SMALL)
    trained = Encoder.load(out).encode(HARD[:-1]).dense
    assert np.abs(trained - encoder.encode(HARD[:-1]).dense).max() > 1e-3
    assert np.abs(trained - _text_part(out, tmp_path / "trained")).max() < 1e-5
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (published / name).read_bytes()
    roots = [AutoModel.from_pretrained(folder) for folder in (published, out)]
    assert np.abs(trained - _mean(roots[1], encoder.tokenizer)).max() < 1e-5
    before, after = (root.state_dict() for root in roots)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("language_model."))


@torch.no_grad()
def _mean(root: Any, tokenizer: Any) -> np.ndarray:
    """The whole model's vectors as its pooling has them."""
    batch = tokenizer(HARD[:-1], padding=True, return_tensors="pt", return_token_type_ids=False)
    mask = batch["attention_mask"][:, :, None]
    mean = (root.eval()(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).numpy()


def _text_part(root: Path, folder: Path) -> np.ndarray:
    """The vectors of sentence-transformers for the text model alone: the whole one needs torchvision there."""
    import shutil

    from transformers import AutoModel

    shutil.copytree(root, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json", "ultrarag.json"))
    for name in ("tokenizer_config.json", "1_Pooling/config.json"):
        shutil.copyfile(root / name, folder / name)
    AutoModel.from_pretrained(root).language_model.save_pretrained(folder)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return np.asarray(model.encode(HARD[:-1], show_progress_bar=False))


def test_lora_has_nothing_to_adapt(tmp_path):
    tiny_static(tmp_path / "static")
    with pytest.raises(UsageError, match="a StaticEmbedder has no linear layer to adapt; leave the flag out"):
        finetune(tmp_path / "static", ROWS, tmp_path / "out", use_lora=True, skip_data_check=True)
