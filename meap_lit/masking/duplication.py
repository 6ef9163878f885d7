"""The method in fine-tuning: every sequence twice, with a share of the copy's answer masked.

A sample is a conversation of n tokens; some runs of them, the answers, are learned. MEAP (arXiv 2502.07490,
section 3.2) appends a copy in which a share P of the answer's tokens is the mask token. The loss is taken on the
answer of the original (U_q) and on the masked tokens of the copy (U_m); the label of a token is at the position
before it, where a causal decoder predicts it. Everything here is a pure function of its arguments.

Example, one answer `d e` closed by `.`, and `d` masked in the copy (`_` is the mask, `-` is no label):

    tokens               a b c d e .
    original   input     a b c d e .        labels   - - d e . -
    copy       input     a b c _ e .        labels   - - d - - -

`separate` makes two documents of these, `concat` one of twice the length, in which the copy sees the original.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from meap_lit.errors import check_range
from meap_lit.masking import check_ratio, num_masked, sample_positions
from meap_lit.model.loss import IGNORE_INDEX


class Answer(NamedTuple):
    """An answer: tokens start to stop - 1, then tokens stop to end - 1 that close it (supervised, never masked)."""

    start: int
    stop: int
    end: int


@dataclass(frozen=True)
class Document:
    """A run of tokens that attend only to each other; every field is [n].

    Args:
        input_ids: Token ids, int64.
        labels: Target of each position, int64; `IGNORE_INDEX` where nothing is learned.
        position_ids: Rotary positions, int64.
        in_copy: Whether the position belongs to a masked copy, bool.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    in_copy: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Duplication:
    """Options of the duplication and its masks; the defaults are the paper's.

    Args:
        mask_ratio: Share P of an answer's tokens that is masked in the copy; with 0 there are no copies and the run is
            plain supervised fine-tuning.
        layout: `concat` appends the copy to the original, which it can attend to (the paper's formula); `separate`
            makes it a sample of its own (the authors' released code).
        copy_positions: `concat` only: positions of the copy are `continued` from the original's or `restarted` at 0.
        min_copied: Only answers of more tokens than this are masked; a sample without one gets no copy.
        no_room: `concat` only: what to do when a sample fits into a row but not twice: `stop`, or `skip_copy` to train
            on the original alone.
        mask_inputs: False leaves the copy as the original is, with the loss at the positions that masks would have: the
            control that tells masks from copies. The paper does not have it.
    """

    mask_ratio: float = 0.10
    layout: Literal["concat", "separate"] = "concat"
    copy_positions: Literal["continued", "restarted"] = "continued"
    min_copied: int = 50
    no_room: Literal["stop", "skip_copy"] = "stop"
    mask_inputs: bool = True

    def __post_init__(self) -> None:
        check_ratio("data.duplication.mask_ratio", self.mask_ratio)
        check_range("data.duplication.min_copied", self.min_copied, "[0, inf)")

    def num_masked(self, answer_tokens: np.ndarray) -> np.ndarray:
        """Return the masked tokens of each answer, [A] int64, given its tokens without those that close it, [A]."""
        # an answer is never longer than a row, so the distinct lengths are few
        lengths, inverse = np.unique(answer_tokens, return_inverse=True)
        counts = [num_masked(self.mask_ratio, int(n)) if n > self.min_copied else 0 for n in lengths]
        return np.array(counts, dtype=np.int64)[inverse]


def original(input_ids: Tensor, answers: Sequence[Answer]) -> Document:
    """Return the sample, [n], unchanged, with the labels of its answers; none begins at the first token."""
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for answer in answers:
        assert answer.start > 0, "no position predicts the first token"
        labels[answer.start - 1 : answer.end - 1] = input_ids[answer.start : answer.end]
    return Document(input_ids, labels, torch.arange(len(input_ids)), torch.zeros(len(input_ids), dtype=torch.bool))


def masked_copy(
    input_ids: Tensor,
    answers: Sequence[Answer],
    duplication: Duplication,
    *,
    mask_token_id: int,
    seed: int,
    sample_id: int,
    visit: int,
) -> Document:
    """Return the copy, with masks in every long answer and labels at the masked tokens only.

    Each answer longer than `duplication.min_copied` loses exactly `num_masked(mask_ratio, its length)` tokens.
    `visit` is the number of earlier visits of the sample, token ids [n], int64; every visit draws other masks.
    """
    lengths = np.array([answer.stop - answer.start for answer in answers])
    positions = torch.arange(len(input_ids))
    spans = torch.tensor([[answer.start, answer.stop] for answer in answers])  # [A, 2]
    eligible = (positions >= spans[:, :1]) & (positions < spans[:, 1:])  # [A, n]
    counts = torch.from_numpy(duplication.num_masked(lengths))  # [A]
    sample_ids = torch.full_like(counts, sample_id)
    input_mask = sample_positions(eligible, counts, sample_ids, seed=seed, step=visit).any(dim=0)  # [n]
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:-1] = torch.where(input_mask[1:], input_ids[1:], IGNORE_INDEX)
    in_copy = torch.ones(len(input_ids), dtype=torch.bool)
    if duplication.mask_inputs:
        input_ids = input_ids.masked_fill(input_mask, mask_token_id)
    return Document(input_ids, labels, positions, in_copy)


def concatenate(first: Document, copy: Document, copy_positions: Literal["continued", "restarted"]) -> Document:
    """Join original and copy into one document of 2n tokens, in which the copy attends to the original."""
    shift = len(first) if copy_positions == "continued" else 0
    return Document(
        torch.cat((first.input_ids, copy.input_ids)),
        torch.cat((first.labels, copy.labels)),
        torch.cat((first.position_ids, copy.position_ids + shift)),
        torch.cat((first.in_copy, copy.in_copy)),
    )
