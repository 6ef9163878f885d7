"""Tiny random models of transformers, saved as it saves them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0}

# name: family and what differs from SIZES; scaled ones know 16 positions from pretraining, and 64 are asked for
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama wide heads": ("Llama", {"head_dim": 12, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "llama theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    ),
    "llama 3": (
        "Llama",
        {
            "rope_parameters": {**LLAMA3, "rope_theta": 500_000.0, "original_max_position_embeddings": 16},
            "tie_word_embeddings": True,
        },
    ),
    "yarn": ("Qwen2", {"rope_parameters": {**YARN, "original_max_position_embeddings": 16}}),
    "yarn whole context": ("Qwen2", {"rope_parameters": YARN}),
    "yarn factor": (
        "Llama",
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 16, "attention_factor": 1.5, "beta_fast": 8}},
    ),
    "yarn mscale": (
        "Llama",
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 16, "mscale": 1.2, "mscale_all_dim": 0.4}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "qwen3 tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
}


def random_model(family: str, **changes: Any) -> PreTrainedModel:
    """A model whose weights, biases and norms are large enough for any difference to show."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "attn_implementation": "eager", **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    return model.eval()


def save_variant(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Save a model of the table as transformers saves it, and return it."""
    family, changes = VARIANTS[name]
    model = random_model(family, **changes).to(dtype)
    model.save_pretrained(folder, **options)
    return model


def random_ids(num_rows: int, seq_len: int, vocab_size: int = SIZES["vocab_size"]) -> Tensor:
    return torch.randint(0, vocab_size, (num_rows, seq_len), generator=torch.Generator().manual_seed(1))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; `...` takes a key out."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
