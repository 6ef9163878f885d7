"""The method by hand-written answers and by the properties that resuming, splitting and comparing runs rest on."""

import math
import random

import pytest
import torch
from torch import Tensor

from meap_lit.errors import UserError
from meap_lit.masking import id_of_sample, mask_inputs, num_masked, rare_ids, sample_positions
from meap_lit.masking.schedules import Constant

MASK = 999


def draw(
    rows: int, seq_len: int, count: int, *, seed: int = 0, step: int = 0, first_sample: int = 0, span_len: int = 1
) -> Tensor:
    """`count` positions of each of `rows` consecutive samples, all positions eligible, [rows, seq_len], bool."""
    eligible = torch.ones(rows, seq_len, dtype=torch.bool)
    sample_ids = torch.arange(first_sample, first_sample + rows)
    counts = torch.full((rows,), count)
    return sample_positions(eligible, counts, sample_ids, seed=seed, step=step, span_len=span_len)


def ids(*protected: int, vocab_size: int = 101) -> Tensor:
    """The look-up of protected ids, [vocab_size], bool."""
    return torch.isin(torch.arange(vocab_size), torch.tensor(protected))


# ------------------------------------------------------------------------------------------------ how many


@pytest.mark.parametrize(
    ("mask_ratio", "seq_len", "expected"),
    [
        (0.15, 4096, 614),
        (0.15, 20, 3),
        (0.15, 13, 1),
        (0.15, 3, 1),  # never none
        (0.001, 10, 1),
        (0.05, 128, 6),
        (0.10, 128, 12),
        (0.20, 128, 25),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.57, 100, 57),  # and 0.57 * 100 is 56.99999999999999
        (0.999, 1000, 999),
        (0.0, 4096, 0),
    ],
)
def test_count_is_the_floor_of_the_share_and_at_least_one(mask_ratio: float, seq_len: int, expected: int) -> None:
    assert num_masked(mask_ratio, seq_len) == expected
    input_ids = torch.zeros(3, seq_len, dtype=torch.int64)
    masked, input_mask = mask_inputs(
        input_ids, torch.arange(3), mask_token_id=MASK, mask_ratio=mask_ratio, seed=5, step=7
    )
    assert input_mask.sum(dim=1).tolist() == [expected] * 3
    assert torch.equal(masked == MASK, input_mask)


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.0, 15, math.nan])
def test_ratio_outside_the_unit_interval_is_refused(mask_ratio: float) -> None:
    with pytest.raises(UserError, match=r"^mask_ratio must be in \[0, 1\), got "):
        num_masked(mask_ratio, 100)


def test_percentage_is_recognized() -> None:
    with pytest.raises(UserError) as error:
        Constant(15)
    assert str(error.value) == "model.mask_ratio must be in [0, 1), got 15; write 0.15 for 15%"


# ------------------------------------------------------------------------------------------------ which


def test_masked_tokens_are_replaced_and_the_others_kept() -> None:
    input_ids = torch.arange(40).view(2, 20)
    before = input_ids.clone()
    masked, input_mask = mask_inputs(
        input_ids, torch.tensor([3, 4]), mask_token_id=MASK, mask_ratio=0.15, seed=1, step=2
    )
    assert input_mask.any(), "no token was masked"
    assert torch.equal(masked, torch.where(input_mask, MASK, before))
    assert torch.equal(input_ids, before), "the input was modified"
    assert masked.dtype == torch.int64
    assert input_mask.dtype == torch.bool


def test_ratio_zero_is_plain_next_token_prediction() -> None:
    input_ids = torch.arange(40).view(2, 20)
    masked, input_mask = mask_inputs(
        input_ids, torch.tensor([3, 4]), mask_token_id=MASK, mask_ratio=0.0, seed=1, step=2
    )
    assert masked is input_ids
    assert not input_mask.any()


def test_golden_masks() -> None:
    """Frozen: a change of the hash would silently change every run that is resumed or repeated."""
    cases = {
        (0, 0, 0): [10, 11, 19, 20, 33, 37, 50, 57, 63],
        (42, 1000, 123_456_789): [2, 11, 17, 19, 20, 28, 48, 51, 55],
        (-1, 7, -5): [6, 8, 21, 28, 41, 43, 51, 56, 58],
        (2**40 + 3, 190_000, 2**35 + 11): [12, 18, 24, 31, 35, 39, 46, 54, 58],
    }
    for (seed, step, sample_id), expected in cases.items():
        chosen = draw(1, 64, 9, seed=seed, step=step, first_sample=sample_id)
        assert chosen[0].nonzero().flatten().tolist() == expected, (seed, step, sample_id)


def test_the_last_position_is_left_alone_where_it_is_protected() -> None:
    input_ids = torch.randint(5, 100, (300, 20), generator=torch.Generator().manual_seed(0))
    options = {"mask_token_id": MASK, "mask_ratio": 0.3, "seed": 0, "step": 0}
    _, input_mask = mask_inputs(input_ids, torch.arange(300), **options)
    assert input_mask[:, -1].any(), "it would be masked otherwise"
    for protected in (None, ids(7)):
        _, input_mask = mask_inputs(input_ids, torch.arange(300), protected=protected, protect_last=True, **options)
        assert not input_mask[:, -1].any()
        assert (input_mask.sum(1) == 6).all()
        assert input_mask[:, :-1].any(0).all(), "every other position is masked in some row"


def test_protected_ids_are_never_masked() -> None:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 5, (200, 30), generator=generator)
    _, input_mask = mask_inputs(
        input_ids, torch.arange(200), mask_token_id=MASK, mask_ratio=0.3, seed=0, step=0, protected=ids(1, 2)
    )
    protected = (input_ids == 1) | (input_ids == 2)
    assert protected.any()
    assert not (input_mask & protected).any()
    assert input_mask.sum(dim=1).tolist() == [9] * 200


def test_too_few_eligible_tokens_are_all_masked() -> None:
    input_ids = torch.tensor([[1, 1, 5, 1, 6, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5, 5, 5]])
    masked, input_mask = mask_inputs(
        input_ids, torch.arange(3), mask_token_id=MASK, mask_ratio=0.5, seed=0, step=0, protected=ids(1)
    )
    assert masked[0].tolist() == [1, 1, MASK, 1, MASK, 1, 1, 1]
    assert masked[1].tolist() == [1] * 8
    assert input_mask.sum(dim=1).tolist() == [2, 0, 4]


def test_each_row_has_its_own_count() -> None:
    eligible = torch.ones(4, 10, dtype=torch.bool)
    eligible[3, 2:] = False
    chosen = sample_positions(eligible, torch.tensor([0, 1, 10, 5]), torch.arange(4), seed=0, step=0)
    assert chosen.sum(dim=1).tolist() == [0, 1, 10, 2]


def test_more_masks_contain_fewer() -> None:
    """A schedule that raises P adds positions to those it had."""
    few, many = draw(8, 100, 10), draw(8, 100, 30)
    assert torch.equal(few & many, few)


# ------------------------------------------------------------------------------------------------ spans


def spans(row: Tensor) -> list[list[int]]:
    """Runs of neighboring drawn positions of a row, its end and its beginning taken for neighbors."""
    drawn = set(row.nonzero().flatten().tolist())
    starts = [position for position in drawn if (position - 1) % len(row) not in drawn]
    runs = []
    for start in starts:
        run = [start]
        while (run[-1] + 1) % len(row) in drawn:
            run.append((run[-1] + 1) % len(row))
        runs.append(run)
    return runs


@pytest.mark.parametrize(
    ("seq_len", "count", "span_len"), [(60, 9, 3), (60, 10, 3), (64, 9, 3), (50, 7, 5), (48, 1, 4)]
)
def test_whole_spans_are_drawn(seq_len: int, count: int, span_len: int) -> None:
    """All but the last drawn and the one that closes the ring have their length."""
    chosen = draw(200, seq_len, count, span_len=span_len)
    assert chosen.sum(dim=1).tolist() == [count] * 200
    for row in chosen:
        runs = spans(row)
        shorter = (count % span_len > 0) + 2 * (seq_len % span_len > 0)
        assert sum(len(run) % span_len > 0 for run in runs) <= shorter, runs
        assert len(runs) <= math.ceil(count / span_len) + (seq_len % span_len > 0)
    if span_len == 3 and count == 9:
        assert any(len(spans(row)) == 3 for row in chosen), "spans stand alone, not only beside each other"


def test_golden_spans() -> None:
    """Frozen, as the single positions are."""
    cases = {
        (0, 0, 0): [7, 11, 12, 13, 14, 15, 16, 17, 18],
        (42, 1000, 123_456_789): [1, 2, 3, 4, 37, 38, 39, 40, 57],
        (-1, 7, -5): [16, 52, 53, 54, 55, 60, 61, 62, 63],
    }
    for (seed, step, sample_id), expected in cases.items():
        chosen = draw(1, 64, 9, seed=seed, step=step, first_sample=sample_id, span_len=4)
        assert chosen[0].nonzero().flatten().tolist() == expected, (seed, step, sample_id)


@pytest.mark.parametrize("span_len", [1, 64, 100])
def test_a_span_as_long_as_the_row_is_one_window_anywhere(span_len: int) -> None:
    chosen = draw(400, 64, 9, span_len=span_len)
    if span_len == 1:
        assert max(len(spans(row)) for row in chosen) > 1
        return
    assert all(len(spans(row)) == 1 for row in chosen)
    assert chosen.any(dim=0).all(), "every position is drawn in some row"


@pytest.mark.parametrize(("seq_len", "count", "span_len"), [(32, 5, 3), (30, 8, 4), (16, 2, 10)])
def test_positions_at_the_ends_are_drawn_as_often_as_others(seq_len: int, count: int, span_len: int) -> None:
    rows = 20_000
    drawn = draw(rows, seq_len, count, span_len=span_len).sum(dim=0)
    share = count / seq_len
    assert (drawn - rows * share).abs().max().item() < 5 * math.sqrt(rows * share * (1 - share))


def test_protected_tokens_interrupt_a_span() -> None:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 5, (200, 30), generator=generator)
    _, input_mask = mask_inputs(
        input_ids, torch.arange(200), mask_token_id=MASK, mask_ratio=0.3, seed=0, step=0, protected=ids(1), span_len=4
    )
    assert not (input_mask & (input_ids == 1)).any()
    assert input_mask.sum(dim=1).tolist() == [9] * 200


# ------------------------------------------------------------------------------------------------ rare tokens


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, [3]),  # what does not occur
        (0.07, [3]),  # ids 1 and 4 are equally rare and 4 of 50 together; one alone would fit
        (0.08, [1, 3, 4]),
        (0.13, [1, 3, 4]),
        (0.14, [1, 3, 4, 5]),
        (0.5, [0, 1, 3, 4, 5]),
        (0.99, [0, 1, 3, 4, 5]),
    ],
)
def test_rare_ids_make_up_at_most_their_share(share: float, expected: list[int]) -> None:
    counts = torch.tensor([13, 2, 30, 0, 2, 3])
    assert rare_ids(counts, share).nonzero().flatten().tolist() == expected


def test_share_of_rare_ids_is_not_a_matter_of_rounding() -> None:
    assert rare_ids(torch.tensor([29, 71]), 0.29).tolist() == [True, False]  # 0.29 * 100 is 28.999999999999996


# ------------------------------------------------------------------------------------------------ pure function


@pytest.mark.parametrize("span_len", [1, 3])
def test_mask_does_not_depend_on_how_the_batch_is_split(span_len: int) -> None:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 50, (8, 64), generator=generator)
    sample_ids = torch.randint(0, 2**40, (8,), generator=generator)

    def mask(rows: Tensor) -> Tensor:
        return mask_inputs(
            input_ids[rows],
            sample_ids[rows],
            mask_token_id=MASK,
            mask_ratio=0.15,
            seed=3,
            step=11,
            protected=ids(0, 1),
            span_len=span_len,
        )[0]

    rows = torch.arange(8)
    whole = mask(rows)
    assert (whole == MASK).any()
    assert torch.equal(torch.cat([mask(half) for half in rows.split(4)]), whole)
    assert torch.equal(torch.cat([mask(row) for row in rows.split(1)]), whole)
    permuted = torch.randperm(8, generator=generator)
    assert torch.equal(mask(permuted), whole[permuted])


def test_the_id_of_a_sample_is_fixed() -> None:
    assert [id_of_sample(0, 7), id_of_sample(2, 5), id_of_sample(1, 2**32 - 1)] == [7, 2 * 2**32 + 5, 2 * 2**32 - 1]


def test_equal_sample_ids_share_positions() -> None:
    eligible = torch.ones(3, 64, dtype=torch.bool)
    chosen = sample_positions(eligible, torch.full((3,), 9), torch.tensor([7, 8, 7]), seed=0, step=0)
    assert torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0], chosen[1])


def test_every_part_of_the_key_changes_the_mask() -> None:
    """Also the high half of a 64-bit seed or sample id, and the sign."""
    keys = [(0, 0, 0)]
    keys += [(seed, 0, 0) for seed in (1, 2, -1, 2**32, 2**32 + 1, 2**33, 2**63)]
    keys += [(0, step, 0) for step in (1, 2, 190_000)]
    keys += [(0, 0, sample) for sample in (1, 2, -1, -(2**32), 2**32, 2**32 + 1, 2**33, 2**62)]
    keys += [(1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1), (2, 2, 2)]
    masks = {
        tuple(draw(1, 256, 38, seed=seed, step=step, first_sample=sample)[0].nonzero().flatten().tolist())
        for seed, step, sample in keys
    }
    assert len(masks) == len(keys)


def test_no_global_random_state_is_touched() -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    mask_inputs(
        torch.zeros(2, 50, dtype=torch.int64), torch.arange(2), mask_token_id=1, mask_ratio=0.15, seed=0, step=0
    )
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_long_row_draws_the_exact_number_of_positions() -> None:
    """No two of the 65,536 keys of a row are equal; among as many random 32-bit keys, some would be."""
    chosen = draw(8, 65_536, 9_830, seed=1)
    assert chosen.sum(dim=1).tolist() == [9_830] * 8


# ------------------------------------------------------------------------------------------------ randomness
# Seeds are fixed, so these tests give the same answer every time; bounds are 5 standard deviations.

SEQ_LEN, COUNT, SAMPLES, STEPS = 256, 38, 64, 64


@pytest.fixture(scope="module")
def masks() -> Tensor:
    """[STEPS, SAMPLES, SEQ_LEN], float, centred on the share."""
    drawn = torch.stack([draw(SAMPLES, SEQ_LEN, COUNT, seed=42, step=step) for step in range(STEPS)])
    return drawn.double() - COUNT / SEQ_LEN


def test_positions_are_uniform(masks: Tensor) -> None:
    share = COUNT / SEQ_LEN
    draws = STEPS * SAMPLES
    deviation = masks.sum(dim=(0, 1))  # of each position's count from its mean
    chi_square = (deviation**2 / (draws * share * (1 - share))).sum().item()
    assert abs(chi_square - SEQ_LEN) < 5 * math.sqrt(2 * SEQ_LEN)


@pytest.mark.parametrize(
    ("step_lag", "sample_lag", "position_lag"),
    [(1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 1, -1), (2, 0, 0), (0, 2, 0)],
)
def test_masks_of_neighbors_are_independent(masks: Tensor, step_lag: int, sample_lag: int, position_lag: int) -> None:
    share = COUNT / SEQ_LEN
    other = masks.roll((step_lag, sample_lag, position_lag), dims=(0, 1, 2))
    correlation = (masks * other).mean().item() / (share * (1 - share))
    within_row = step_lag == sample_lag == 0
    expected = -1 / (SEQ_LEN - 1) if within_row else 0.0  # drawn without replacement
    assert abs(correlation - expected) < 5 / math.sqrt(masks.numel())
