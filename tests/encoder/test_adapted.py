"""A LoRA folder as a model: the base is found and the matrices are merged, or the base is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ultrarag import Encoder
from ultrarag.errors import CheckpointError
from ultrarag.testing.layouts import LAYOUTS, write_layout
from ultrarag.testing.tiny import TEXTS

TEXT = list(TEXTS[:4])
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def adapted(folder: Path, name: str, **options):
    """A base, and beside it the LoRA folder that sentence-transformers saves; the model that was saved."""
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer

    write_layout(folder / "base", LAYOUTS[name])
    model = SentenceTransformer(str(folder / "base"), device="cpu")
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", **options))
    model.save_pretrained(str(folder / "lora"), create_model_card=False)
    return model


@pytest.mark.parametrize(
    ("name", "adapter", "options"),
    [
        ("Qwen3-Embedding", "icl", {}),
        ("e5", "bge", {"use_rslora": True}),
        ("gte-multilingual", "sentence-transformers", {"lora_alpha": 3}),
    ],
)
def test_its_vectors_are_the_librarys(tmp_path, name, adapter, options):
    theirs = adapted(tmp_path, name, **options)
    encoder = Encoder.load(tmp_path / "lora", adapter, device="cpu")
    found = encoder.encode(TEXT, "query").dense
    assert np.abs(found - theirs.encode_query(TEXT)).max() < 1e-5
    base = Encoder.load(tmp_path / "base", adapter, device="cpu")
    assert encoder.model.state_dict().keys() == base.model.state_dict().keys()
    assert np.abs(found - base.encode(TEXT, "query").dense).max() > 0.01
    again = Encoder.load(encoder.save(tmp_path / "saved"), device="cpu")
    assert again.fingerprint == encoder.fingerprint


def test_matrices_of_a_language_model_fit_its_body(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    write_layout(tmp_path / "base", LAYOUTS["Qwen3 without modules.json"])
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    trained.save_pretrained(tmp_path / "lora")
    encoder = Encoder.load(tmp_path / "lora", "bge", device="cpu")
    ids = torch.tensor(encoder.tokenize(TEXT[:1], "passage").ids)
    with torch.no_grad():
        hidden = trained.base_model.model.model(ids).last_hidden_state[0, -1]
    assert np.abs(encoder.encode(TEXT[:1]).dense[0] - (hidden / hidden.norm()).numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (None, "does not say of which model"),
        ("/nowhere/base", "of the model '/nowhere/base', which is not here"),
        ("somebody/model-that-is-not-here", "of the model 'somebody/model-that-is-not-here', which is not here"),
    ],
)
def test_a_base_that_is_not_here_is_named(tmp_path, base, words):
    adapted(tmp_path, "MiniLM")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    with pytest.raises(CheckpointError, match=words):
        Encoder.load(tmp_path / "lora", "bge")


def test_matrices_of_another_model_are_refused(tmp_path):
    adapted(tmp_path, "MiniLM")
    write_layout(tmp_path / "other", LAYOUTS["Qwen3-Embedding"])
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(CheckpointError, match=r"its matrices are not of a Qwen3Model, which has no 'encoder\.layer\.0"):
        Encoder.load(tmp_path / "lora", "bge")
