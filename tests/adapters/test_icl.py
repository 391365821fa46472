"""icl: a causal decoder whose vector is its end token's hidden state, with an instruction before the query."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ultrarag import Encoder
from ultrarag.errors import CheckpointError
from ultrarag.finetune import finetune

TEXTS = ["a", "seals sleep under water", "what is a vector database? " * 2, "the quick brown fox", ""]
ROWS = [
    {
        "query": f"question {i}",
        "pos": [f"the answer to number {i}"],
        "neg": [f"something else {i + 3}"],
        "prompt": "Given a question, find its answer." if i % 2 else "Find another number.",
    }
    for i in range(8)
]


def tiny_tokenizer(ends: bool, special: tuple[str, ...] = ()):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *special])}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = "<s> $A </s>" if ends else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)] if ends else [("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        padding_side="left",
        additional_special_tokens=list(special),
    )


def make(folder: Path, ends: bool = False, special: tuple[str, ...] = ()) -> Path:
    from transformers import MistralConfig, MistralModel

    tokenizer = tiny_tokenizer(ends, special)
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=2,
    )
    MistralModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("icl"))


def load(folder: Path, **options) -> Encoder:
    return Encoder.load(folder, adapter="icl", device="cpu", **options)


def last_hidden(encoder: Encoder, text: str, ids: list[int] | None = None) -> np.ndarray:
    """The end token's hidden state of one text without padding, by the backbone alone."""
    ids = ids or [1, *encoder.tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    with torch.no_grad():
        hidden = encoder.model.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return (hidden / hidden.norm()).numpy()


@pytest.mark.parametrize("side", ["left", "right"])
def test_vector_is_the_end_tokens_hidden_state(folder, side):
    encoder = load(folder)
    encoder.tokenizer.padding_side = side
    wanted = np.stack([last_hidden(encoder, text) for text in TEXTS])
    assert np.abs(encoder.encode(TEXTS).dense - wanted).max() < 1e-5
    for row, text in enumerate(TEXTS):
        assert np.abs(encoder.encode([text]).dense[0] - wanted[row]).max() < 1e-5


def test_attention_is_causal(folder):
    encoder = load(folder)
    ids = torch.tensor([[1, 10, 11, 12, 2], [1, 10, 11, 50, 2]])
    features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    from ultrarag.packing import hidden_states

    with torch.no_grad():
        hidden = hidden_states(encoder.model.backbone, features)
    assert torch.allclose(hidden[0, :3], hidden[1, :3], atol=1e-6)
    assert not torch.allclose(hidden[0, 4], hidden[1, 4], atol=1e-3)


def test_end_token_stays_when_a_text_is_cut(folder):
    encoder = load(folder)
    ids = encoder.tokenize(["the quick brown fox jumps"], "passage", max_length=8).ids[0]
    assert len(ids) == 8
    assert ids[0] == 1
    assert ids[-1] == 2
    assert (
        np.abs(encoder.encode(["the quick brown fox"], max_length=8).dense[0] - last_hidden(encoder, "", ids)).max()
        < 1e-5
    )


def test_tokenizer_that_ends_its_texts_gets_no_second_end(tmp_path):
    encoder = load(make(tmp_path, ends=True))
    assert encoder.tokenizer("ab")["input_ids"].count(2) == 1


def test_end_token_by_the_flags_that_a_tokenizer_was_saved_with(tmp_path):
    folder = make(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": True, "add_eos_token": False}))
    encoder = load(folder)
    ids = encoder.tokenizer("ab")["input_ids"]
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 4)
    assert Encoder.load(encoder.save(tmp_path / "saved")).tokenizer("ab")["input_ids"] == ids


def test_end_token_after_any_post_processor(tmp_path):
    from tokenizers import Tokenizer, processors

    folder = make(tmp_path)
    byte_level = processors.ByteLevel(trim_offsets=False)
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for processor, first in ((byte_level, []), (processors.Sequence([byte_level, template]), [1])):
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.post_processor = processor
        backend.save(str(folder / "tokenizer.json"))
        ids = load(folder).tokenizer("ab")["input_ids"]
        assert ids == [*first, *load(folder).tokenizer("ab", add_special_tokens=False)["input_ids"], 2]


def test_tokenizer_without_end_token_is_refused(tmp_path):
    path = make(tmp_path) / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "eos_token": None, "pad_token": "<unk>"}))
    with pytest.raises(CheckpointError, match="the tokenizer has no end token"):
        load(tmp_path)


def test_query_formats(folder, tmp_path):
    e5 = load(folder, query_instruction="Find it.")
    assert e5.settings.render("why?", "query") == "Instruct: Find it.\nQuery: why?"
    assert e5.settings.render("why?", "passage") == "why?"
    assert e5.settings.render("why?", "query", "Other.") == "Instruct: Other.\nQuery: why?"
    bge = load(make(tmp_path, special=("<instruct>", "<query>", "<response>")), query_instruction="Find it.")
    assert bge.settings.render("why?", "query") == "<instruct>Find it.\n<query>why?\n<response>"


def test_declared_prompt_becomes_the_instruction(tmp_path):
    from ultrarag.adapters.sentence_transformers_files import write_declaration
    from ultrarag.types import EncoderSettings

    folder = make(tmp_path)
    declared = EncoderSettings(pooling="last_token", normalize=True, query_instruction="Instruct: Find it.\nQuery: ")
    write_declaration(folder, declared, 32)
    encoder = load(folder)
    assert encoder.settings.query_instruction == "Find it."
    assert encoder.settings.render("why?", "query", "Other.") == "Instruct: Other.\nQuery: why?"


def test_saved_model_is_the_same_here_and_in_sentence_transformers(folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder = load(folder, query_instruction="Find it.")
    path = encoder.save(tmp_path / "saved")
    again = Encoder.load(path, device="cpu")
    assert again.fingerprint == encoder.fingerprint
    assert again.settings == encoder.settings
    assert np.abs(again.encode(TEXTS).dense - encoder.encode(TEXTS).dense).max() < 1e-6
    theirs = SentenceTransformer(str(path), device="cpu")
    assert np.abs(theirs.encode(TEXTS) - encoder.encode(TEXTS).dense).max() < 1e-5
    queries = theirs.encode(TEXTS, prompt_name="query")
    assert np.abs(queries - encoder.encode(TEXTS, "query").dense).max() < 1e-5


def test_fine_tuning_with_an_instruction_per_row(folder, tmp_path):
    result = finetune(
        str(folder),
        ROWS,
        output_dir=str(tmp_path / "out"),
        adapter="icl",
        learning_rate=1e-3,
        max_steps=3,
        train_group_size=2,
        query_max_len=96,
        passage_max_len=64,
        report_to="none",
        use_cpu=True,
    )
    before, after = load(folder), Encoder.load(result.checkpoint, device="cpu")
    assert after.fingerprint == result.fingerprint
    start = dict(before.model.named_parameters())
    assert [name for name, tensor in after.model.named_parameters() if torch.equal(tensor, start[name])] == []
