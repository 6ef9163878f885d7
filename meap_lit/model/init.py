"""Random weights, a function of torch's seed and a parameter's name alone.

No state of a generator runs from one parameter to the next, so a parameter gets the same values whether the model is
built whole or each device fills its own part, in whatever order.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from meap_lit.model.config import DecoderConfig


def init_parameter_(parameter: Tensor, name: str, config: DecoderConfig) -> None:
    """Fill a parameter of a decoder, in place, as TinyLlama does.

    Normal with std sqrt(2 / (5 * width)); the two projections of a block that write to the residual stream get std
    1 / sqrt(width) / layers. An adapter starts as a linear layer and zeros, so that it adds nothing at first.

    Reference: jzhang38/TinyLlama, `lit_gpt/model.py`, `GPT._init_weights`.

    Args:
        parameter: The whole parameter, not a shard of it.
        name: Its name in the decoder.
        config: The decoder's.
    """
    if parameter.is_meta:
        return
    digest = hashlib.blake2b(f"{torch.initial_seed()}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest))
    kind = name.rsplit(".", 1)[-1]
    if kind == "lora_a":
        bound = 1 / math.sqrt(parameter.size(1))
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    elif kind in ("lora_b", "bias"):
        nn.init.zeros_(parameter)
    elif parameter.dim() == 1:
        nn.init.ones_(parameter)  # norms
    else:
        writes_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        residual_std = 1 / math.sqrt(config.hidden_size) / config.num_layers
        std = residual_std if writes_to_residual else math.sqrt(2 / (5 * config.hidden_size))
        nn.init.normal_(parameter, std=std, generator=generator)
