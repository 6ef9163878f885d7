"""The method in pretraining: choose input tokens and replace them by the mask token.

MEAP (arXiv 2502.07490, section 3.1) replaces a share P of the *input* tokens by a mask token and leaves the
next-token targets clean. Everything here is a pure function of its arguments: a mask depends on
(seed, optimizer step, sample id, position) and on nothing else. No random state is read or advanced, so the same
sample gets the same mask on CPU and GPU, for any split of the batch, and after a resume.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

from meap_lit.errors import check_range


def num_masked(mask_ratio: float, seq_len: int) -> int:
    """Return the number of masked positions in a row of `seq_len` inputs: max(1, floor(P * T)), and 0 for P = 0.

    The product is rounded to nine digits before it is floored, so that 0.29 * 100 is 29 and not 28.
    """
    check_ratio("mask_ratio", mask_ratio)
    return max(1, math.floor(round(mask_ratio * seq_len, 9))) if mask_ratio > 0 else 0


def id_of_sample(source: int, index: int) -> int:
    """Return the id of a sample, which decides its masks.

    It must never change: a resumed run, and the same training in another trainer, draw the masks of the same ids.

    Args:
        source: Number of the dataset, counted from 0.
        index: Number of the sample in its dataset, below 2**32.
    """
    return (source << 32) + index


def mask_inputs(
    input_ids: Tensor,
    sample_ids: Tensor,
    *,
    mask_token_id: int,
    mask_ratio: float,
    seed: int,
    step: int,
    span_len: int = 1,
    protected: Tensor | None = None,
    protect_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Replace a random share of the input tokens by the mask token.

    Args:
        input_ids: Token ids, [B, T], int64. Not modified.
        sample_ids: Identity of each row's sample, [B], int64, on the device of `input_ids`. Rows with equal ids
            draw equal positions, so a constant here gives the whole batch one set, as the authors' released
            pretraining code does.
        mask_token_id: Id written at the chosen positions.
        mask_ratio: Share P of the positions to mask, in [0, 1). At 0 `input_ids` itself is returned.
        seed: Seed of the run; its low 64 bits count.
        step: Optimizer step; every visit of a sample draws anew.
        span_len: Length of the runs of neighboring positions that are masked together; see `sample_positions`.
        protected: Ids that are never masked, [V], bool, on the device of `input_ids`; none if not given. A row with
            fewer than `num_masked(P, T)` other tokens has all of those masked.
        protect_last: Whether the last position of a row is never masked.

    Returns:
        Masked ids, [B, T], and the input mask that chose them, [B, T], bool.

    Raises:
        UserError: If `mask_ratio` is outside [0, 1).

    Reference: MEAP, section 3.1 (masking for pretraining).
    """
    count = num_masked(mask_ratio, input_ids.size(1))
    if count == 0:
        return input_ids, torch.zeros_like(input_ids, dtype=torch.bool)
    eligible = torch.ones_like(input_ids, dtype=torch.bool) if protected is None else ~protected[input_ids]
    if protect_last:
        eligible[:, -1] = False
    counts = torch.full_like(sample_ids, count)
    input_mask = sample_positions(eligible, counts, sample_ids, seed=seed, step=step, span_len=span_len)
    return input_ids.masked_fill(input_mask, mask_token_id), input_mask


def sample_positions(
    eligible: Tensor, counts: Tensor, sample_ids: Tensor, *, seed: int, step: int, span_len: int = 1
) -> Tensor:
    """Draw `counts[b]` of the eligible positions of each row, uniformly and without replacement.

    Every position gets a pseudo-random key; the smallest keys of the row are taken. The hash is one-to-one, so no
    two keys of a row are equal and the choice does not depend on how a device breaks ties. Nothing here waits for
    the device.

    With `span_len` above 1 whole spans are drawn. Each row is closed to a ring and cut into spans from a drawn place
    on, so that its ends are drawn as often as its middle. Example, 8 positions, spans of 3, from position 2 on:
    2 3 4 | 5 6 7 | 0 1. If 0 1 is drawn first and 5 6 7 next, a count of 4 takes 0 1 5 6.

    Args:
        eligible: Positions that may be drawn, [B, T], bool.
        counts: How many to draw in each row, [B], int64; capped at the row's eligible positions.
        sample_ids: As for `mask_inputs`.
        seed: As for `mask_inputs`.
        step: As for `mask_inputs`.
        span_len: Length of the spans, at least 1. The last one that a row draws is taken in part.

    Returns:
        The drawn positions, [B, T], bool.
    """
    seq_len = eligible.size(1)
    position = torch.arange(seq_len, device=eligible.device)  # [T]
    row = _fold(_fold(_fold(_START, seed), step), sample_ids)[:, None]  # [B, 1]
    if span_len > 1:
        start = _hash(row ^ _hash(_UINT32)) % seq_len  # [B, 1], drawn as the key of a position that no row has
        position = (position - start) % seq_len  # [B, T], on the ring
    keys = _hash(row ^ _hash(position // span_len))  # [B, T], below 2**32, one for each span
    keys = (keys * seq_len + position).masked_fill(~eligible, seq_len << 32)
    counts = torch.minimum(counts, eligible.sum(dim=1))  # [B]
    ordered = keys.sort(dim=1).values
    threshold = ordered.gather(1, (counts - 1).clamp(min=0)[:, None])  # [B, 1], largest key that is taken
    return (keys <= threshold) & (counts > 0)[:, None]


def rare_ids(counts: Tensor, share: float) -> Tensor:
    """Return the rarest token ids, [V], bool, which together make up at most `share`, in [0, 1), of the tokens.

    `counts` are the occurrences of each id in the data, [V], int64. Equally rare ids are taken together or not at all.
    With a share of 0 these are the ids that do not occur.
    """
    ascending = counts.sort().values
    last_as_rare = torch.searchsorted(ascending, counts, right=True) - 1  # [V]
    tokens = ascending.cumsum(0)[last_as_rare]  # [V], of each id and all that are not more frequent
    return tokens <= round(share * int(counts.sum()), 9)


_START = 0x9E3779B9  # any constant but 0, which the hash maps to itself
_UINT32 = 0xFFFFFFFF
_Integers = TypeVar("_Integers", int, Tensor)


def _fold(state: int, value: _Integers) -> _Integers:
    """Mix a 64-bit value into a 32-bit state, its low half and then its high half.

    Values are hashed before they are combined with the state. Otherwise two neighboring states would draw shifted
    copies of one another's masks.
    """
    half_way = _hash(state ^ _hash(value & _UINT32))
    return _hash(half_way ^ _hash((value >> 32) & _UINT32))


def _hash(x: _Integers) -> _Integers:
    """Hash [0, 2**32) one to one, for Python integers and int64 tensors alike.

    Constants and shifts of the "lowbias32" mixer (Chris Wellons, "Prospecting for Hash Functions", 2018). The
    second constant, 0x846CA68B, is written less 2**32: equal modulo 2**32, but no product leaves int64. Without
    overflow, every device agrees to the bit.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _UINT32
    x = ((x ^ (x >> 15)) * -0x7B935975) & _UINT32
    return x ^ (x >> 16)


def check_ratio(name: str, value: float) -> None:
    """Raise `UserError`, which names the key, unless `value` is in [0, 1)."""
    hint = f"; write {value / 100:g} for {value:g}%" if 1 <= value < 100 else ""
    check_range(name, value, "[0, 1)", hint)
