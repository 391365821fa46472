"""Training under DeepSpeed and FSDP2, which spread or round the weights: what is trained, and the encoder it becomes.

The engine gets a copy of the encoder's model, and the encoder keeps whole weights in float32. They are taken from the
engine whenever the encoder is used: to evaluate, to save, and at the end. So evaluation, checkpoints, fingerprints and
merging are the same code in every mode, and no rank waits in a layer that another rank does not run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ultrarag.encoder import Encoder
from ultrarag.types import Embeddings, Sparse

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

#: What wrappers put into the names of parameters.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


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
