"""The method in fine-tuning, by hand and against the authors' released rule."""

import numpy as np
import pytest
import torch

from meap_lit.errors import UserError
from meap_lit.masking import num_masked
from meap_lit.masking.duplication import Answer, Duplication, concatenate, masked_copy, original
from meap_lit.model.loss import IGNORE_INDEX

MASK = 99
X = IGNORE_INDEX


def copy_of(input_ids, answers, duplication, seed=0, sample_id=0, visit=0):
    return masked_copy(
        torch.tensor(input_ids), answers, duplication, mask_token_id=MASK, seed=seed, sample_id=sample_id, visit=visit
    )


# ------------------------------------------------------------------------------------------------- by hand

# a user turn of three tokens, an answer of four closed by token 2, a user turn of two, an answer of one closed by 2
TOKENS = [1, 11, 12, 21, 22, 23, 24, 2, 13, 14, 25, 2]
ANSWERS = [Answer(3, 7, 8), Answer(10, 11, 12)]
# 40% of four tokens is one mask; the second answer is too short to be copied. Seed 0 draws token 22 at position 4.
BY_HAND = Duplication(mask_ratio=0.4, min_copied=1)
COPY = [1, 11, 12, 21, MASK, 23, 24, 2, 13, 14, 25, 2]
COPY_LABELS = [X, X, X, 22, X, X, X, X, X, X, X, X]


def test_the_original_by_hand():
    document = original(torch.tensor(TOKENS), ANSWERS)
    assert document.input_ids.tolist() == [1, 11, 12, 21, 22, 23, 24, 2, 13, 14, 25, 2]
    assert document.labels.tolist() == [X, X, 21, 22, 23, 24, 2, X, X, 25, 2, X]
    assert document.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert not document.in_copy.any()


def test_the_masked_copy_by_hand():
    document = copy_of(TOKENS, ANSWERS, BY_HAND)
    assert document.input_ids.tolist() == COPY
    assert document.labels.tolist() == COPY_LABELS
    assert document.position_ids.tolist() == list(range(12))
    assert document.in_copy.all()


@pytest.mark.parametrize(
    ("copy_positions", "positions"),
    [
        ("continued", [*range(24)]),
        ("restarted", [*range(12), *range(12)]),
    ],
)
def test_the_concatenation_by_hand(copy_positions, positions):
    document = concatenate(
        original(torch.tensor(TOKENS), ANSWERS), copy_of(TOKENS, ANSWERS, BY_HAND), copy_positions=copy_positions
    )
    assert document.input_ids.tolist() == [*TOKENS, *COPY]
    assert document.labels.tolist() == [X, X, 21, 22, 23, 24, 2, X, X, 25, 2, X, *COPY_LABELS]
    assert document.position_ids.tolist() == positions
    assert document.in_copy.tolist() == [False] * 12 + [True] * 12


# ------------------------------------------------------------------------------------------- released code


def released_rule(source, target, eos, drawn):
    """Inputs and labels of scitix/MEAP, `MEAP-SFT/MEAP-SFT.py`, `preprocess_function`, for one turn that is not cut.

    Its labels stand at the token itself; the Hugging Face model it trains shifts them by one.
    """
    whole = [*source, *target, eos]
    samples = [(whole, [X] * len(source) + [*target, eos])]
    if len(target) > 50:
        assert len(drawn) == max(1, int(len(target) * 0.1))
        masked = [MASK if position in drawn else token for position, token in enumerate(whole)]
        labels = [token if position in drawn else X for position, token in enumerate(whole)]
        samples.append((masked, labels))
    return samples


@pytest.mark.parametrize("answer_tokens", [1, 49, 50, 51, 60, 119, 120, 400])
def test_layout_separate_is_the_released_rule(answer_tokens):
    source, target, eos = [1, 500, 501], list(range(600, 600 + answer_tokens)), 2
    tokens, answers = [*source, *target, eos], [Answer(3, 3 + answer_tokens, 4 + answer_tokens)]
    duplication = Duplication(mask_ratio=0.10, layout="separate")
    ours = [original(torch.tensor(tokens), answers)]
    if duplication.num_masked(np.array([answer_tokens]))[0] > 0:
        ours.append(copy_of(tokens, answers, duplication))
    drawn = set((ours[-1].input_ids == MASK).nonzero().flatten().tolist())
    theirs = released_rule(source, target, eos, drawn)
    assert len(ours) == len(theirs) == (2 if answer_tokens > 50 else 1)
    for document, (input_ids, labels) in zip(ours, theirs, strict=True):
        assert document.input_ids.tolist() == input_ids
        assert document.labels.tolist() == [*labels[1:], X], "shifted as the model does"


# ---------------------------------------------------------------------------------------------- properties

LONG = [Answer(2, 103, 104), Answer(110, 170, 171), Answer(180, 230, 231)]  # 101, 60 and 50 tokens


def test_every_long_answer_loses_its_exact_share():
    tokens = list(range(1000, 1240))
    document = copy_of(tokens, LONG, Duplication())
    masked = document.input_ids == MASK
    assert [int(masked[a.start : a.stop].sum()) for a in LONG] == [num_masked(0.1, 101), num_masked(0.1, 60), 0]
    assert int(masked.sum()) == 16, "and nothing else is masked"
    supervised = document.labels != X
    assert torch.equal(supervised[:-1], masked[1:]), "a masked token is predicted where the token before it stands"
    assert torch.equal(document.labels[supervised], torch.tensor(tokens)[masked])


def test_without_masks_the_copy_keeps_its_tokens_and_its_labels():
    tokens = list(range(1000, 1240))
    masked, control = (copy_of(tokens, LONG, Duplication(mask_inputs=flag)) for flag in (True, False))
    assert control.input_ids.tolist() == tokens
    assert (masked.input_ids == MASK).sum() == 16
    assert torch.equal(control.labels, masked.labels)


def test_every_visit_and_every_sample_draws_anew_and_the_same_one_alike():
    def drawn(**key):
        return tuple((copy_of(list(range(240)), LONG, Duplication(), **key).input_ids == MASK).nonzero().flatten())

    assert drawn(visit=1) == drawn(visit=1)
    draws = [drawn(seed=s, sample_id=i, visit=v) for s in (0, 1) for i in (0, 1, 1 << 32) for v in (0, 1)]
    assert len({tuple(map(int, draw)) for draw in draws}) == len(draws)


def test_positions_are_drawn_evenly():
    duplication = Duplication(mask_ratio=0.25, min_copied=0)
    counts = torch.zeros(10)
    for visit in range(2000):
        counts += copy_of(list(range(10)), [Answer(2, 10, 10)], duplication, visit=visit).input_ids == MASK
    assert counts[:2].sum() == 0
    expected = 2000 * 2 / 8
    assert (counts[2:] - expected).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5  # five standard deviations


def test_ratio_zero_masks_nothing():
    assert Duplication(mask_ratio=0.0).num_masked(np.array([1, 51, 5000])).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 10}, "data.duplication.mask_ratio must be in [0, 1), got 10; write 0.1 for 10%"),
        ({"min_copied": -1}, "data.duplication.min_copied must be at least 0, got -1"),
    ],
)
def test_wrong_options_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        Duplication(**arguments)
    assert str(error.value) == message
