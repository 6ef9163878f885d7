"""Compile the blocks, and recompute their activations in the backward pass."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from meap_lit.model.decoder import Block, Decoder
from meap_lit.private import disable_ddp_graph_splits

_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.max.default,  # one number, the scale of a factor in float8, takes a pass over the factor
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,  # of `torch.nn.attention.varlen`, which `attention.py` imports
}
"""Operations whose results `selective` keeps, because they take the most time. Products in float8 are `mm` here:
torchao replaces them by `_scaled_mm` below."""


def checkpoint_and_compile(
    decoder: Decoder, activation_checkpointing: Literal["none", "selective", "full"], compile: bool
) -> None:
    """Keep less of every block's forward for the backward, and compile it, in place.

    `full` keeps one hidden state a block and costs one more forward, about a third of a step's time. `selective` keeps
    the results of matrix products and attention and repeats what is cheap: norms, rotations, the SwiGLU's product.
    The forward is replaced, not the block, so that parameters keep their names. The second forward repeats the random
    state of the first, for the dropout of adapters.
    """
    if compile:
        disable_ddp_graph_splits()
    selective = partial(create_selective_checkpoint_contexts, list(_SAVED))
    for block in blocks_of(decoder):
        if activation_checkpointing == "selective":  # inside of what is compiled: it chooses among operations
            block.forward = _checkpointed(block.forward, context_fn=selective)  # type: ignore[method-assign]
        if compile:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        if activation_checkpointing == "full":  # around it: what packed rows leave to Python breaks no graph of it
            block.forward = _checkpointed(block.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:  # no `partial`, which the compiler does not look into
        return checkpoint(forward, *args, use_reentrant=False, **options)

    return run


def blocks_of(decoder: Decoder) -> Iterator[Block]:
    for block in decoder.layers:
        assert isinstance(block, Block)
        yield block
