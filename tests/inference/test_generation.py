"""Continuations against a plain loop over whole rows, and the choice of a token against transformers."""

import itertools
import random

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from meap_lit.errors import UserError
from meap_lit.inference import generation
from meap_lit.inference.generation import GREEDY, Sampling, choose_tokens, common_beginning, generate
from meap_lit.model import Decoder, DecoderConfig

VOCAB_SIZE = 64
PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2, 1], [20, 21, 22, 23, 24], [30, 31]]
SHAPES = {
    "grouped heads": {},
    "no grouping, tied": {"num_kv_heads": 4, "tie_embeddings": True},
    "qk_norm": {"num_kv_heads": 1, "qk_norm": True, "head_dim": 12},
    "qkv_bias": {"qkv_bias": True},
}


def random_decoder(max_seq_len: int = 48, **changes: object) -> Decoder:
    """Weights large enough that the next token hangs on all before it."""
    values = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    config = DecoderConfig(**{**values, **changes}, vocab_size=VOCAB_SIZE, max_seq_len=max_seq_len)  # type: ignore[arg-type]
    decoder = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1))
    return decoder


@torch.no_grad()
def plain(
    decoder: Decoder, prompt: list[int], num_tokens: int, sampling: Sampling = GREEDY, index: int = 0
) -> list[int]:
    """Read the whole row again for every token."""
    draws = random.Random(f"{sampling.seed}/{index}")
    ids = list(prompt)
    for _ in range(num_tokens):
        logits = decoder.logits(decoder(torch.tensor([ids]))[:, -1]).float()
        ids.append(int(choose_tokens(logits, sampling, [draws.random()])))
    return ids[len(prompt) :]


def plain_all(decoder: Decoder, prompts: list[list[int]], num_tokens: int, sampling: Sampling) -> list[list[int]]:
    return [plain(decoder, prompt, num_tokens, sampling, index) for index, prompt in enumerate(prompts)]


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_greedy_is_the_plain_loop_however_it_is_batched(changes: dict[str, object]) -> None:
    decoder = random_decoder(**changes)
    expected = [plain(decoder, prompt, 30) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) == len(PROMPTS), "continuations this alike would agree by chance"
    for batch_size in (1, 2, 8):
        assert generate(decoder, PROMPTS, max_new_tokens=30, batch_size=batch_size) == expected, batch_size


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.slow
def test_sampling_does_not_depend_on_the_batch(changes: dict[str, object]) -> None:
    decoder = random_decoder(**changes)
    sampling = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=3)
    expected = plain_all(decoder, PROMPTS, 30, sampling)
    assert len(set(map(tuple, expected))) == len(PROMPTS)
    for batch_size in (1, 2, 8):
        new_ids = generate(decoder, PROMPTS, max_new_tokens=30, sampling=sampling, batch_size=batch_size)
        assert new_ids == expected, batch_size
    (first,) = generate(decoder, PROMPTS[:1], max_new_tokens=30, sampling=sampling)
    assert first == expected[0], "what follows a prompt in the list made a difference"


def test_seed_index_and_position_decide_the_draws() -> None:
    decoder = random_decoder()
    same = [PROMPTS[0]] * 3
    new_ids = generate(decoder, same, max_new_tokens=20, sampling=Sampling(temperature=1.5, seed=0))
    assert len(set(map(tuple, new_ids))) == 3
    again = generate(decoder, same, max_new_tokens=20, sampling=Sampling(temperature=1.5, seed=0))
    assert again == new_ids
    other = generate(decoder, same, max_new_tokens=20, sampling=Sampling(temperature=1.5, seed=1))
    assert not set(map(tuple, other)) & set(map(tuple, new_ids))
    shorter = generate(decoder, same, max_new_tokens=7, sampling=Sampling(temperature=1.5, seed=0))
    assert shorter == [ids[:7] for ids in new_ids]


def test_a_stop_token_ends_its_own_row_only() -> None:
    decoder = random_decoder()
    whole = generate(decoder, PROMPTS, max_new_tokens=30)
    stop = whole[0][4]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in whole]
    assert len(set(map(len, expected))) > 1, "no row goes on"
    for batch_size in (1, 8):
        assert generate(decoder, PROMPTS, max_new_tokens=30, stop_token_ids=[stop], batch_size=batch_size) == expected


def test_a_caller_ends_a_row_after_the_token_that_completes_it() -> None:
    decoder = random_decoder()
    whole = generate(decoder, PROMPTS, max_new_tokens=30)
    last = whole[0][4]
    expected = [ids[: ids.index(last) + 1] if last in ids else ids for ids in whole]
    assert len(set(map(len, expected))) > 1, "no row goes on"
    for batch_size in (1, 8):
        found = generate(
            decoder, PROMPTS, max_new_tokens=30, is_done=lambda ids: ids[-1] == last, batch_size=batch_size
        )
        assert found == expected


def test_numbers_give_the_draws_of_a_larger_call() -> None:
    decoder, sampling = random_decoder(), Sampling(temperature=1.5)
    same = [PROMPTS[0]] * 4
    whole = generate(decoder, same, max_new_tokens=10, sampling=sampling)
    assert len(set(map(tuple, whole))) == 4
    parts = [
        generate(decoder, same[:2], max_new_tokens=10, sampling=sampling, numbers=numbers)
        for numbers in ([0, 1], [2, 3])
    ]
    assert [*parts[0], *parts[1]] == whole


def test_nothing_is_computed_after_all_rows_have_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder()
    calls = []
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    assert generate(decoder, PROMPTS, max_new_tokens=30, stop_token_ids=range(VOCAB_SIZE)) == [[]] * 5
    assert len(calls) == 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0)])
def test_forbidden_tokens_are_never_chosen(sampling: Sampling) -> None:
    decoder = random_decoder()
    free = {token_id for ids in generate(decoder, PROMPTS, max_new_tokens=30, sampling=sampling) for token_id in ids}
    forbidden = sorted(free)[::2]
    assert len(forbidden) > 5
    new_ids = generate(decoder, PROMPTS, max_new_tokens=30, sampling=sampling, forbidden_token_ids=forbidden)
    assert all(len(ids) == 30 for ids in new_ids)
    assert not {token_id for ids in new_ids for token_id in ids} & set(forbidden)


def test_tokens_are_told_as_they_are_chosen() -> None:
    told: list[tuple[int, int]] = []
    decoder = random_decoder()
    new_ids = generate(
        decoder,
        PROMPTS,
        max_new_tokens=6,
        stop_token_ids=[plain(decoder, PROMPTS[0], 3)[-1]],
        batch_size=2,
        on_token=lambda index, token_id: told.append((index, token_id)),
    )
    assert len(new_ids[0]) == 2
    for index, ids in enumerate(new_ids):
        assert [token_id for i, token_id in told if i == index] == ids
    order = list(dict.fromkeys(index for index, _ in told))
    assert order == [2, 3, 0, 4, 1], "the longest prompts come first"
    assert [index for index, _ in told[:4]] == [2, 3, 2, 3], "rows of a batch grow together"


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    decoder = random_decoder().train(training)
    modes = []
    new_ids = generate(
        decoder,
        PROMPTS,
        max_new_tokens=2,
        on_token=lambda *_: modes.append((decoder.training, torch.is_grad_enabled())),
    )
    assert set(modes) == {(False, True)}  # grad mode is off inside the model's steps only
    assert decoder.training == training
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert len(new_ids) == len(PROMPTS)

    def broken(index: int, token_id: int) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        generate(decoder, PROMPTS, max_new_tokens=2, on_token=broken)
    assert decoder.training == training


def test_no_graph_is_kept() -> None:
    decoder = random_decoder()
    recorded = []
    handle = decoder.norm.register_forward_hook(lambda _module, _args, output: recorded.append(output.requires_grad))
    generate(decoder, PROMPTS, max_new_tokens=3)
    handle.remove()
    assert len(recorded) == 3
    assert not any(recorded)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(autocast: bool) -> None:
    decoder = random_decoder(qk_norm=True)
    if not autocast:
        decoder.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        cached = generate(decoder, PROMPTS, max_new_tokens=3)
        assert cached == plain_all(decoder, PROMPTS, 3, GREEDY)


# ------------------------------------------------------------------------------------------- common beginnings


def prefix_tree(seed: int, size: int = 9) -> list[list[int]]:
    """Prompts of which each goes on from a random place of an earlier one, some from its end or with nothing new."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]]
    while len(prompts) < size:
        origin = rng.choice(prompts)
        kept = origin[: rng.choice((rng.randint(0, len(origin)), len(origin)))]
        prompts.append([*kept, *(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(not kept, 8)))])
    rng.shuffle(prompts)
    return prompts


TREES = {
    **{f"random {seed}": prefix_tree(seed) for seed in range(6)},
    "all the same": [[3, 4, 5]] * 4,
    "each the beginning of another": [[7, 8, 9, 10][:length] for length in (3, 1, 4, 2)],
    "the same single token": [[2], [2], [2, 3]],
    "some with nothing in common": [[1, 2, 3, 4], [9, 9], [1, 2, 3, 5], [30]],
}


@pytest.mark.parametrize("prompts", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1, "qk_norm": True}], ids=["grouped", "one key head"])
def test_a_common_beginning_is_read_once_and_changes_nothing(prompts, changes, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder(max_seq_len=80, **changes)
    monkeypatch.setattr(generation, "_ROW_COST", 0)
    monkeypatch.setattr("meap_lit.model.kv_cache._BLOCK_SIZE", 3)
    shapes, logits = [], []
    forward, head = decoder.forward, decoder.logits
    monkeypatch.setattr(
        decoder, "forward", lambda ids, *args, **kwargs: shapes.append(ids.shape) or forward(ids, *args, **kwargs)
    )
    monkeypatch.setattr(decoder, "logits", lambda hidden: logits.append(head(hidden)) or logits[-1])
    new_ids = generate(decoder, prompts, max_new_tokens=10, batch_size=len(prompts))
    first_logits = logits[0]
    assert new_ids == [plain(decoder, prompt, 10) for prompt in prompts]

    beginnings = {tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))}
    num_repeated = len(prompts) - len(set(map(tuple, prompts)))  # of a prompt that was there, the last token is read
    assert shapes[0] == (1, len(beginnings) + num_repeated)
    with torch.no_grad():
        alone = [head(forward(torch.tensor([prompt]))[0, -1]) for prompt in sorted(prompts)]
    torch.testing.assert_close(first_logits, torch.stack(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_common_beginnings_with_sampling_stops_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, prompts = random_decoder(max_seq_len=80), prefix_tree(0, size=12)
    sampling = Sampling(temperature=1.5, seed=4)
    stops = range(0, VOCAB_SIZE, 9)
    options = {"max_new_tokens": 12, "sampling": sampling, "stop_token_ids": stops}
    whole = plain_all(decoder, prompts, 12, sampling)
    expected = [list(itertools.takewhile(lambda token_id: token_id not in stops, ids)) for ids in whole]
    assert 0 in map(len, expected), "none stops at once"
    assert len(set(map(len, expected))) > 2
    monkeypatch.setattr(generation, "_ROW_COST", 0)
    for batch_size in (1, 2, 5, 12):
        assert generate(decoder, prompts, batch_size=batch_size, **options) == expected, batch_size


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("autocast", [True, False])
def test_common_beginnings_in_bfloat16(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, prompts = random_decoder(qk_norm=True), TREES["some with nothing in common"]
    if not autocast:
        decoder.bfloat16()
    monkeypatch.setattr(generation, "_ROW_COST", 0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        cached = generate(decoder, prompts, max_new_tokens=3)
        assert cached == plain_all(decoder, prompts, 3, GREEDY)


@pytest.mark.parametrize(
    ("prompts", "shape"),
    [
        ([[1] * 200, [2] * 200], (2, 200)),  # nothing in common, nothing to pad
        ([[1] * 200, [1] * 80 + [2] * 120], (2, 200)),  # 320 to be read, and 128 for two rows
        ([[1] * 200, [1] * 140 + [2] * 60], (1, 260)),
        ([[1] * 200, [2] * 60], (1, 260)),  # what matters is how much need not be read: here padding
        ([[1] * 200], (1, 200)),
    ],
)
def test_prompts_with_little_in_common_are_one_padded_batch(prompts, shape, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder(max_seq_len=201)
    shapes = []
    forward = decoder.forward
    monkeypatch.setattr(
        decoder, "forward", lambda ids, *args, **kwargs: shapes.append(ids.shape) or forward(ids, *args, **kwargs)
    )
    assert generate(decoder, prompts, max_new_tokens=1) == [plain(decoder, prompt, 1) for prompt in prompts]
    assert shapes[0] == shape


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 2], 2), ([2, 1], [1, 2], 0), ([], [1], 0)],
)
def test_common_beginning_by_hand(first, second, expected) -> None:
    assert common_beginning(first, second) == expected


def test_no_prompts() -> None:
    assert generate(random_decoder(), [], max_new_tokens=3) == []


def test_the_context_is_used_to_its_end() -> None:
    decoder = random_decoder(max_seq_len=12)
    (new_ids,) = generate(decoder, [[1, 2, 3]], max_new_tokens=9)
    assert new_ids == plain(decoder, [1, 2, 3], 9)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (
            [[1] * 5, [1] * 4, [1] * 7],
            {"max_new_tokens": 8},
            "2 of 3 prompts leave no room for max_new_tokens 8 in the model's context of 12 tokens: "
            "the longest has 7; shorten them or lower max_new_tokens",
        ),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"max_new_tokens": 1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ([[1], []], {"max_new_tokens": 1}, "prompt 2 of 2 has no token"),
        (
            [[1, 64]],
            {"max_new_tokens": 1},
            "prompt 1 of 1 holds the token id 64, outside the model's vocabulary of 64; "
            "encode it with the model's own tokenizer",
        ),
        (
            [[-1, 3]],
            {"max_new_tokens": 1},
            "prompt 1 of 1 holds the token id -1, outside the model's vocabulary of 64; "
            "encode it with the model's own tokenizer",
        ),
    ],
)
def test_prompts_that_will_not_do_are_refused_at_once(prompts, options, message) -> None:
    told: list[int] = []
    with pytest.raises(UserError) as error:
        generate(random_decoder(max_seq_len=12), prompts, on_token=lambda *_: told.append(1), **options)
    assert str(error.value) == message
    assert not told


# ---------------------------------------------------------------------------------------------------- sampling

LOGITS = torch.tensor([[0.2, 0.5, 0.05, 0.25], [0.25, 0.05, 0.5, 0.2]]).log()


@pytest.mark.parametrize(
    ("sampling", "draw", "expected"),
    [  # cumulative in the order of the ids: 0.2, 0.7, 0.75, 1 in the first row
        (Sampling(), 0.0, [1, 2]),
        (Sampling(temperature=1.0), 0.0, [0, 0]),
        (Sampling(temperature=1.0), 0.19, [0, 0]),
        (Sampling(temperature=1.0), 0.21, [1, 0]),
        (Sampling(temperature=1.0), 0.72, [2, 2]),
        (Sampling(temperature=1.0), 0.999999, [3, 3]),
        (Sampling(temperature=1.0, top_k=1), 0.999999, [1, 2]),
        (Sampling(temperature=1.0, top_k=2), 0.66, [1, 2]),  # 0.5 and 0.25 become 2/3 and 1/3, in the second row
        (Sampling(temperature=1.0, top_k=2), 0.67, [3, 2]),  # 1/3 and 2/3
        (Sampling(temperature=1.0, top_k=9), 0.999999, [3, 3]),
        (Sampling(temperature=1.0, top_p=0.49), 0.999999, [1, 2]),
        (Sampling(temperature=1.0, top_p=0.6), 0.999999, [3, 2]),
        (Sampling(temperature=1.0, top_p=0.8), 0.0, [0, 0]),
        (Sampling(temperature=1.0, top_p=0.9), 0.72, [1, 2]),  # without the least likely: 0.2, 0.7, 0.7, 0.95 of 0.95
        (Sampling(temperature=1.0, top_k=2, top_p=0.6), 0.999999, [1, 2]),  # 2/3 of what top_k leaves is enough
        (Sampling(temperature=1e-320), 0.999999, [1, 2]),
        (Sampling(temperature=1e9), 0.26, [1, 1]),
    ],
)
def test_choice_by_hand(sampling: Sampling, draw: float, expected: list[int]) -> None:
    assert choose_tokens(LOGITS, sampling, [draw, draw]).tolist() == expected


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (1, None), (5, None), (None, 0.3), (None, 0.9), (10, 0.7), (None, 1.0)]
)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_shares_are_the_probabilities_of_transformers(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = 2 * torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p else []
    expected = LogitsProcessorList(steps)(torch.zeros(1, 1, dtype=torch.int64), logits.clone()).softmax(-1)[0]

    num_draws = 20_000
    draws = [(number + 0.5) / num_draws for number in range(num_draws)]  # evenly spread, so shares are exact
    chosen = choose_tokens(logits.expand(num_draws, -1), Sampling(temperature, top_k, top_p), draws)
    shares = torch.bincount(chosen, minlength=30) / num_draws
    torch.testing.assert_close(shares, expected, atol=2 / num_draws, rtol=0)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits: Tensor = torch.zeros(2, 5)
    logits[:, [0, 2, 4]] = -torch.inf
    assert choose_tokens(logits, Sampling(temperature=1.0), [0.0, 1 - 2**-53]).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"temperature": float("inf")}, "temperature must be at least 0 and finite, got inf"),
        ({"temperature": 1, "top_k": -2}, "top_k must be at least 1, or 0 or -1 for no limit, got -2"),
        ({"temperature": 1, "top_p": 0.0}, "top_p must be in (0, 1], got 0"),
        ({"temperature": 1, "top_p": 1.5}, "top_p must be in (0, 1], got 1.5"),
        ({"top_k": 5}, "top_k does nothing at temperature 0; set a temperature or leave top_k out"),
        ({"top_p": 0.5}, "top_p does nothing at temperature 0; set a temperature or leave top_p out"),
    ],
)
def test_wrong_sampling_is_refused_in_one_line(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as error:
        Sampling(**values)  # type: ignore[arg-type]
    assert str(error.value) == message


@pytest.mark.parametrize("top_k", [None, 0, -1])
@pytest.mark.parametrize("top_p", [None, 1.0])
def test_values_that_set_no_limit_go_with_any_temperature(top_k: int | None, top_p: float | None) -> None:
    greedy, drawn = Sampling(0.0, top_k, top_p), Sampling(1.0, top_k, top_p)
    assert choose_tokens(LOGITS, greedy, [0.0, 0.0]).tolist() == [1, 2]
    draws = [0.72, 0.999999]
    assert choose_tokens(LOGITS, drawn, draws).tolist() == choose_tokens(LOGITS, Sampling(1.0), draws).tolist()


@pytest.mark.parametrize("top_p", [0.01, 0.25, 0.3, 0.5, 0.6, 0.9])
@pytest.mark.parametrize(
    "scores",
    [[1.0] * 8, [3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.5], [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0]],
)
def test_top_p_keeps_the_smallest_set_among_ties(scores: list[float], top_p: float) -> None:
    """Ties are cut where transformers cuts them, so that no more than needed is kept."""
    logits = torch.tensor([scores])
    left = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.int64), logits.clone()) > -torch.inf
    draws = [(number + 0.5) / 1000 for number in range(1000)]
    chosen = choose_tokens(logits.expand(1000, -1), Sampling(1.0, top_p=top_p), draws)
    assert sorted(set(chosen.tolist())) == left[0].nonzero()[:, 0].tolist()


def test_rows_that_have_stopped_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder()
    sampling = Sampling(temperature=1.5)
    whole = generate(decoder, PROMPTS, max_new_tokens=30, sampling=sampling)
    stops = {whole[0][2], whole[1][4], whole[2][6]}
    expected = [list(itertools.takewhile(lambda token_id: token_id not in stops, ids)) for ids in whole]
    assert len(set(map(len, expected))) > 2, "rows stop at different steps"
    rows = []
    forward = decoder.forward
    monkeypatch.setattr(
        decoder, "forward", lambda ids, *args, **kwargs: rows.append(len(ids)) or forward(ids, *args, **kwargs)
    )
    new_ids = generate(decoder, PROMPTS, max_new_tokens=30, sampling=sampling, stop_token_ids=[*stops])
    assert new_ids == expected
    assert rows[0] == 5
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) > 1
