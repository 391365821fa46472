"""Write tests/fixtures/peer: what FlagEmbedding's own classes compute with a tiny random model (see README.md).

    .peer/bin/python benchmarks/peer/make_fixture.py [folder]

model/          XLM-RoBERTa, hidden 32, 2 layers, dropout 0, float32 weights, with its own tokenizer and bge-m3's heads
losses.json     `batches`: the texts; `cases`: configuration -> loss, gradient norms, scores, in float32 and float64
inputs.npz      batch/<name>/{q,p}/{input_ids,attention_mask}
inference.json  BGEM3FlagModel on all texts: lexical weights, and scores of every text with every text
inference.npz   <run>/dense, <run>/colbert/<text>
"""

import copy
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from FlagEmbedding import BGEM3FlagModel
from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel
from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model
from tiny_model import make_model
from transformers import AutoModel, AutoTokenizer

QUERIES = [
    "Why does bread need a hot oven?",
    "How long do seals sleep under water?",
    "怎样防止自行车链条生锈？",
    "梅雨季节一般从几月开始？",
]
#: two candidates per query, the right one first
PASSAGES = [
    "A hot oven turns the water in the dough into steam at once, so the bread rises before its crust sets.",
    "Bread that was baked yesterday makes the better toast, and stale slices thicken a soup.",
    "Seals sleep for minutes at a time while they sink slowly, and wake in time to swim up for air.",
    "Sea lions haul out on the rocks to sleep in the sun.",
    "骑车淋雨以后先擦干链条，再滴一点润滑油，就不容易生锈。",
    "自行车的座位应当调到与髋部同高，膝盖才不会疼。",
    "长江中下游的梅雨一般在六月中旬开始，七月上旬结束。",
    "梅子在雨季成熟，可以泡酒，也可以做酱。",
]
TEACHER_SCORES = [2.5, -1.0, 3.25, 0.5, 1.75, 1.5, 4.0, -2.25]
#: with the text that has no known token, and one that is cut at max_length
INFERENCE_TEXTS = [*QUERIES, *PASSAGES[:6:2], "☃"]
#: whole gradients are kept of these parameters
WATCHED = ("encoder.layer.0.attention.self.query.bias", "embeddings.LayerNorm.bias")

M3 = {
    "temperature": 0.02,
    "kd_loss_type": "m3_kd_loss",
    "pooling": "cls",
    "normalize": True,
    "unified": True,
    "self_distill": False,
    "self_distill_start_step": -1,
    "step": 0,
    "teacher": False,
    "no_in_batch_neg": False,
}
BASE = {
    "temperature": 0.02,
    "kd_loss_type": "kl_div",
    "pooling": "cls",
    "normalize": True,
    "teacher": False,
    "no_in_batch_neg": False,
    "mrl_dims": [],
}
#: name -> kind, batch, what differs from M3 or BASE
CASES = {
    "m3_dense": ("m3", "b4g2", {"unified": False}),
    "m3_unified_b4g1": ("m3", "b4g1", {}),
    "m3_unified_b4g2": ("m3", "b4g2", {}),
    "m3_unified_t1": ("m3", "b4g2", {"temperature": 1.0}),
    "m3_unified_selfdistill": ("m3", "b4g2", {"self_distill": True}),
    "m3_unified_selfdistill_step0_start0": ("m3", "b4g2", {"self_distill": True, "self_distill_start_step": 0}),
    "m3_dense_noinbatch": ("m3", "b4g2", {"unified": False, "no_in_batch_neg": True}),
    "m3_unified_teacher_m3_kd_loss": ("m3", "b4g2", {"teacher": True}),
    "m3_unified_teacher_kl_div": ("m3", "b4g2", {"teacher": True, "kd_loss_type": "kl_div"}),
    "m3_unified_teacher_m3_kd_loss_selfdistill": ("m3", "b4g2", {"teacher": True, "self_distill": True}),
    "base_b4g1": ("base", "b4g1", {}),
    "base_mean": ("base", "b4g2", {"pooling": "mean"}),
    "base_last_token": ("base", "b4g2", {"pooling": "last_token"}),
    "base_mrl": ("base", "b4g2", {"mrl_dims": [8, 16, 32]}),
    "base_mrl_teacher_kl_div": ("base", "b4g2", {"mrl_dims": [8, 32], "teacher": True}),
    "base_teacher_m3_kd_loss": ("base", "b4g2", {"teacher": True, "kd_loss_type": "m3_kd_loss"}),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model", [*QUERIES, *PASSAGES])
    write_losses(folder)
    write_inference(folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()):,} bytes")


def batches() -> dict[str, dict]:
    settings = {"B": 4, "query_max_len": 24, "passage_max_len": 40, "pad_to_multiple_of": None, "queries": QUERIES}
    return {
        "b4g1": settings | {"G": 1, "passages": PASSAGES[::2], "teacher_scores": TEACHER_SCORES[::2]},
        "b4g2": settings | {"G": 2, "passages": PASSAGES, "teacher_scores": TEACHER_SCORES},
    }


def write_losses(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    features = {name: tokenize(tokenizer, batch) for name, batch in batches().items()}
    cases = [run_case(folder / "model", tokenizer, name, features) for name in CASES]
    arrays = {
        f"batch/{name}/{side}/{key}": value.numpy().astype(np.int32)
        for name, sides in features.items()
        for side, encoded in sides.items()
        for key, value in encoded.items()
    }
    np.savez_compressed(folder / "inputs.npz", **arrays)
    peer = {"peer": f"FlagEmbedding {version('FlagEmbedding')}", "transformers": version("transformers")}
    dump(folder / "losses.json", peer | {"torch": torch.__version__, "batches": batches(), "cases": cases})


def tokenize(tokenizer, batch: dict) -> dict:
    def encode(texts, max_length):
        kept = tokenizer.model_input_names
        encoded = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        return {key: encoded[key] for key in kept}

    return {
        "q": encode(batch["queries"], batch["query_max_len"]),
        "p": encode(batch["passages"], batch["passage_max_len"]),
    }


def run_case(path: Path, tokenizer, name: str, features: dict) -> dict:
    kind, batch, changes = CASES[name]
    config = (M3 if kind == "m3" else BASE) | changes
    case = {"name": name, "kind": kind, "batch": batch, "config": config}
    for key, dtype in (("f32", torch.float32), ("f64", torch.float64)):
        # The peer makes some tensors of Python numbers: they too shall have the precision of the case.
        torch.set_default_dtype(dtype)
        model = (m3_model if kind == "m3" else base_model)(path, tokenizer, config, dtype)
        case[key] = measure(model, features[batch], batches()[batch], config)
    torch.set_default_dtype(torch.float32)
    return case


def m3_model(path: Path, tokenizer, config: dict, dtype: torch.dtype) -> EncoderOnlyEmbedderM3Model:
    parts = {"model": AutoModel.from_pretrained(path, dtype=dtype)}
    for head, outputs in (("colbert_linear", 32), ("sparse_linear", 1)):
        parts[head] = torch.nn.Linear(32, outputs)
        parts[head].load_state_dict(torch.load(path / f"{head}.pt", weights_only=True))
    model = EncoderOnlyEmbedderM3Model(
        parts,
        tokenizer=tokenizer,
        temperature=config["temperature"],
        kd_loss_type=config["kd_loss_type"],
        sentence_pooling_method=config["pooling"],
        normalize_embeddings=config["normalize"],
        unified_finetuning=config["unified"],
        use_self_distill=config["self_distill"],
        self_distill_start_step=config["self_distill_start_step"],
    )
    model.step = config["step"]
    return model.to(dtype).train()


def base_model(path: Path, tokenizer, config: dict, dtype: torch.dtype) -> BiEncoderOnlyEmbedderModel:
    model = BiEncoderOnlyEmbedderModel(
        AutoModel.from_pretrained(path, dtype=dtype),
        tokenizer=tokenizer,
        temperature=config["temperature"],
        kd_loss_type=config["kd_loss_type"],
        use_mrl=bool(config["mrl_dims"]),
        mrl_dims=config["mrl_dims"],
        sentence_pooling_method=config["pooling"],
        normalize_embeddings=config["normalize"],
    )
    return model.to(dtype).train()


def measure(model, features: dict, batch: dict, config: dict) -> dict:
    output = model(
        queries=copy.copy(features["q"]),
        passages=copy.copy(features["p"]),
        teacher_scores=batch["teacher_scores"] if config["teacher"] else None,
        no_in_batch_neg_flag=config["no_in_batch_neg"],
    )
    output.loss.backward()
    result = {"loss": output.loss.item(), "grad_norm": grad_norms(model)}
    if output.loss.dtype == torch.float64:
        gradients = {name: p.grad for name, p in model.model.named_parameters() if name in WATCHED}
        result["grad_watch"] = {name: significant(gradient) for name, gradient in gradients.items()}
        if isinstance(model, EncoderOnlyEmbedderM3Model):
            result["scores"] = scores_of(model, features)
    return result


def grad_norms(model) -> dict[str, float]:
    parts = {"encoder": model.model}
    parts |= {name: head for name in ("sparse_linear", "colbert_linear") if (head := getattr(model, name, None))}
    gradients = {name: [p.grad for p in part.parameters() if p.grad is not None] for name, part in parts.items()}
    return {name: torch.stack([g.norm() for g in found]).norm().item() for name, found in gradients.items() if found}


@torch.no_grad()
def scores_of(model: EncoderOnlyEmbedderM3Model, features: dict) -> dict:
    dense, sparse, colbert = zip(model.encode(features["q"]), model.encode(features["p"]), strict=True)
    scores = {"dense": significant(model.compute_dense_score(*dense))}
    if model.unified_finetuning:
        scores["sparse"] = significant(model.compute_sparse_score(*sparse))
        mask = features["q"]["attention_mask"]
        scores["colbert"] = significant(model.compute_colbert_score(*colbert, q_mask=mask))
    return scores


def significant(tensor: torch.Tensor) -> list:
    return [significant(row) if row.ndim else float(f"{row.item():.12g}") for row in tensor]


def write_inference(folder: Path) -> None:
    peer = BGEM3FlagModel(str(folder / "model"), use_fp16=False, devices="cpu")
    runs, arrays = [], {}
    heads = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
    for name, max_length in (("maxlen16", 16), ("default", 64)):
        output = peer.encode(INFERENCE_TEXTS, batch_size=4, max_length=max_length, **heads)
        weights = [{key: float(weight) for key, weight in row.items()} for row in output["lexical_weights"]]
        runs.append({"name": name, "max_length": max_length, "lexical_weights": weights})
        arrays[f"{name}/dense"] = output["dense_vecs"]
        arrays |= {f"{name}/colbert/{i}": vectors for i, vectors in enumerate(output["colbert_vecs"])}
    np.savez_compressed(folder / "inference.npz", **arrays)
    dump(folder / "inference.json", {"texts": INFERENCE_TEXTS, "runs": runs, **text_scores(peer, output)})


def text_scores(peer: BGEM3FlagModel, output: dict) -> dict:
    weights, vectors = output["lexical_weights"], output["colbert_vecs"]
    pairs = [[query, passage] for query in QUERIES[:3] for passage in PASSAGES[:6:2]]
    combined = peer.compute_score(pairs, max_passage_length=64, weights_for_different_modes=[1.0, 0.3, 1.0])
    return {
        "lexical_matching_score": peer.compute_lexical_matching_score(weights, weights).tolist(),
        "colbert_score": [[float(peer.colbert_score(a, b)) for b in vectors] for a in vectors],
        "compute_score": [{"weights": [1.0, 0.3, 1.0], "pairs": pairs, "max_length": 64, "scores": combined}],
    }


def dump(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    default = Path(__file__).parents[2] / "tests" / "fixtures" / "peer"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
