"""Between ranks: Embeddings gathered with their gradient, and weights that DeepSpeed and FSDP2 spread or round.

Gathering makes every rank's passages everybody's negatives. An engine gets a copy of the encoder's model, and the
encoder keeps whole weights in float32; they are taken from the engine whenever the encoder is used: to evaluate, to
save, and at the end. So evaluation, checkpoints, fingerprints and merging are the same code in every mode, and no rank
waits in a layer that another rank does not run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ultrarag.encoder import Encoder
from ultrarag.types import Embeddings, Passage, Sparse, pad_tokens

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

#: What an encoder is given.
_Text = TypeVar("_Text", bound=str | Passage)
#: What wrappers put into the names of parameters.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if world_size() > 1 else 0


def wait() -> None:
    """Let every rank come here."""
    if world_size() > 1:
        dist.barrier()


def gather(embeddings: Embeddings) -> Embeddings:
    """Return all ranks' rows, this rank's first, then the others' in order of rank.

    Token dimensions are padded to the longest of any rank; ranks may hold different numbers of rows. Backward
    adds up what every rank's loss says about this rank's rows: with DDP's averaging of the per-rank gradients,
    that is exactly the gradient of the mean of the per-rank losses.
    """
    if world_size() == 1:
        return embeddings
    shapes = _all_shapes(embeddings)
    rows = [shape[0] for shape in shapes]
    tokens = {name: max(shape[1 + i] for shape in shapes) for i, name in enumerate(("sparse", "colbert"))}
    widened = _widened(embeddings, tokens)
    everyone = iter(_all_own_first(list(widened.arrays()), rows))
    return widened.map(lambda array: next(everyone))


def gather_rows(tensor: Tensor) -> Tensor:
    """Return all ranks' rows of a tensor in the order of `gather`; the other dimensions are the same on all."""
    if world_size() == 1:
        return tensor
    mine = torch.tensor([tensor.shape[0]], device=tensor.device)
    counts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(counts, mine)
    return _own_first(tensor, [int(count) for count in counts])


def encode_by_ranks(texts: Sequence[_Text], encode: Callable[[list[_Text]], Embeddings]) -> Embeddings:
    """Encode texts, each rank its share, into numpy arrays that every rank has, in the order given."""
    mine = encode(list(texts[rank() :: world_size()]))
    if world_size() == 1:
        return mine
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, mine)
    order = np.argsort(np.concatenate([np.arange(r, len(texts), world_size()) for r in range(world_size())]))
    return Embeddings.cat(parts)[order]


def mean_weight(queries: int, device: torch.device) -> float:
    """What this rank's mean loss counts for, so that the ranks' average is the mean over all queries.

    1 where every rank has the same number of queries, which is every batch but an uneven last one.
    """
    if world_size() == 1:
        return 1.0
    count = torch.tensor([queries], dtype=torch.float64, device=device)
    dist.all_reduce(count)
    return queries * world_size() / count.item()


def most(number: int) -> int:
    """The largest of the ranks' numbers."""
    return _agreed(number, dist.ReduceOp.MAX)


def least(number: int) -> int:
    """The smallest of the ranks' numbers."""
    return _agreed(number, dist.ReduceOp.MIN)


def _agreed(number: int, operation: Any) -> int:
    if world_size() == 1:
        return number
    found = torch.tensor([number], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, op=operation)
    return int(found)


def _all_shapes(embeddings: Embeddings) -> list[list[int]]:
    """(rows, sparse tokens, ColBERT tokens) of every rank."""
    first = next(embeddings.arrays())
    sparse = 0 if embeddings.sparse is None else embeddings.sparse.ids.shape[1]
    colbert = 0 if embeddings.colbert is None else embeddings.colbert.shape[1]
    mine = torch.tensor([len(embeddings), sparse, colbert], device=first.device)
    shapes = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(shapes, mine)
    return [shape.tolist() for shape in shapes]


def _widened(embeddings: Embeddings, tokens: dict[str, int]) -> Embeddings:
    sparse = embeddings.sparse
    if sparse is not None:
        sparse = Sparse(
            pad_tokens(sparse.ids, tokens["sparse"], Sparse.PAD_ID), pad_tokens(sparse.weights, tokens["sparse"], 0)
        )
    colbert, mask = embeddings.colbert, embeddings.mask
    if colbert is not None:
        colbert, mask = pad_tokens(colbert, tokens["colbert"], 0), pad_tokens(mask, tokens["colbert"], 0)
    return Embeddings(embeddings.dense, sparse, colbert, mask, embeddings.scores)


def _all_own_first(arrays: list[Tensor], rows: list[int]) -> list[Tensor]:
    """`_own_first` of each array, those of one dtype in one exchange: few large messages instead of many small ones."""
    found: list[Tensor | None] = [None] * len(arrays)
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        places = [place for place, array in enumerate(arrays) if array.dtype == dtype]
        flat = [arrays[place].flatten(1) if arrays[place].ndim > 1 else arrays[place][:, None] for place in places]
        parts = _own_first(torch.cat(flat, dim=1), rows).split([part.shape[1] for part in flat], dim=1)
        for place, part in zip(places, parts, strict=True):
            found[place] = part.reshape(part.shape[0], *arrays[place].shape[1:])
    return [array for array in found if array is not None]


def _own_first(array: Tensor, rows: list[int]) -> Tensor:
    longest = max(rows)
    if array.shape[0] < longest:
        array = torch.cat([array, array.new_zeros(longest - array.shape[0], *array.shape[1:])])
    everyone: Tensor = _AllGather.apply(array.contiguous())  # (ranks, longest, ...)
    order = [rank(), *(other for other in range(world_size()) if other != rank())]
    return torch.cat([everyone[number, : rows[number]] for number in order])


class _AllGather(torch.autograd.Function):
    """All ranks' tensors, stacked; backward gives each rank the sum of all ranks' gradients for its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        if dist.get_backend() == "nccl":
            own = torch.empty_like(total[0])
            dist.reduce_scatter_tensor(own, total)
            return own
        dist.all_reduce(total)
        return total[rank()]


# ---- weights that an engine has


class Weights:
    """The weights under training, and the encoder's own, which are the same object where no engine changes them."""

    def __init__(self, encoder: Encoder, engine: bool) -> None:
        """Prepare an encoder for training.

        Args:
            engine: DeepSpeed or FSDP2 trains: give it a copy, made in the host's memory.
        """
        self.encoder, self.engine = encoder, engine
        self.model = encoder.model
        if engine:
            encoder.model.to("cpu")
            self.model = copy.deepcopy(encoder.model)
            show_embeddings_to_engines()
        self._final = not engine

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Give the encoder the weights as they are now; every rank must take part."""
        if self._final:
            yield
            return
        self._copy()
        try:
            yield
        finally:
            self.encoder.model.to("cpu")

    def finish(self) -> None:
        """Training is over: the encoder has its result from now on."""
        if not self._final:
            self._copy()
        self.keep()

    def keep(self) -> None:
        """The encoder has the weights that are wanted: nothing is taken from the engine any more."""
        self.encoder.model.to(self.encoder.device)
        self._final = True

    def _copy(self) -> None:
        copy_whole(self.model, self.encoder.model)
        self.encoder.model.to(self.encoder.device)


def uses_engine(training: TrainingArguments) -> bool:
    """Whether DeepSpeed or FSDP trains."""
    return bool(training.deepspeed or training.fsdp)


def copy_whole(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers into a plain module, each put together from its shards; every rank must take part."""
    parameters, buffers = dict(target.named_parameters()), dict(target.named_buffers())
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            parameters[_plain(name)].copy_(whole_tensor(parameter))
        for name, buffer in source.named_buffers():
            buffers[_plain(name)].copy_(buffer)


def whole_tensor(parameter: nn.Parameter) -> Tensor:
    """A parameter of any engine, whole, and in float32 where the engine has it so."""
    tensor: Any = parameter
    if hasattr(tensor, "full_tensor"):  # FSDP2
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):  # ZeRO-3
        return _master(parameter) if parameter.requires_grad else _gathered(parameter)
    if parameter.dtype != torch.float32 and hasattr(tensor, "_hp_mapping"):  # ZeRO-1 and 2 in half precision
        return _master(parameter)
    return parameter.detach()


def _master(parameter: nn.Parameter) -> Tensor:
    """What the optimizer steps on: a small step may be lost in the half precision of the weights themselves."""
    from deepspeed.utils import safe_get_full_fp32_param

    found: Tensor = safe_get_full_fp32_param(parameter)
    return found


def _gathered(parameter: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def load_sharded(trainable: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a model's whole state dict, every tensor of it, into the Trainable that FSDP2 has sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    whole: dict[str, Any] = {f"model.{name}": tensor for name, tensor in weights.items()}
    set_model_state_dict(trainable, whole, options=StateDictOptions(full_state_dict=True, strict=True))


def load_models_whole() -> None:
    """Keep transformers from sharding every model that it loads under ZeRO-3; the engine shards the trained one."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def fsdp_on_cpu(trainer: Trainer) -> None:
    """Switch FSDP2 on where accelerate 1.15 would take DDP in its place without a word: between processes on CPUs."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin, state = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args), trainer.accelerator.state
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    trainer.is_fsdp_enabled = True


def layer_classes(model: nn.Module) -> list[str]:
    """The classes of a model's repeated layers, which FSDP shards and gathers one by one."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return sorted({type(layer).__name__ for found in lists for layer in found if any(True for _ in layer.children())})


def show_embeddings_to_engines() -> None:
    """Let FSDP2 find the tensors in `Embeddings`: its backward begins at the outputs that it has seen."""
    for kind in (Embeddings, Sparse):
        if kind not in pytree.SUPPORTED_NODES:
            pytree.register_dataclass(kind)
