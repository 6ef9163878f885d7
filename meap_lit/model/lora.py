"""Low-rank adapters (LoRA, arXiv 2106.09685) on named projections.

Written here and not taken from `peft`, which would need transformers at run time and renames the weights that it
wraps. A `LoRALinear` keeps the names `weight` and `bias` of the layer it replaces, so checkpoints map as before.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meap_lit.errors import UserError, check_range

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRA:
    """Options of the adapters; all other weights are frozen.

    Args:
        rank: Inner width r of an adapter.
        alpha: The adapter's output is multiplied by alpha / rank.
        targets: Projections that are adapted, out of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
        dropout: Share of an adapter's inputs that is dropped in training. What is dropped follows from data.seed, the
            optimizer step, the micro-batch and the rank: a resume drops the same, another split something else.
        frozen_dtype: What the frozen weights are kept in; `bfloat16` halves their memory and needs
            trainer.precision bf16-mixed. The adapters are float32, unless trainer.precision is bf16-true.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    dropout: float = 0.0
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_range("model.lora.rank", self.rank, "[1, inf)")
        check_range("model.lora.alpha", self.alpha, "(0, inf)")
        check_range("model.lora.dropout", self.dropout, "[0, 1)")
        unknown = [name for name in self.targets if name not in PROJECTIONS]
        if unknown or not self.targets:
            raise UserError(f"model.lora.targets must name some of {', '.join(PROJECTIONS)}, got {self.targets}")

    @property
    def scale(self) -> float:
        """Factor on an adapter's output."""
        return self.alpha / self.rank


class LoRALinear(nn.Linear):
    """y = W x + b + scale * B A x, with W and b frozen.

    B starts at zero, so an adapted model starts as the model that it adapts.

    Args:
        linear: The layer to replace; its weight and bias are taken over, not copied.
        lora: Rank, scale and dropout.
    """

    def __init__(self, linear: nn.Linear, lora: LoRA) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = lora.scale
        self.dropout = lora.dropout
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(lora.rank, linear.in_features, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.empty(linear.out_features, lora.rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        adapted = F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.lora_a), self.lora_b)
        return super().forward(x) + self.scale * adapted


@contextmanager
def draw_dropout_from(device: torch.device, *key: int) -> Iterator[None]:
    """Let `key` alone decide the dropout in this context; the random state is restored afterwards.

    Layers draw one after the other, so each drops something else. A forward that is computed again in the backward
    (`recompute.checkpoint_and_compile`) drops what the first one did. Nothing here waits for the device.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest))
        yield


def is_adapter(name: str) -> bool:
    """Return whether the parameter of that name belongs to an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def add_lora(decoder: nn.Module, lora: LoRA) -> None:
    """Freeze `decoder` and put an adapter on every projection that `lora` names, in place.

    The adapters are not initialized: `build.init_weights` fills them.
    """
    decoder.requires_grad_(False)
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if name in lora.targets:
                assert isinstance(child, nn.Linear), f"{name} is not a projection"
                setattr(parent, name, LoRALinear(child, lora))
    if lora.frozen_dtype == "bfloat16":
        for parameter in decoder.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
