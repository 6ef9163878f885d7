"""The matrix products of the blocks in float8, by torchao.

Weights stay as they are and keep their names. For each product both factors are rounded to eight bits: inputs and
weights to e4m3, gradients of outputs to e5m2 (arXiv 2209.05433), each scaled by its own largest element, found anew
every time. So there is no state besides the weights, and a run may resume with float8 or without it. This is torchao's
default, `tensorwise`, which it calls its fastest. Left out are the head, since the loss reads its weight itself, and
layers that are too small to gain.
"""

import torch
from torch import nn

from meap_lit.errors import UserError
from meap_lit.model.decoder import Decoder

MULTIPLE = 16
"""`torch._scaled_mm` takes multiples of this: of widths, and in the backward of a micro-batch's tokens."""

SMALL = (4096, 1024)
"""Layers with no more inputs and no more outputs are no faster in float8 on an H100, by torchao's measurements
(torchao 0.18, `_auto_filter_for_tensorwise` in torchao/float8/float8_linear_utils.py)."""

_CAPABILITY = (8, 9)


def use_float8(decoder: Decoder, device: torch.device, *, all_gather: bool = False, emulate: bool = False) -> None:
    """Compute the large layers of the blocks in float8, in place: before recomputation, compilation and sharding.

    Args:
        decoder: On the meta device or not; without adapters.
        device: Where it is to compute.
        all_gather: Let FSDP2 gather the weights in float8; `decoder` will be sharded.
        emulate: Round the factors alike but multiply in float32: for tests, on any device.

    Raises:
        UserError: If torchao is missing, the device has no float8 products, a size does not suit them, or all layers
            are small.
    """
    if not emulate:
        _check_device(device)
    _check_sizes(decoder)
    if all(_is_small(module) for module in decoder.layers.modules() if isinstance(module, nn.Linear)):
        raise UserError(
            f"model.float8 gains nothing: no layer of the blocks has more than {SMALL[0]} inputs or {SMALL[1]} "
            f"outputs; leave it out"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(f"model.float8 needs torchao ({error}): pip install 'meap-lit[float8]'") from error
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=all_gather, emulate=emulate)
    convert_to_float8_training(decoder.layers, config=config, module_filter_fn=lambda module, _: not _is_small(module))


def _is_small(layer: nn.Linear) -> bool:
    return layer.in_features <= SMALL[0] and layer.out_features <= SMALL[1]


def _check_device(device: torch.device) -> None:
    needed = "a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell)"
    if device.type != "cuda":
        raise UserError(f"model.float8 needs {needed}, got {device.type}; leave it out")
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"model.float8 needs {needed}, got {name} of {'.'.join(map(str, capability))}; leave it out")


def _check_sizes(decoder: Decoder) -> None:
    config = decoder.config
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads x head width": config.num_heads * config.head_width,
        "num_kv_heads x head width": config.num_kv_heads * config.head_width,
    }
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise UserError(
                f"model.float8 needs multiples of {MULTIPLE}, got decoder.{name} {size}; "
                f"change it or leave model.float8 out"
            )
