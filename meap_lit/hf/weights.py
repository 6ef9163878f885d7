"""Load weights from files into a decoder, one tensor at a time.

A decoder is allocated once, in its final dtype, and filled in place. So loading needs the memory of the model and one
tensor.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meap_lit.errors import UserError
from meap_lit.hf.config import sliding_window
from meap_lit.model.build import Write, allocate, copy_whole, meta_decoder
from meap_lit.model.config import DecoderConfig
from meap_lit.model.decoder import Decoder
from meap_lit.model.lora import is_adapter

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_ROWS = 1 << 12
"""Vocabulary rows that are averaged at once, which keeps their float32 copy small."""


@dataclass(frozen=True, kw_only=True)
class WeightSource(ABC):
    """Stored weights of a decoder. Parameters have the decoder's own names.

    Args:
        path: File or folder.
        config: The decoder; `vocab_size` is the number of rows that are stored.
        model_type: Hugging Face's family: llama, mistral, qwen2 or qwen3; None if no family fits.
        dtype: Dtype of the model. Tensors may be wider: a checkpoint of training holds float32.
        tokenizer_folder: Folder with the tokenizer.json of the model, if there is one.
        generation: Content of generation_config.json, and the ids that only config.json names.
        positions: The `POSITION_KEYS` of config.json.
        tokens_seen: Tokens that the model was trained on in our runs, if known.
    """

    path: Path
    config: DecoderConfig
    model_type: str | None
    dtype: torch.dtype
    tokenizer_folder: Path | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    positions: dict[str, Any] = field(default_factory=dict)
    tokens_seen: int | None = None

    @property
    def context(self) -> str:
        """Describe the longest input and what limits it, for messages."""
        tokens = f"{self.config.max_seq_len} tokens"
        stated = self.positions.get("max_position_embeddings")
        window = sliding_window(self.positions, self.model_type or "llama", self.config.num_layers, str(self.path))
        if stated is None or window is None or self.config.max_seq_len != window or window == stated:
            return tokens
        return f"{tokens} (its sliding window; max_position_embeddings is {stated})"

    def fingerprint(self) -> str:
        """Return a hash of some weights: the last norm, and the queries and values of the first block.

        Any training of the model or of usual adapters changes one of them. They are read in a moment.
        """
        digest = hashlib.sha256()
        for name in ("norm.weight", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.v_proj.weight"):
            digest.update(self.read(name).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all parameters; a tied head may be among them or not."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter without reading it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one parameter, on the CPU. Nothing else stays in memory. Do not write into it.

        Raises:
            UserError: If its file is damaged.
        """

    def where(self, name: str) -> Path:
        """Return the file that holds, or should hold, a parameter, for messages."""
        return self.path


def token_ids(generation: Mapping[str, Any], name: str) -> list[int]:
    """Return the ids under `name` of a generation_config.json, which may hold one id, a list or null."""
    ids: Any = generation.get(name)
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def build_decoder(
    config: DecoderConfig,
    source: WeightSource,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Return a decoder with the weights of `source`, in its dtype and on the CPU if not given.

    Args:
        config: The source's, or one with more vocabulary rows or another context.
        source: The weights.
        dtype: Dtype of the decoder.
        device: Device of the decoder.

    Raises:
        UserError: As `load_weights` does.
    """
    decoder = meta_decoder(config, dtype or source.dtype)
    allocate(decoder, device)
    load_weights(decoder, source)
    return decoder


def load_weights(
    decoder: Decoder, source: WeightSource, *, first_new_token: int | None = None, write: Write = copy_whole
) -> None:
    """Fill the parameters of `decoder` in place, tensor by tensor, cast to their dtype.

    If the decoder's vocabulary has more rows than the source's, embedding and head grow: new rows are the mean of the
    old ones. Since the exponential is convex, a new token is then never more likely than an old one is on average.
    Adapters are not changed.

    Args:
        decoder: An allocated decoder.
        source: The weights.
        first_new_token: Id of the mask token, if the model has not seen one before. Its row becomes the mean of the
            rows below, even if the source has a spare row for it (Qwen: 151,936 rows for 151,665 tokens).
        write: Writes a whole value into a parameter of which this device may hold a part.

    Raises:
        UserError: If a tensor is missing, unknown, of another shape or unreadable.
    """
    parameters = check_weights(decoder, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = source.read(name)
            if name in (EMBEDDING, HEAD) and (len(value) < len(parameter) or first_new_token is not None):
                rows = torch.empty(parameter.shape, dtype=parameter.dtype)  # means are not rounded to the file's dtype
                copy_rows(rows, value, first_new_token)
                value = rows
            write(parameter, value)


def check_weights(decoder: Decoder, source: WeightSource) -> dict[str, nn.Parameter]:
    """Check that `source` has the tensors of `decoder`, in their shapes, and no others.

    The decoder may be on the meta device, and only a tied head is read.

    Returns:
        The parameters by name, without a tied head and without adapters.

    Raises:
        UserError: If a tensor is missing, unknown or of another shape.
    """
    parameters = {name: value for name, value in decoder.named_parameters() if not is_adapter(name)}
    available = set(source.names())
    if decoder.config.tie_embeddings and HEAD in available:
        _check_tied(source)
        available.remove(HEAD)
    _check_names(set(parameters), available, source)
    for name, parameter in parameters.items():
        _check_shape(name, tuple(parameter.shape), source)
    return parameters


def copy_rows(target: Tensor, rows: Tensor, first_new_token: int | None = None) -> None:
    """Copy vocabulary rows, [V, D], into a `target` [V', D] with V' of at least V, in place.

    Rows from V on become the mean of all V rows. Row `first_new_token`, if it is below V, becomes the mean of the rows
    before it. Means are taken in float32.
    """
    target[: len(rows)].copy_(rows)
    if len(target) > len(rows):
        target[len(rows) :].copy_(_mean(rows))
    if first_new_token is not None and first_new_token < len(rows):
        target[first_new_token].copy_(_mean(rows[:first_new_token]))


def _mean(rows: Tensor) -> Tensor:
    return torch.stack([piece.float().sum(0) for piece in rows.split(_ROWS)]).sum(0) / len(rows)


def _check_names(wanted: set[str], available: set[str], source: WeightSource) -> None:
    for problem, names in (("has no tensor", wanted - available), ("has an unknown tensor", available - wanted)):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source.where(first)} {problem} {first}{more}; the model and its file do not fit")


def _check_shape(name: str, wanted: tuple[int, ...], source: WeightSource) -> None:
    found = source.shape(name)
    grows = name in (EMBEDDING, HEAD) and found[1:] == wanted[1:] and found[0] < wanted[0]
    if found != wanted and not grows:
        raise UserError(
            f"{source.where(name)}: tensor {name} has shape {_shape(found)}, the model needs {_shape(wanted)}"
        )


def _shape(sizes: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _check_tied(source: WeightSource) -> None:
    if source.shape(HEAD) != source.shape(EMBEDDING) or not torch.equal(source.read(HEAD), source.read(EMBEDDING)):
        raise UserError(
            f"{source.where(HEAD)}: the embeddings are tied but {HEAD} differs from {EMBEDDING}; "
            f"set tie_word_embeddings to false if the model has a head of its own"
        )
