"""Count what a training step holds in the memory of one device, in bytes.

Parameters, gradients and optimizer states are exact. Activations, the loss and the backward are measured on fake
tensors (`fake_step.py`). What a strategy adds is a formula here.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from meap_lit.hf.weights import meta_decoder
from meap_lit.model import DecoderConfig
from meap_lit.model.lora import LoRA, add_lora
from meap_lit.parallel.sharding import part_of
from meap_lit.planning.devices import PRECISIONS, Devices
from meap_lit.planning.fake_step import Checkpointing, step_bytes

FLOAT32 = torch.float32.itemsize


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


# ------------------------------------------------------------------------------------------------ parameters


@dataclass(frozen=True)
class Weight:
    """A parameter as one device holds it.

    Args:
        name: The decoder's own name.
        shape: After tensor parallelism, before sharding.
        dtype: Stored dtype.
        trained: It has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool

    @property
    def in_block(self) -> bool:
        """It belongs to a block, not to embedding, head or final norm."""
        return self.name.startswith("layers.")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def shard_size(self, num_shards: int) -> int:
        """Elements on the fullest of `num_shards` devices: FSDP2 cuts the first dimension and rounds up."""
        return -(-self.shape[0] // num_shards) * math.prod(self.shape[1:])


def weights_of(step: Step) -> list[Weight]:
    """Return all parameters of one tensor-parallel device; a tied head does not count again.

    Raises:
        UserError: If the decoder cannot be divided among the tensor-parallel devices.
    """
    config = part_of(step.decoder, step.devices.tensor_parallel_size, adapted=step.lora is not None)
    return _weights(config, PRECISIONS[step.precision], step.lora)


@cache
def _weights(config: DecoderConfig, dtype: torch.dtype, lora: LoRA | None) -> list[Weight]:
    decoder = meta_decoder(config, dtype)
    if lora is not None:
        add_lora(decoder, lora)
        if dtype != torch.float32:
            decoder.to(dtype)  # as Lightning does
    return [Weight(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in decoder.named_parameters()]


def parameter_bytes(weights: Iterable[Weight], devices: Devices, *, trained_only: bool = False) -> int:
    """Return the exact bytes of the parameters on the fullest device; with `trained_only` also of the gradients."""
    return sum(w.shard_size(devices.shard_size) * w.dtype.itemsize for w in weights if w.trained or not trained_only)


def optimizer_bytes(weights: Iterable[Weight], devices: Devices) -> int:
    """Return the exact bytes of AdamW: two moments in the parameter's dtype and a float32 step for each parameter."""
    trained = [w for w in weights if w.trained]
    return 2 * parameter_bytes(trained, devices) + FLOAT32 * len(trained)


# ---------------------------------------------------------------------------------------- what strategies add


def gathered_bytes(weights: Iterable[Weight], devices: Devices, num_layers: int) -> int:
    """Return the bytes of the weights that FSDP2 holds gathered (`parallel.sharding.shard`).

    Embedding, head and final norm stay gathered. So do all blocks without `reshard_after_forward`; with it, the block
    at work and the next one.
    """
    if not devices.fsdp:
        return 0
    sizes = [(w.in_block, w.size * (devices.param_dtype or w.dtype).itemsize) for w in weights]
    blocks = sum(size for in_block, size in sizes if in_block)
    num_gathered = min(2, num_layers) if devices.reshard_after_forward else num_layers
    return sum(size for in_block, size in sizes if not in_block) + blocks * num_gathered // num_layers


def bucket_bytes(step: Step, gradients: int) -> int:
    """Return the bytes of DDP's buckets beside the gradients.

    With `view` the gradients are in the buckets, except while micro-batches accumulate.
    """
    buckets = step.devices.buckets
    apart = buckets == "copy" or (buckets == "view" and step.accumulation > 1)
    return gradients if apart else 0


def reduced_gradient_bytes(weights: Iterable[Weight], devices: Devices, *, computed: bool = True) -> int:
    """Return the bytes of whole gradients while FSDP2 reduces them.

    Args:
        weights: Those of a block, or those outside of the blocks.
        devices: The devices.
        computed: Count the gradients as they were computed too, not only as they are reduced.
    """
    total = 0
    for w in weights:
        dtype = devices.param_dtype or w.dtype
        total += w.size * (dtype.itemsize * computed + (devices.reduce_dtype or dtype).itemsize) * w.trained
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
        UserError: As `weights_of` does.
    """
    devices, weights = step.devices, weights_of(step)
    parameters = parameter_bytes(weights, devices)
    gradients = parameter_bytes(weights, devices, trained_only=True)
    optimizer = optimizer_bytes(weights, devices)
    buckets = bucket_bytes(step, gradients)
    host = 0
    if devices.cpu_offload:
        host = parameters + gradients + optimizer
        parameters = gradients = optimizer = 0
    own_dtype = PRECISIONS[step.precision]
    allocated = step_bytes(
        part_of(step.decoder, devices.tensor_parallel_size, adapted=step.lora is not None),
        num_rows=step.num_tokens // step.seq_len,
        seq_len=step.seq_len,
        packed=step.packed,
        dtype=devices.param_dtype or (None if own_dtype == torch.float32 else own_dtype),
        autocast=step.precision == "bf16-mixed",
        activation_checkpointing=step.activation_checkpointing,
        lora=step.lora,
        new_root_gradients=devices.fsdp,
    )
    blocks, embedding = allocated.blocks, allocated.embedding
    if devices.fsdp:
        blocks += reduced_gradient_bytes((w for w in weights if w.name.startswith("layers.0.")), devices)
        embedding += reduced_gradient_bytes((w for w in weights if not w.in_block), devices, computed=False)
    kept = allocated.forward + allocated.copies
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        buckets=buckets,
        gathered=gathered_bytes(weights, devices, step.decoder.num_layers),
        activations=allocated.forward,
        copies=allocated.copies,
        loss=allocated.loss - kept,
        backward=max(blocks, embedding) - kept,
        host=host,
    )
