"""A decoder-only transformer of the Llama family, written for one device.

Reads top to bottom: norm, attention, MLP, block, decoder. Parameter names are those of Hugging Face's Llama, so a
checkpoint maps one to one. Nothing here knows of masking, of ranks or of a trainer.
"""

import torch
from torch import Tensor, nn

from meap_lit.model.attention import Attend, Documents, attention_within, causal_attention
from meap_lit.model.config import DecoderConfig
from meap_lit.model.init import init_parameter_
from meap_lit.model.kv_cache import KVCache
from meap_lit.model.loss import linear_cross_entropy
from meap_lit.model.norm import RMSNorm
from meap_lit.model.precision import residual
from meap_lit.model.rope import apply_rope, rope_angles
from meap_lit.model.swiglu import swiglu


class Attention(nn.Module):
    """Self-attention with grouped key-value heads and rotary positions; the caller passes the attention function."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.head_width
        self.head_dim = width
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)  # [B, H, T, head_dim]
        key = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)  # [B, H_kv, T, head_dim]
        value = self.v_proj(x).view(heads).transpose(1, 2)
        query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        y = attend(query, key, value)  # [B, H, T, head_dim]
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, T, D]


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """Attention and MLP, each with a norm before it and added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(nn.Linear):
    """Map hidden states to logits, or straight to their loss."""

    def loss(self, hidden: Tensor, labels: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the summed loss and that of each row, see `linear_cross_entropy`.

        A method of the module whose weight it reads, so that a strategy that shards the weight can gather it around
        the call.
        """
        return linear_cross_entropy(hidden, self.weight, labels, positions)


class Decoder(nn.Module):
    """Map token ids to hidden states; the head is a separate call, since a loss does not need all logits at once."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None, "a decoder needs a vocabulary"
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw random weights (`init.py`), and tie the head."""
        self.tie_weights()
        for name, parameter in self.named_parameters():
            init_parameter_(parameter, name, self.config)

    def tie_weights(self) -> None:
        """Make the embedding the head, if they are tied; `to_empty` (leaving the meta device) unties them."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        documents: Documents | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the final hidden states.

        Args:
            input_ids: Token ids, [B, T], int64, with T up to `config.max_seq_len`.
            position_ids: Positions of the tokens, [T] or [B, T], int64; 0 to T-1 if not given.
            documents: For packed rows: tokens attend within their document only. Whole rows if not given. With a
                cache, which holds one document a row: see `KVCache.attention`.
            cache: For generation: tokens attend to those stored at positions up to their own, and are stored.

        Returns:
            Hidden states after the final norm, [B, T, D].
        """
        attention = self._attention(input_ids.device, position_ids, documents, cache)
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device)
        cos, sin = rope_angles(self.config, position_ids)  # [..., T, head_dim]
        if cos.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]  # [B, 1, T, head_dim], the same for all heads
        x = residual(self.embed_tokens(input_ids))  # [B, T, D]
        for layer, attend in zip(self.layers, attention, strict=True):
            x = layer(x, cos, sin, attend)
        return self.norm(x)

    def _attention(
        self, device: torch.device, position_ids: Tensor | None, documents: Documents | None, cache: KVCache | None
    ) -> list[Attend]:
        """Return the attention function of each layer."""
        if cache is not None:
            return cache.attention(position_ids, documents)
        attend = causal_attention if documents is None else attention_within(documents, device)
        return [attend] * len(self.layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, [..., V], of hidden states [..., D]."""
        return self.lm_head(hidden)
