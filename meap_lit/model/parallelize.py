"""What is put around a finished decoder from outside; the decoder does not know of it."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from meap_lit.model.decoder import Decoder


def checkpoint_activations(decoder: Decoder) -> None:
    """Keep only the inputs of each block for the backward, and compute the rest of it again, in place.

    Costs one more forward (about a third of a step's time); memory for activations falls to one hidden state a block.
    The forward is replaced, not the block, so that parameters keep their names. The second forward repeats the random
    state of the first, for the dropout of adapters.
    """
    for block in decoder.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
