"""What a training step holds in the memory of one device, as plain functions of sizes.

Nothing is measured here. What autograd keeps is listed operation by operation after `model/decoder.py`, in the manner
of Korthikanti et al. (arXiv 2205.05198, section 4), but for RMSNorm, SwiGLU, grouped heads, rotary positions and an
attention that keeps no T x T scores. All results are bytes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from meap_lit.errors import UserError
from meap_lit.hf.weights import meta_decoder
from meap_lit.model import DecoderConfig
from meap_lit.model.lora import PROJECTIONS, LoRA, add_lora
from meap_lit.model.loss import MAX_LOGITS
from meap_lit.planning.layout import PRECISIONS, Layout, Numerics

FLOAT32 = torch.float32.itemsize
_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_INPUT = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Step:
    """Everything that the memory of a training step depends on.

    Args:
        decoder: The model, vocabulary included.
        num_tokens: Tokens of a micro-batch, data.micro_batch_size x data.seq_len.
        seq_len: Tokens of a row.
        accumulation: Micro-batches of a device in an optimizer step.
        precision: One of `PRECISIONS`.
        activation_checkpointing: `none`, `selective` or `full`.
        lora: The adapters, if these alone are trained.
        packed: Rows hold several documents.
        layout: The devices.
        on_cpu: The device is a CPU, where logits are widened before their softmax, and dropout keeps factors, no bytes.
    """

    decoder: DecoderConfig
    num_tokens: int
    seq_len: int
    accumulation: int = 1
    precision: str = "bf16-mixed"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    lora: LoRA | None = None
    packed: bool = False
    layout: Layout = field(default_factory=Layout)
    on_cpu: bool = False

    @property
    def numerics(self) -> Numerics:
        """The dtypes, after what FSDP2 casts: it gathers weights and casts the inputs of a block to `param_dtype`."""
        numerics = PRECISIONS[self.precision]
        dtype = self.layout.param_dtype
        if dtype is None:
            return numerics
        mixed = self.precision == "bf16-mixed"
        return replace(numerics, residual=dtype, products=numerics.products if mixed else dtype)

    @property
    def gathered_dtype(self) -> torch.dtype:
        """Dtype in which the forward finds trained weights."""
        return self.layout.param_dtype or self.numerics.weights


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
    """All parameters, from a decoder on the meta device; a tied head is not apart.

    Raises:
        UserError: If heads or SwiGLU cannot be divided among the tensor-parallel devices.
    """
    size = step.layout.tensor_parallel_size
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        if getattr(step.decoder, name) % size:
            raise UserError(
                f"decoder.{name} {getattr(step.decoder, name)} cannot be divided among tensor_parallel_size {size} "
                f"devices; lower trainer.strategy.tensor_parallel_size"
            )
    decoder = meta_decoder(step.decoder, step.numerics.weights)
    if step.lora is not None:
        add_lora(decoder, step.lora)
    return [
        Weight(name, _divided(name, tuple(p.shape), size), p.dtype, p.requires_grad)
        for name, p in decoder.named_parameters()
    ]


def _divided(name: str, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Shape on one of `size` tensor-parallel devices."""
    layer = name.split(".")[-2]
    if layer in _BY_OUTPUT:
        return (shape[0] // size, *shape[1:])
    return (shape[0], shape[1] // size) if layer in _BY_INPUT else shape


def parameter_bytes(weights: Iterable[Weight], layout: Layout, *, trained_only: bool = False) -> int:
    """Exact bytes of the parameters on the fullest device; with `trained_only` also those of the gradients."""
    return sum(w.shard_size(layout.shard_size) * w.dtype.itemsize for w in weights if w.trained or not trained_only)


def optimizer_bytes(weights: Iterable[Weight], layout: Layout) -> int:
    """Exact bytes of AdamW's states: two moments in the parameter's dtype, and a float32 step for each parameter."""
    trained = [w for w in weights if w.trained]
    return 2 * parameter_bytes(trained, layout) + FLOAT32 * len(trained)


# ----------------------------------------------------------------------------------------------- activations


def norm_activations(num_rows: int, width: int, dtype: torch.dtype) -> int:
    """What RMSNorm keeps of `num_rows` rows: the input and 1 / rms."""
    return num_rows * (width * dtype.itemsize + FLOAT32)


def block_activations(step: Step) -> int:
    """What autograd keeps of one block, copies of weights aside.

    With n tokens, widths D (residual), Q and K (all query, all key heads), F (SwiGLU), s bytes in matrix products:

    - two norms over D, and with qk_norm one over the heads of query and of key;
    - the outputs of the two norms, which q, k, v and gate, up share as input: n D s each;
    - attention: query, key, value and output, n (2 Q + 2 K) s, and the logsumexp of each score row, 4 n H. The output
      is also o's input; of packed rows the outputs are joined, n Q s more;
    - SwiGLU: gate, up and their product, which is down's input: 3 n F s.

    Frozen weights keep no input. An adapter keeps its own and its inner activation; with dropout, the dropped input of
    each and its mask. Rotary positions keep cosine and sine only, once for all layers (`kept_activations`).
    Tensor parallelism divides Q, K, F and H.
    """
    config, n, size = step.decoder, step.num_tokens, step.numerics.products.itemsize
    part = step.layout.tensor_parallel_size
    hidden, inner = config.hidden_size, config.intermediate_size // part
    heads, kv_heads = config.num_heads // part, config.num_kv_heads // part
    query, key = heads * config.head_width, kv_heads * config.head_width
    keep_input = set(PROJECTIONS if step.lora is None else step.lora.targets)

    kept = 2 * norm_activations(n, hidden, step.numerics.residual)
    if config.qk_norm:
        kept += norm_activations(n * (heads + kv_heads), config.head_width, step.numerics.products)
    dropout = step.lora is not None and step.lora.dropout > 0
    for readers in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}):
        num_readers = len(readers & keep_input)
        kept += n * hidden * size * (num_readers if dropout else min(1, num_readers))
    kept += n * (2 * query + 2 * key) * size + n * heads * FLOAT32
    kept += n * query * size * ((step.packed or dropout) and "o_proj" in keep_input)
    kept += n * inner * size * (3 if "down_proj" in keep_input else 2)
    if step.lora is not None:
        kept += len(keep_input) * n * step.lora.rank * size
        widths = {"o_proj": query, "down_proj": inner}
        mask = size if step.on_cpu else 1
        kept += sum(n * widths.get(name, hidden) for name in keep_input) * dropout * mask
    return kept


def checkpointed_activations(step: Step) -> int:
    """What is kept of one block that is computed again in the backward: its input, n D.

    `selective` also keeps the results of matrix products, n (Q + 2 K + 2 D + 2 F) s, and of attention, n Q s and the
    logsumexp (`parallelize.checkpoint_and_compile`); each adapter adds its two results.
    """
    config, n, size = step.decoder, step.num_tokens, step.numerics.products.itemsize
    kept = n * config.hidden_size * step.numerics.residual.itemsize
    if step.activation_checkpointing == "full":
        return kept
    part = step.layout.tensor_parallel_size
    query, key = (heads * config.head_width // part for heads in (config.num_heads, config.num_kv_heads))
    inner, hidden = config.intermediate_size // part, config.hidden_size
    outputs = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": hidden}
    outputs |= {"gate_proj": inner, "up_proj": inner, "down_proj": hidden}
    kept += n * (sum(outputs.values()) + query) * size + n * config.num_heads // part * FLOAT32
    if step.lora is not None:
        kept += n * sum(outputs[name] + step.lora.rank for name in step.lora.targets) * size
    return kept


def kept_activations(step: Step) -> int:
    """What is kept from forward to backward: blocks, cosine and sine, final norm and ids; copies of weights aside."""
    config, n = step.decoder, step.num_tokens
    block = block_activations(step) if step.activation_checkpointing == "none" else checkpointed_activations(step)
    angles = 2 * config.head_width * FLOAT32 * (n if step.packed else step.seq_len)
    norm = norm_activations(n, config.hidden_size, step.numerics.residual)
    return config.num_layers * block + angles + norm + n * torch.int64.itemsize


def weight_copies(step: Step, weights: Iterable[Weight]) -> int:
    """Copies of the blocks' matrices in the dtype of the products: autocast keeps them until the forward has ended, and
    each matrix product its own until the backward. None where weights are found in that dtype.
    """
    products = step.numerics.products
    return sum(
        w.size * products.itemsize
        for w in weights
        if w.in_block and len(w.shape) == 2 and (step.layout.param_dtype or w.dtype) != products
    )


# ------------------------------------------------------------------------------------------ loss and backward


def loss_bytes(step: Step) -> int:
    """Largest moment of `linear_cross_entropy` in the forward, its gradients included.

    All along: the gradients of hidden states (n D) and of the head (V D in float32), and the head cast to the dtype of
    the products. On top of these either the log-softmax of a piece of R rows (the last piece's log-probabilities and
    its gradient still live beside the new logits and log-probabilities) or the product that adds to the gradient of
    the head. On a CPU log-softmax also widens its input.
    """
    config, size = step.decoder, step.numerics.products.itemsize
    assert config.vocab_size is not None
    head = config.vocab_size * config.hidden_size
    trained = step.lora is None
    num_rows = min(step.num_tokens, max(1, MAX_LOGITS // config.vocab_size))
    piece = num_rows * config.vocab_size
    narrow = size < FLOAT32
    widened = FLOAT32 if narrow and step.on_cpu else 0
    before = FLOAT32 + (size if narrow else 0) if num_rows < step.num_tokens else 0
    softmax = piece * (before + size + FLOAT32 + widened)
    product = piece * (FLOAT32 + (size if narrow else 0)) + head * size * trained
    held = step.num_tokens * config.hidden_size * size + head * FLOAT32 * trained
    held += head * size if _head_dtype(step) != step.numerics.products else 0
    return held + max(softmax, product)


def _head_dtype(step: Step) -> torch.dtype:
    frozen = step.lora is not None and step.lora.frozen_dtype == "bfloat16"
    return step.layout.param_dtype or (torch.bfloat16 if frozen else step.numerics.weights)


def backward_bytes(step: Step, weights: Iterable[Weight]) -> int:
    """What the backward of a block needs beside all that is kept.

    The gradients of gate and up while their product's gradient goes (2 n F), those of the residual stream on both
    ways (2 n D), the head's gradient from the loss (V D), and the gradient of the block's largest matrix in the dtype
    of the product. With FSDP2, the block's whole gradient; with activation checkpointing, all that the block keeps.
    """
    config, numerics = step.decoder, step.numerics
    assert config.vocab_size is not None
    inner = config.intermediate_size // step.layout.tensor_parallel_size
    block = [w for w in weights if w.name.startswith("layers.0.")]
    working = 2 * step.num_tokens * inner * numerics.products.itemsize
    working += 2 * step.num_tokens * config.hidden_size * numerics.residual.itemsize
    if step.lora is None:
        working += config.vocab_size * config.hidden_size * step.gathered_dtype.itemsize
    working += max((w.size * numerics.products.itemsize for w in block if w.trained), default=0)
    working += gathered_gradient_bytes(step, block)
    if step.activation_checkpointing != "none":
        working += block_activations(step) + weight_copies(step, block)
    return working


def gathered_bytes(step: Step, weights: Iterable[Weight]) -> int:
    """Weights that FSDP2 holds gathered (`model/parallelize.py`): embedding, head and final norm all along; of the
    blocks the one at work and the next one, on its way, or all of them without reshard_after_forward.
    """
    layout, num_layers = step.layout, step.decoder.num_layers
    if not layout.fsdp:
        return 0
    sizes = [(w.in_block, w.size * (layout.param_dtype or w.dtype).itemsize) for w in weights]
    blocks = sum(size for in_block, size in sizes if in_block)
    num_gathered = min(2, num_layers) if layout.reshard_after_forward else num_layers
    return sum(size for in_block, size in sizes if not in_block) + blocks * num_gathered // num_layers


def bucket_bytes(step: Step, gradients: int) -> int:
    """DDP's buckets beside the gradients that accumulate outside of them: with `view`, up to the last micro-batch."""
    buckets = step.layout.buckets
    apart = buckets == "copy" or (buckets == "view" and step.accumulation > 1)
    return gradients if apart else 0


def gathered_gradient_bytes(step: Step, block: Iterable[Weight]) -> int:
    """A block's whole gradient before FSDP2 shares it out: as it was computed and as it is reduced."""
    layout = step.layout
    if not layout.fsdp:
        return 0
    total = 0
    for w in block:
        dtype = layout.param_dtype or w.dtype
        total += w.size * (dtype.itemsize + (layout.reduce_dtype or dtype).itemsize) * w.trained
    return total


# ------------------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for.

    The peak lies at the loss or in the backward. From the second step on the old gradients lie in memory throughout the
    forward: Lightning lets go of them after it.
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
    """Memory of a training step after the first.

    Raises:
        UserError: As `weights_of` does.
    """
    weights = weights_of(step)
    layout = step.layout
    parameters = parameter_bytes(weights, layout)
    gradients = parameter_bytes(weights, layout, trained_only=True)
    optimizer = optimizer_bytes(weights, layout)
    host = 0
    if layout.cpu_offload:
        host = parameters + gradients + optimizer
        parameters = gradients = optimizer = 0
    copies = weight_copies(step, weights)
    recomputed = step.activation_checkpointing != "none"
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        buckets=bucket_bytes(step, gradients),
        gathered=gathered_bytes(step, weights),
        activations=kept_activations(step),
        copies=0 if recomputed else copies,
        loss=loss_bytes(step) + (copies if recomputed else 0),
        backward=backward_bytes(step, weights),
        host=host,
    )
