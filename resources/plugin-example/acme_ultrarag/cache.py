"""An extension that keeps the encodings of every adapter on disk, so that a text is encoded once per model.

Off unless ACME_CACHE names a directory. It is used where no gradient is wanted and the model is in evaluation mode. An
entry is found by content alone: the model's fingerprint, the text's tokens, the heads, and the precision.
"""

import hashlib
import json
import os
import zipfile
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ultrarag import Embeddings, Sparse, hookimpl

_NAMES = ("dense", "ids", "weights", "colbert", "mask", "scores")


class DiskCache:
    def __init__(self):
        self._identities = WeakKeyDictionary()

    @hookimpl(wrapper=True)
    def encode(self, model, features):
        if not os.environ.get("ACME_CACHE") or torch.is_grad_enabled() or model.training:
            return (yield)
        keys = self._keys(model, features)
        known = {row: found for row, key in enumerate(keys) if (found := _read(key)) is not None}
        missing = [row for row in range(len(keys)) if row not in known]
        # A wrapper cannot leave the adapter out, but it can hand it less: the rows that are new, or one token.
        whole = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
        features.update(_part(whole, missing) if missing else {name: value[:1, :1] for name, value in whole.items()})
        if not missing:
            features["attention_mask"] = torch.ones_like(features["attention_mask"])
        try:
            new = yield
        finally:
            features.update(whole)
        for number, row in enumerate(missing):
            known[row] = new[number : number + 1]
            _write(keys[row], known[row])
        device = features["input_ids"].device
        return Embeddings.cat([_like(known[row], new, device) for row in range(len(keys))])

    def _keys(self, model, features):
        """One file per row, in a folder per model."""
        folder = Path(os.environ["ACME_CACHE"]) / self._identity(model)
        device = features["input_ids"].device.type
        precision = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "fp32"
        asked = json.dumps([list(features.get("heads", ())), features.get("kind"), precision])
        return [folder / f"{hashlib.sha256((asked + tokens).encode()).hexdigest()}.npz" for tokens in _tokens(features)]

    def _identity(self, model):
        """The model's fingerprint, computed anew when a weight changed (its sum and version are quick to compare)."""
        from ultrarag.checkpoint.manifest import fingerprint
        from ultrarag.types import EncoderSettings

        settings = getattr(model, "settings", None) or EncoderSettings()
        tensors = model.state_dict().values()
        state = [repr(settings), [(t.data_ptr(), t._version, float(t.sum(dtype=torch.float64))) for t in tensors]]
        if self._identities.get(model, (None, ""))[0] != state:
            self._identities[model] = (state, fingerprint(model, type(model).__qualname__, settings))
        return self._identities[model][1][:32]


def _tokens(features):
    """Each row's tokens without padding, as text."""
    mask = features["attention_mask"].bool()
    names = [name for name in ("input_ids", "token_type_ids") if name in features]
    return [json.dumps([features[name][row][mask[row]].tolist() for name in names]) for row in range(len(mask))]


def _part(whole, rows):
    """Some rows, without the columns that only the others needed."""
    used = whole["attention_mask"][rows].any(0)
    return {name: value[rows][:, used] for name, value in whole.items()}


def _read(path):
    """The row in a file; None where there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    sparse = Sparse(found.pop("ids"), found.pop("weights")) if "ids" in found else None
    return Embeddings(sparse=sparse, **found)


def _write(path, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    sparse = row.sparse
    values = (row.dense, sparse and sparse.ids, sparse and sparse.weights, row.colbert, row.mask, row.scores)
    held = {name: value.cpu() for name, value in zip(_NAMES, values, strict=True) if value is not None}
    held = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in held.items()}
    stage = path.with_name(f"{path.name}.{os.getpid()}.tmp.npz")
    np.savez(stage, **{name: value.numpy() for name, value in held.items()})
    os.replace(stage, path)  # a reader sees a whole file or none


def _like(row, new, device):
    """The row on the device, in the dtypes of the model's own answer."""
    dtypes = iter([array.dtype for array in new.arrays()])
    return row.map(lambda array: array.to(device=device, dtype=next(dtypes)))


extension = DiskCache()
