"""Continue prompts with a decoder: batched, with a key-value cache, greedy or sampled.

A continuation depends only on its own prompt (up to rounding), not on the other prompts of its batch or the size of the
batch. For sampling, the random number of each token is a function of (seed, number of the prompt, position).

The beginning that prompts of a batch have in common is read once: prompts with a needle at several depths, for example,
are equal up to the needle. Prompts with little in common are padded and read side by side.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from meap_lit.errors import UserError, check_range
from meap_lit.model import Decoder, DecoderConfig, KVCache
from meap_lit.model.attention import Documents

_NOT_FINITE = -1
"""Stands for the token of a row without finite logits: with the tokens, the flag needs no wait of its own."""

OnToken = Callable[[int, int], None]
IsDone = Callable[[Sequence[int]], bool]

_ROW_COST = 64
"""Overhead of a row when prompts are read without padding, in tokens; up to 60 on a CPU."""


@dataclass(frozen=True)
class Sampling:
    """Rule by which the next token is chosen.

    Args:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw among this many most likely tokens and those exactly as likely as the last of them. None, 0 and -1
            set no limit.
        top_p: Draw among the fewest most likely tokens that together reach this probability (nucleus sampling,
            arXiv 1904.09751), after `top_k`. Among equally likely tokens those with higher ids come first, as in
            transformers. None and 1 set no limit.
        seed: Seed of all draws.

    Raises:
        UserError: If a value is out of range, or has no effect at temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, "[0, inf)")
        if self.top_k is not None and self.top_k < -1:
            raise UserError(f"top_k must be at least 1, or 0 or -1 for no limit, got {self.top_k}")
        check_range("top_p", self.top_p, "(0, 1]")
        for name, neutral in (("top_k", (None, 0, -1)), ("top_p", (None, 1))):
            if self.temperature == 0 and getattr(self, name) not in neutral:
                raise UserError(f"{name} does nothing at temperature 0; set a temperature or leave {name} out")


GREEDY = Sampling()


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_token_ids: Sequence[int] = (),
    forbidden_token_ids: Sequence[int] = (),
    batch_size: int = 8,
    on_token: OnToken | None = None,
    is_done: IsDone | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop token, `is_done` or `max_new_tokens`.

    Prompts of similar length share a batch. The longest come first, so that a lack of memory shows at once.

    Args:
        decoder: The model, on its device; in eval mode during the call.
        prompts: Token ids of each prompt, at least one each.
        max_new_tokens: Maximum number of tokens to add to a prompt.
        sampling: Rule by which tokens are chosen.
        stop_token_ids: Ids that end a continuation; they are not part of it.
        forbidden_token_ids: Ids that are never chosen, such as the mask token and the padding of the vocabulary.
        batch_size: Number of prompts to continue at once.
        on_token: Called with the index of the prompt and each new id, stop tokens excluded, as soon as it is chosen.
        is_done: Called with the new ids of a prompt after each of them; true ends the continuation, which keeps them.
        numbers: Number of each prompt for sampling, so that prompts of several calls have draws of their own; the
            index in `prompts` by default.

    Returns:
        The new ids of each prompt, in the order of `prompts`.

    Raises:
        UserError: If a prompt is empty, has an unknown id, or leaves no room for `max_new_tokens` in the model's
            context. The model has generated nothing then. Also if its logits are not finite.
    """
    check_prompts(prompts, max_new_tokens, batch_size, decoder.config)
    continuations: list[list[int]] = [[] for _ in prompts]
    done: set[int] = set()
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    was_training = decoder.training
    decoder.eval()
    try:
        for first in range(0, len(prompts), batch_size):
            # sorted by ids, a prompt has most in common with its neighbors
            batch = sorted((list(prompts[index]), index) for index in longest_first[first : first + batch_size])
            rows, indices = zip(*batch, strict=True)
            draws = [random.Random(f"{sampling.seed}/{numbers[index] if numbers else index}") for index in indices]
            options = (max_new_tokens, sampling, stop_token_ids, forbidden_token_ids)
            for chosen in _steps(decoder, rows, indices, draws, done, *options):
                for index, token_id in chosen.items():
                    continuations[index].append(token_id)
                    if on_token is not None:
                        on_token(index, token_id)
                    if is_done is not None and is_done(continuations[index]):
                        done.add(index)
    finally:
        decoder.train(was_training)
    return continuations


def check_prompts(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    config: DecoderConfig,
    context: str | None = None,
) -> None:
    """Check the arguments of `generate` before weights are loaded, and raise as it does.

    `context` describes the model's context in the message; `max_seq_len` tokens by default.
    """
    check_range("max_new_tokens", max_new_tokens, "[1, inf)")
    check_range("batch_size", batch_size, "[1, inf)")
    assert config.vocab_size is not None
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise UserError(f"prompt {number} of {len(prompts)} has no token")
        unknown = [token_id for token_id in prompt if not 0 <= token_id < config.vocab_size]
        if unknown:
            raise UserError(
                f"prompt {number} of {len(prompts)} holds the token id {unknown[0]}, outside the model's vocabulary of "
                f"{config.vocab_size}; encode it with the model's own tokenizer"
            )
    room = config.max_seq_len - max_new_tokens
    too_long = [len(prompt) for prompt in prompts if len(prompt) > room]
    if too_long:
        raise UserError(
            f"{len(too_long)} of {len(prompts)} prompts leave no room for max_new_tokens {max_new_tokens} in the "
            f"model's context of {context or f'{config.max_seq_len} tokens'}: the longest has {max(too_long)}; "
            f"shorten them or lower max_new_tokens"
        )


@torch.no_grad()
def _steps(
    decoder: Decoder,
    rows: Sequence[Sequence[int]],
    indices: Sequence[int],
    draws: list[random.Random],
    done: set[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_token_ids: Sequence[int],
    forbidden_token_ids: Sequence[int],
) -> Iterator[dict[int, int]]:
    """Yield step by step the id chosen for each prompt of a batch that has not stopped, by its index among all.

    The caller may add to `done`, between steps, the prompts that are not to be continued.
    """
    weight = decoder.embed_tokens.weight
    device = weight.device
    forbidden = torch.tensor(forbidden_token_ids, dtype=torch.int64, device=device)
    last = torch.tensor([[len(row) - 1] for row in rows], device=device)  # [B, 1], position of each row's last token
    prompt_ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    input_ids = F.pad(prompt_ids, (0, max_new_tokens))  # [B, S]
    cache = KVCache(decoder.config, len(rows), input_ids.size(1), device, weight.dtype)
    going = dict(enumerate(indices))  # index of the prompt of each row that has not stopped
    for step in range(max_new_tokens):
        if step > 0:
            hidden = decoder(input_ids.gather(1, last), last, cache=cache)  # [B, 1, D]
        elif (beginnings := _common_beginnings(rows)) is not None:
            hidden = _read_once(decoder, rows, beginnings, cache)  # [B, 1, D]
        else:  # the padding is on the right, where no token of the prompt attends to it
            hidden = decoder(prompt_ids, cache=cache).take_along_dim(last[..., None], dim=1)  # [B, 1, D]
        logits = decoder.logits(hidden[:, 0]).float().index_fill(1, forbidden, -math.inf)  # [B, V]
        chosen = choose_tokens(logits, sampling, [draw.random() for draw in draws])
        is_finite = logits.amax(dim=-1).isfinite()  # the largest of several is NaN if one is
        ids = chosen.where(is_finite, _NOT_FINITE).tolist()
        if any(ids[row] == _NOT_FINITE for row in going):
            raise not_finite()
        going = {row: index for row, index in going.items() if ids[row] not in stop_token_ids}
        yield {index: ids[row] for row, index in going.items()}
        going = {row: index for row, index in going.items() if index not in done}
        if not going:
            return
        last = last + 1
        input_ids.scatter_(1, last, chosen[:, None])
        if 2 * len(going) <= len(ids):  # rarely, since the cache is copied
            kept = torch.tensor(list(going), device=device)
            input_ids, last = input_ids[kept], last[kept]
            draws = [draws[row] for row in going]
            going = dict(enumerate(going.values()))
            cache.keep(kept)


def not_finite() -> UserError:
    """Return the error for outputs that are not finite, which would be compared as if they were scores."""
    return UserError(
        "the model gives values that are not finite (NaN or infinity): its weights are damaged or too large for its "
        "dtype; add --dtype float32, or name another checkpoint"
    )


def common_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of ids that both begin with."""
    pairs = enumerate(zip(first, second))
    return next((number for number, (a, b) in pairs if a != b), min(len(first), len(second)))


def _common_beginnings(rows: Sequence[Sequence[int]]) -> list[int] | None:
    """Return how many first ids of each row are those of the row before, never its last; None if that saves nothing."""
    beginnings = [0, *(min(common_beginning(*pair), len(pair[1]) - 1) for pair in pairwise(rows))]
    num_padded = len(rows) * max(map(len, rows))
    return beginnings if sum(map(len, rows)) - sum(beginnings) + _ROW_COST * len(rows) <= num_padded else None


def _read_once(decoder: Decoder, rows: Sequence[Sequence[int]], beginnings: Sequence[int], cache: KVCache) -> Tensor:
    """Read prompts into the cache without padding; return the hidden state of each prompt's last token, [B, 1, D].

    The first `beginnings[i]` tokens of row i are those of the row before and are read only once.
    """
    device = decoder.embed_tokens.weight.device
    ends = [torch.tensor(row[start:]) for row, start in zip(rows, beginnings, strict=True)]
    positions = [torch.arange(start, len(row)) for row, start in zip(rows, beginnings, strict=True)]
    lengths = tuple(map(len, ends))
    hidden = decoder(
        torch.cat(ends)[None].to(device), torch.cat(positions).to(device), documents=Documents(lengths), cache=cache
    )  # [1, T, D]
    return hidden[0, torch.tensor(lengths, device=device).cumsum(0) - 1, None]


def choose_tokens(logits: Tensor, sampling: Sampling, draws: Sequence[float]) -> Tensor:
    """Return one token for each row.

    Sampling inverts the cumulative distribution: a row needs one uniform number, and small differences in its logits
    (another batch, another device) rarely change the token.

    Args:
        logits: Scores, [B, V]; -inf for tokens that must not be chosen.
        sampling: Rule by which the token is chosen.
        draws: One number in [0, 1) for each row; not used at temperature 0.

    Returns:
        Token ids, [B], int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / sampling.temperature  # no overflow
    probs = scaled.softmax(dim=-1)  # [B, V], float64: cumulated over a large vocabulary
    if sampling.top_k is not None and 0 < sampling.top_k < probs.size(-1):
        kth = probs.topk(sampling.top_k, dim=-1).values[:, -1:]
        probs = probs.where(probs >= kth, 0)
    if sampling.top_p is not None:
        ascending, order = probs.sort(dim=-1, stable=True)
        descending = ascending.flip(-1)
        before = descending.cumsum(-1) - descending  # probability of all more likely tokens
        kept = (before < sampling.top_p * probs.sum(-1, keepdim=True)).flip(-1)
        probs = probs.where(torch.zeros_like(kept).scatter(-1, order, kept), 0)
    cumulative = probs.cumsum(dim=-1)
    targets = torch.tensor(draws, dtype=torch.float64, device=probs.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]  # the first above: never a token of probability 0
