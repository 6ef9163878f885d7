"""Run a training step on fake tensors and count the bytes that it allocates.

The decoder, its activation checkpointing, its adapters, the loss and autograd are the real ones. Fake tensors
(`torch._subclasses.FakeTensorMode`) have shapes, dtypes and strides but no memory, so a step takes a second and needs
no GPU.
"""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from meap_lit.model import Decoder, DecoderConfig, Documents
from meap_lit.model.lora import LoRA, add_lora
from meap_lit.model.recompute import checkpoint_and_compile

_MEASURED_LAYERS = (2, 3)
"""Every further block adds the same. The first may keep less: nothing before the first adapter needs a gradient."""

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a step allocates beside its parameters and their gradients.

    Args:
        forward: At the end of the decoder's forward, without `copies`.
        copies: Casts of weights that autograd keeps for the backward.
        loss: Peak of the forward and the loss.
        blocks: Peak of the backward up to the embedding.
        embedding: Peak of the backward from the embedding on.
    """

    forward: int
    copies: int
    loss: int
    blocks: int
    embedding: int


@cache
def step_bytes(config: DecoderConfig, **options: Any) -> StepBytes:
    """Return what a step of a whole decoder allocates.

    A deep decoder is not run: its bytes follow from those of two shallow ones. The options are those of `run_step`.
    """
    few, more = _MEASURED_LAYERS
    if config.num_layers <= more:
        return run_step(config, **options)
    small, large = (run_step(replace(config, num_layers=number), **options) for number in _MEASURED_LAYERS)
    number = config.num_layers - few
    return StepBytes(*(a + number * (b - a) for a, b in zip(vars(small).values(), vars(large).values())))


def run_step(
    config: DecoderConfig,
    *,
    num_rows: int,
    seq_len: int,
    packed: bool,
    dtype: torch.dtype | None,
    autocast: bool,
    activation_checkpointing: Checkpointing,
    lora: LoRA | None,
    fsdp: bool,
) -> StepBytes:
    """Run forward, loss and backward of one micro-batch on fake tensors.

    Args:
        config: The decoder.
        num_rows: Rows of the micro-batch.
        seq_len: Tokens of a row.
        packed: Attend within documents; a row is one document here, which keeps as much as several.
        dtype: Dtype of all parameters; float32, and the frozen ones as `lora` says, if not given.
        autocast: Multiply in bfloat16 (bf16-mixed).
        activation_checkpointing: As for `DecoderModule`.
        lora: Adapters, if any.
        fsdp: Gradients of embedding, head and final norm are allocated in the backward, as with FSDP2, and live until
            its end; that of a head of its own only until the blocks begin. All others exist before.
    """
    with FakeTensorMode():
        decoder = Decoder(config)
        if lora is not None:
            add_lora(decoder, lora)
        for name, parameter in decoder.named_parameters():
            parameter.data = parameter.data.to(dtype or parameter.dtype)
            if parameter.requires_grad and not (fsdp and "layers." not in name):
                parameter.grad = torch.zeros_like(parameter)
        if fsdp and not config.tie_embeddings and decoder.lm_head.weight.requires_grad:
            decoder.lm_head.weight.register_post_accumulate_grad_hook(lambda head: setattr(head, "grad", None))
        checkpoint_and_compile(decoder, activation_checkpointing, compile=False)
        input_ids = torch.zeros(num_rows, seq_len, dtype=torch.int64)
        position_ids = torch.arange(seq_len).repeat(num_rows, 1) if packed else None
        documents = Documents.of_rows([[seq_len]] * num_rows, seq_len) if packed else None
        parameters = list(decoder.parameters())
        with _CountBytes(parameters) as count:
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                hidden = decoder(input_ids, position_ids, documents)
                forward = count.live - count.casts
                loss = decoder.lm_head.loss(hidden, input_ids)[0] / input_ids.numel()
            del hidden
            copies, loss_peak = count.casts, count.start_phase()
            loss.backward()
            after = count.start_phase()
    blocks, embedding = (count.before_embedding, after) if count.before_embedding else (after, 0)
    return StepBytes(forward, copies, loss_peak, blocks, embedding)


class _CountBytes(TorchDispatchMode):
    """Count the bytes of the storages that operations allocate, each once, until they are freed.

    Args:
        parameters: Not counted, nor are their gradients.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._parameters = {id(p.untyped_storage()): p.untyped_storage() for p in parameters}
        gradients = [p.grad.untyped_storage() for p in parameters if p.grad is not None]
        self._known = weakref.WeakSet([*self._parameters.values(), *gradients])
        self.live = self.casts = self.peak = self.before_embedding = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding_dense_backward.default:
            self.before_embedding = self.start_phase()
        result = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and id(args[0].untyped_storage()) in self._parameters
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage() not in self._known:
                storage = value.untyped_storage()
                self._known.add(storage)
                self._add(storage.nbytes(), is_cast)
                weakref.finalize(storage, self._add, -storage.nbytes(), is_cast)
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, size: int, is_cast: bool) -> None:
        self.live += size
        self.casts += size * is_cast

    def start_phase(self) -> int:
        """Return the peak so far and start the next phase."""
        peak, self.peak = self.peak, self.live
        return peak
