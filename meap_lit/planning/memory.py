"""Count what a training step holds in the memory of one device, in bytes.

Parameters, gradients and optimizer states are exact. Activations, the loss and the backward are measured on fake
tensors (`fake_step.py`). What a strategy adds is a formula here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn

from meap_lit.model import DecoderConfig
from meap_lit.model.build import meta_decoder
from meap_lit.model.lora import LoRA, add_lora
from meap_lit.parallel.tensor import part_of
from meap_lit.planning.devices import PRECISIONS, Devices
from meap_lit.planning.fake_step import Checkpointing, StepBytes, step_bytes

_BLOCKS = "layers."
"""How the names of parameters of blocks begin; embedding, head and final norm have others."""

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
"""A tied head is not among the parameters."""


@dataclass(frozen=True)
class Step:
    """Everything that the memory of a training step depends on.

    Args:
        decoder: The model, vocabulary included.
        num_tokens: Tokens of a micro-batch, data.micro_batch_size x data.seq_len.
        seq_len: Tokens of a row.
        accumulation: Micro-batches of a device in an optimizer step.
        precision: One of `PRECISIONS`.
        activation_checkpointing: As for `DecoderModule`.
        lora: The adapters, if only these are trained.
        packed: Rows hold several documents.
        devices: The devices and how they share the model.
    """

    decoder: DecoderConfig
    num_tokens: int
    seq_len: int
    accumulation: int = 1
    precision: str = "bf16-mixed"
    activation_checkpointing: Checkpointing = "none"
    lora: LoRA | None = None
    packed: bool = False
    devices: Devices = field(default_factory=Devices)

    def __post_init__(self) -> None:
        if self.lora is not None:  # hashable, so that measurements are reused
            object.__setattr__(self, "lora", replace(self.lora, targets=tuple(self.lora.targets)))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- parameters and what follows


def parameters_of(step: Step) -> dict[str, nn.Parameter]:
    """Return the parameters of one tensor-parallel device by name, on the meta device, without a tied head.

    Raises:
        UserError: If the decoder cannot be divided among the tensor-parallel devices.
    """
    return _parameters(_local_decoder(step), PRECISIONS[step.precision], step.lora)


@cache
def _parameters(config: DecoderConfig, dtype: torch.dtype, lora: LoRA | None) -> dict[str, nn.Parameter]:
    decoder = meta_decoder(config, dtype)
    if lora is not None:
        add_lora(decoder, lora)
        if dtype != torch.float32:
            decoder.to(dtype)  # as Lightning does
    return dict(decoder.named_parameters())


def _local_decoder(step: Step) -> DecoderConfig:
    return part_of(step.decoder, step.devices.tensor_parallel_size, adapted=step.lora is not None)


def sharded_bytes(parameters: Iterable[Tensor], num_shards: int) -> int:
    """Return the exact bytes on the fullest of `num_shards` devices: FSDP2 cuts the first dimension and rounds up."""
    return sum(-(-len(p) // num_shards) * p[0].numel() * p.itemsize for p in parameters)


def optimizer_bytes(trained: Sequence[Tensor], num_shards: int) -> int:
    """Return the exact bytes of AdamW: two moments in the parameter's dtype and a float32 step for each parameter."""
    return 2 * sharded_bytes(trained, num_shards) + torch.float32.itemsize * len(trained)


def gathered_bytes(parameters: Mapping[str, Tensor], devices: Devices, num_layers: int) -> int:
    """Return the bytes of the weights that FSDP2 holds gathered in the backward (`parallel.sharding.shard`).

    The final norm stays gathered, and a tied embedding. So does everything but the head without
    `reshard_after_forward`; with it, the block at work and the next one.
    """
    if not devices.fsdp:
        return 0
    sizes = {name: p.numel() * (devices.param_dtype or p.dtype).itemsize for name, p in parameters.items()}
    blocks = sum(size for name, size in sizes.items() if name.startswith(_BLOCKS))
    head = sizes.get(_HEAD, 0)
    if not devices.reshard_after_forward:
        return sum(sizes.values()) - head
    embedding = sizes[_EMBEDDING] if head else 0
    return sum(sizes.values()) - head - embedding - blocks + blocks * min(2, num_layers) // num_layers


def reduced_gradient_bytes(parameters: Iterable[Tensor], devices: Devices, *, computed: bool = True) -> int:
    """Return the bytes that FSDP2 takes to reduce gradients: whole ones in `reduce_dtype`, and the shards that result.

    The parameters are those of a block, or those outside of the blocks. With `computed`, the gradients count as they
    were computed, too.
    """
    total = 0
    for p in parameters:
        dtype = devices.param_dtype or p.dtype
        reduced = p.numel() * (devices.reduce_dtype or dtype).itemsize
        total += (p.numel() * dtype.itemsize * computed + reduced + reduced // devices.shard_size) * p.requires_grad
    return total


# ------------------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for.

    The peak is in the loss or in the backward. The gradients of one step exist until the forward of the next has ended,
    so they count at the peak.
    """

    parameters: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    activations: int
    copies: int
    loss: int
    backward: int
    host: int = 0
    """Of the host's memory, for this device."""

    @property
    def total(self) -> int:
        """Peak on the device."""
        weights = self.parameters + self.gradients + self.optimizer + self.buckets + self.gathered + self.copies
        return weights + self.activations + max(self.loss, self.backward)


def memory_of(step: Step) -> Memory:
    """Return the memory of a training step after the first.

    Raises:
        UserError: As `parameters_of` does.
    """
    devices, parameters = step.devices, parameters_of(step)
    trained = [p for p in parameters.values() if p.requires_grad]
    stored, gradients = (sharded_bytes(tensors, devices.shard_size) for tensors in (parameters.values(), trained))
    states = {"parameters": stored, "gradients": gradients, "optimizer": optimizer_bytes(trained, devices.shard_size)}
    own_dtype = PRECISIONS[step.precision]
    allocated = step_bytes(
        _local_decoder(step),
        num_rows=step.num_tokens // step.seq_len,
        seq_len=step.seq_len,
        packed=step.packed,
        dtype=devices.param_dtype or (None if own_dtype == torch.float32 else own_dtype),
        autocast=step.precision == "bf16-mixed",
        activation_checkpointing=step.activation_checkpointing,
        lora=step.lora,
        fsdp=devices.fsdp,
    )
    kept = allocated.forward + allocated.copies
    if devices.fsdp:
        allocated = _with_fsdp(allocated, parameters, step)
    return Memory(
        **(dict.fromkeys(states, 0) if devices.cpu_offload else states),
        buckets=_bucket_bytes(step, gradients, trained),
        gathered=gathered_bytes(parameters, devices, step.decoder.num_layers),
        activations=allocated.forward,
        copies=allocated.copies,
        loss=allocated.loss - kept,
        backward=max(allocated.blocks, allocated.embedding) - kept,
        host=sum(states.values()) if devices.cpu_offload else 0,
    )


def _bucket_bytes(step: Step, gradients: int, trained: Sequence[Tensor]) -> int:
    """Return the bytes of gradients beside those of the optimizer: DDP's buckets, or FSDP's whole gradients."""
    devices, accumulates = step.devices, step.accumulation > 1
    if devices.fsdp and not devices.reduce_each_micro_batch and accumulates:  # whole, until the last
        return sum(p.numel() * (devices.reduce_dtype or p.dtype).itemsize for p in trained)
    # with `view` the gradients are in the buckets, except while micro-batches accumulate
    return gradients if devices.buckets == "copy" or (devices.buckets == "view" and accumulates) else 0


def _with_fsdp(allocated: StepBytes, parameters: Mapping[str, Tensor], step: Step) -> StepBytes:
    """Add what FSDP2 holds at the peaks of the loss and of the backward to what a step allocates."""
    devices = step.devices
    one_block = [p for name, p in parameters.items() if name.startswith("layers.0.")]
    head = [p for name, p in parameters.items() if name == _HEAD]
    root = [p for name, p in parameters.items() if not name.startswith(_BLOCKS) and name != _HEAD]
    # the gradient of the head is reduced while the last block computes; that of a block when it has ended, and what it
    # kept is free
    of_block = reduced_gradient_bytes(one_block, devices) - allocated.forward // step.decoder.num_layers
    return replace(
        allocated,
        # the head, and the buffer in which it was gathered: FSDP2 frees the last one after the loss
        loss=allocated.loss + 2 * sum(p.numel() * (devices.param_dtype or p.dtype).itemsize for p in head),
        blocks=allocated.blocks + max(of_block, reduced_gradient_bytes(head, devices, computed=False)),
        # a tied weight, as large as its gradient, is freed by then
        embedding=max(allocated.embedding, reduced_gradient_bytes(root, devices, computed=bool(head))),
    )
