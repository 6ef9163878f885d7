"""Build a decoder without memory, then allocate and fill it.

So no memory goes into a second copy of the weights, and a strategy can divide a decoder before it is allocated.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from meap_lit.model.config import DecoderConfig
from meap_lit.model.decoder import Decoder
from meap_lit.model.init import init_parameter_

Write = Callable[[Tensor, Tensor], None]
"""Writes a whole value into a parameter."""


def meta_decoder(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    """Return a decoder without memory for its weights."""
    with torch.device("meta"):
        return Decoder(config).to(dtype)


def allocate(decoder: Decoder, device: torch.device | str) -> None:
    """Give the weights of a decoder, or each device's part of them, uninitialized memory on `device`."""
    decoder.to_empty(device=device)
    decoder.tie_weights()


def copy_whole(parameter: Tensor, value: Tensor) -> None:
    """Write a value into a parameter that this device holds whole."""
    parameter.copy_(value)


def init_weights(decoder: Decoder, names: Iterable[str], write: Write = copy_whole) -> None:
    """Fill parameters with random values, one at a time; the values depend only on torch's seed and the names.

    `write` writes a whole value into a parameter of which this device may hold a part.
    """
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for name in names:
            parameter = parameters[name]
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            init_parameter_(value, name, decoder.config)
            write(parameter, value)
