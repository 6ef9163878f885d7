"""The configuration of a decoder, as a recipe gives it."""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from meap_lit.errors import UserError, check_range

VOCAB_MULTIPLE = 64
"""Embedding and head are padded to a multiple of this, which matrix units like (32,001 becomes 32,064)."""


def vocab_rows(num_tokens: int, rows: int | None = None, *, new_tokens: int = 0) -> int | None:
    """Return how many rows embedding and head have for a tokenizer.

    Args:
        num_tokens: Ids of the tokenizer, the mask token among them.
        rows: Rows that the recipe states, or that the weights have; if not given, the smallest multiple of
            `VOCAB_MULTIPLE` with room for all ids.
        new_tokens: How many of the ids may be new to the weights, which then grow to such a multiple.

    Returns:
        The rows; None if there are too few.
    """
    if rows is not None and num_tokens <= rows:
        return rows
    if rows is None or num_tokens - new_tokens <= rows:
        return -(-num_tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return None


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies to contexts longer than that of the pretraining.

    Args:
        type: `linear` divides every frequency by `factor`; `llama3` only the low ones; `yarn` blends by wavelength
            and sharpens the attention (arXiv 2309.00071).
        factor: Ratio of the new context to the old.
        original_max_seq_len: Context of the original pretraining, in tokens.
        low_freq_factor: `llama3`: wavelengths longer than original_max_seq_len / low_freq_factor are divided.
        high_freq_factor: `llama3`: wavelengths shorter than original_max_seq_len / high_freq_factor are kept.
        beta_fast: `yarn`: dimensions that turn more often than this within the old context are kept.
        beta_slow: `yarn`: dimensions that turn less often than this are divided.
        attention_factor: `yarn`: factor on cosine and sine; 0.1 * ln(factor) + 1 if not given.
    """

    type: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_seq_len: int = 4096
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_range("decoder.rope_scaling.factor", self.factor, "[1, inf)")
        check_range("decoder.rope_scaling.original_max_seq_len", self.original_max_seq_len, "[1, inf)")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise UserError(
                    f"decoder.rope_scaling.{low} must be above 0 and below {high}, "
                    f"got {getattr(self, low):g} and {getattr(self, high):g}"
                )
        check_range("decoder.rope_scaling.attention_factor", self.attention_factor, "(0, inf)")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama family; the defaults are the 1.1B model of the paper.

    Args:
        num_layers: Number of transformer blocks.
        num_heads: Number of query heads.
        num_kv_heads: Number of key-value heads; each serves num_heads / num_kv_heads query heads.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the SwiGLU.
        vocab_size: Rows of embedding and head; if not given, the tokenizer's size padded to a multiple of 64.
        max_seq_len: Longest input in tokens.
        head_dim: Width of a head; hidden_size / num_heads if not given.
        norm_eps: Epsilon of RMSNorm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Stretching of the rotary frequencies, none by default.
        tie_embeddings: Use the embedding as the head.
        qkv_bias: Bias on query, key and value projections (Qwen2).
        qk_norm: RMSNorm over each query and key head (Qwen3).
    """

    num_layers: int = 24
    num_heads: int = 32
    num_kv_heads: int = 2
    hidden_size: int = 2048
    intermediate_size: int = 5632
    vocab_size: int | None = None
    max_seq_len: int = 4096
    head_dim: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        counts = ("num_layers", "num_heads", "num_kv_heads", "hidden_size", "intermediate_size", "max_seq_len")
        for name in (*counts, "vocab_size", "head_dim"):
            value = getattr(self, name)  # the last two may be left open
            check_range(f"decoder.{name}", value, "[1, inf)")
        if self.num_layers > 10_000:  # the blocks are put together even by `plan`
            raise UserError(f"decoder.num_layers must be at most 10000, got {self.num_layers}")
        for name in ("norm_eps", "rope_theta"):
            check_range(f"decoder.{name}", getattr(self, name), "(0, inf)")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"decoder.num_heads must be a multiple of decoder.num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"decoder.hidden_size must be a multiple of decoder.num_heads, "
                f"got {self.hidden_size} and {self.num_heads}; or set decoder.head_dim"
            )
        if self.head_width % 2:
            raise UserError(f"decoder.head_dim must be even for rotary positions, got {self.head_width}")

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    def num_parameters(self) -> int:
        """Number of trained weights; a tied embedding counts once."""
        vocab = self._vocab_size() * self.hidden_size
        norms = self.hidden_size * (2 * self.num_layers + 1)
        biases = self.qkv_bias * self.num_layers * (self.num_heads + 2 * self.num_kv_heads) * self.head_width
        head_norms = self.qk_norm * self.num_layers * 2 * self.head_width
        return self._num_block_weights() + norms + biases + head_norms + vocab * (1 if self.tie_embeddings else 2)

    def flops_per_token(self, span: float, *, frozen: bool = False) -> int:
        """FLOPs of forward and backward for one token.

        6 per weight of a matrix product (blocks and head; the embedding is a look-up) and 12 * layers * heads *
        head_dim * span for the attention scores, the causal half not discounted (PaLM, arXiv 2204.02311,
        appendix B). Masking adds nothing.

        Args:
            span: Length of the run of tokens that attend among themselves: the row, or a document of a packed row.
            frozen: The weights have no gradient, only what flows through them; then it is 4 per weight. What adapters
                add is left out.
        """
        matrices = self._num_block_weights() + self._vocab_size() * self.hidden_size
        attention = 12 * self.num_layers * self.num_heads * self.head_width * span
        return round((4 if frozen else 6) * matrices + attention)

    def _num_block_weights(self) -> int:
        attention = self.hidden_size * self.head_width * 2 * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def _vocab_size(self) -> int:
        assert self.vocab_size is not None, "the vocabulary is not known before a tokenizer is"
        return self.vocab_size


@dataclass(frozen=True)
class Context:
    """Another context for an existing model; values that are not given keep those of the model.

    The paper's models of 32K and 64K have rotary base 640,000 (arXiv 2502.07490); stretching by `rope_scaling` is the
    other way. Either needs further training at the new length.

    Args:
        max_seq_len: Longest input in tokens.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Stretching of the rotary frequencies.
    """

    max_seq_len: int | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None

    def of(self, config: DecoderConfig) -> DecoderConfig:
        """`config` with this context."""
        given = {name: getattr(self, name) for name in asdict(self) if getattr(self, name) is not None}
        return replace(config, **given)
