import re

import numpy as np
import pytest
import tokenizers
import torch
from matplotlib.colors import to_hex
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from meap_lit.data.corpora.facts import NAMES, OPENING, PLACES, FactCorpus
from meap_lit.errors import UserError
from meap_lit.evaluation.tasks.retrieval import RetrievalGrid, build_items, option_scores, plot_grid, score_items
from meap_lit.model import Decoder, DecoderConfig
from meap_lit.tokenizer.tokenizer import Tokenizer

GRID = RetrievalGrid(lengths=(200, 400), depths=(0.0, 0.5, 1.0), num_items=10, num_options=4, seed=0)


@pytest.fixture(scope="module", params=[448, 260], ids=["words", "bytes"])
def tokenizer(request) -> Tokenizer:
    """One with whole words as tokens, and one with hardly any merges, whose options are several tokens long."""
    texts = [FactCorpus(output="unused")._document(number) for number in range(100)]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=request.param, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return Tokenizer(backend, {})


@pytest.fixture(scope="module")
def items(tokenizer):
    return build_items(GRID, tokenizer)


class Reader(nn.Module):
    """Looks the answer up: finds which place is asked for and who was said to sing there, then spells the name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        """One-hot states, [B, T, V], of the token to come next."""
        hidden = torch.zeros(*input_ids.shape, self.tokenizer.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            question = text.rindex("Who sings")
            asked = re.match(r"Who sings in (\w+)\?", text[question:])[1]
            name = re.search(rf"In {asked} (\w+) sings\.", text[:question])[1]
            before = self.tokenizer.encode_prompt(text[: text.rindex(f"In {asked}") + len(f"In {asked}")])
            start = len(before) - 1  # where the name is predicted
            for offset, token in enumerate(self.tokenizer.encode(" " + name)):
                if start + offset < len(ids):
                    hidden[row, start + offset, token] = 10.0
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def test_all_cells_are_filled_in_order(items):
    cells = [(item.length, item.depth) for item in items]
    assert cells == [(length, depth) for length in GRID.lengths for depth in GRID.depths for _ in range(GRID.num_items)]


def test_items_fit_their_length_and_use_most_of_it(items):
    for item in items:
        size = len(item.context_ids) + max(map(len, item.options))
        assert item.length - 60 < size <= item.length


def test_tokens_spell_the_text_and_the_people(tokenizer, items):
    for item in items:
        assert tokenizer.decode(item.context_ids) == item.text
        for option in item.options:
            assert tokenizer.decode(option)[1:] in NAMES
    num_tokens = {len(option) for item in items for option in item.options}
    assert num_tokens == {1} or max(num_tokens) > 3  # the two tokenizers: both cases occur


def test_an_option_is_encoded_with_the_text_before_it(tokenizer, items):
    for item in items:
        text = tokenizer.encode(item.text)
        for option in item.options:
            whole = item.context_ids + option
            assert whole == tokenizer.encode(item.text + tokenizer.decode(option))
        assert item.context_ids == text[: len(item.context_ids)]


def test_options_are_the_people_of_the_context_and_the_answer_is_the_needle(tokenizer, items):
    for item in items:
        context = item.text[: item.text.rindex("Who sings")]
        stated = dict(re.findall(r"In (\w+) (\w+) sings\.", context))
        options = [tokenizer.decode(option)[1:] for option in item.options]
        assert len(stated) == len(set(options)) == GRID.num_options
        assert set(options) == {word for word in re.findall(r"\w+", context) if word in NAMES}
        (asked,) = re.findall(r"Who sings in (\w+)\?", item.text)
        assert options[item.answer] == stated[asked]
        assert item.needle == f"In {asked} {stated[asked]} sings."


def test_right_option_stands_at_every_index(items):
    assert {item.answer for item in items} == set(range(GRID.num_options))


def test_needle_stands_once_and_at_the_asked_depth(items):
    for item in items:
        assert item.text.count(item.needle) == 1
        before, after = item.text[: item.text.rindex(" Who sings")].split(item.needle)
        before = before.removeprefix(OPENING + " ")
        depth = len(before) / (len(before) + len(after))
        assert depth == pytest.approx(item.depth, abs=50 / (len(before) + len(after)))  # half a sentence or so
        assert (before == "") == (item.depth == 0)
        assert (after == "") == (item.depth == 1)


def test_same_grid_same_items_and_other_seed_other_items(tokenizer, items):
    assert build_items(GRID, tokenizer) == items
    other = build_items(RetrievalGrid(GRID.lengths, GRID.depths, GRID.num_items, GRID.num_options, seed=1), tokenizer)
    assert all(one.text != two.text for one, two in zip(items, other, strict=True))


def test_an_item_does_not_depend_on_the_rest_of_the_grid(tokenizer, items):
    alone = build_items(RetrievalGrid(lengths=(400,), depths=(0.5,), num_items=10), tokenizer)
    assert alone == [item for item in items if (item.length, item.depth) == (400, 0.5)]


def test_people_and_places_are_drawn_anew(items):
    needles = [item.needle for item in items]
    assert len(set(needles)) > 25
    assert {needle.split()[1] for needle in needles} == set(PLACES)


@pytest.mark.parametrize("writes", [False, True])
def test_bos_is_used_where_the_tokenizer_writes_one(tokenizer, writes):
    backend = tokenizer.copy_backend()
    backend.add_special_tokens(["<s>"])
    if writes:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    with_bos = Tokenizer(backend, {})
    assert with_bos.bos_token_id is not None
    (item,) = build_items(RetrievalGrid(lengths=(400,), depths=(0.5,), num_items=1), with_bos)
    assert item.context_ids.count(with_bos.bos_token_id) == writes
    assert (item.context_ids[0] == with_bos.bos_token_id) == writes


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_a_reader_scores_all(tokenizer, items, batch_size):
    accuracy = score_items(Reader(tokenizer), items, GRID, batch_size=batch_size)
    assert accuracy.tolist() == [[1.0] * 3] * 2


def test_accuracy_lands_in_its_cell(tokenizer, items):
    """A reader that sees nothing at depth 0.5 of the long context is wrong there and nowhere else."""
    blind = {tuple(item.context_ids) for item in items if (item.length, item.depth) == (400, 0.5)}

    class HalfBlind(Reader):
        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = super().forward(input_ids)
            for row, ids in enumerate(input_ids.tolist()):
                if any(tuple(ids[: len(context)]) == context for context in blind):
                    hidden[row] *= -1
            return hidden

    accuracy = score_items(HalfBlind(tokenizer), items, GRID)
    assert accuracy[1, 1] == 0
    assert accuracy.sum() == 5


def test_scores_are_those_of_one_sequence_at_a_time(tokenizer, items):
    """Padding, shared rows and gathering change nothing: against plain log-likelihoods of whole sequences."""
    decoder = make_decoder(tokenizer)
    some = items[::7]
    scores = option_scores(decoder, some, batch_size=4)
    for item, row in zip(some, scores, strict=True):
        for option, score in zip(item.options, row, strict=True):
            ids = torch.tensor([item.context_ids + option])
            with torch.no_grad():
                log_probs = decoder.logits(decoder(ids[:, :-1])).log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
            assert score == pytest.approx(log_probs[-len(option) :].sum().item(), abs=1e-4)


def test_random_weights_guess(tokenizer):
    grid = RetrievalGrid(lengths=(200,), depths=(0.0, 1.0), num_items=200)
    accuracy = score_items(make_decoder(tokenizer), build_items(grid, tokenizer), grid, batch_size=100)
    assert grid.chance == 0.25
    assert accuracy.mean() == pytest.approx(grid.chance, abs=0.09)  # four standard deviations of 400 guesses


def make_decoder(tokenizer: Tokenizer) -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        DecoderConfig(
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            hidden_size=32,
            intermediate_size=32,
            vocab_size=tokenizer.vocab_size,
            max_seq_len=400,
        )
    )


def test_too_short_a_length_names_what_it_takes(tokenizer):
    with pytest.raises(UserError, match=r"length 20 has no room for 4 facts .* make it at least \d+") as raised:
        build_items(RetrievalGrid(lengths=(20,)), tokenizer)
    needed = int(re.search(r"at least (\d+)", str(raised.value))[1])
    assert build_items(RetrievalGrid(lengths=(needed,), depths=(0.5,), num_items=1), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (0.5, 50)}, "retrieval depths must be in [0, 1], got 50"),
        ({"depths": ()}, "at least one depth"),
        ({"num_items": 0}, "num_items must be at least 1, got 0"),
        ({"num_options": 1}, f"num_options must be in [2, {len(NAMES)}], got 1"),
        ({"num_options": 99}, f"num_options must be in [2, {len(NAMES)}], got 99"),
    ],
)
def test_wrong_grid_is_named(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        RetrievalGrid(**{"lengths": (200,), **changes})


def test_figure_shows_length_across_and_depth_down():
    accuracy = np.array([[1.0, 0.5, 0.0], [0.25, 0.75, 0.9]])
    figure = plot_grid(accuracy, GRID, title="Retrieval")
    axes = figure.axes[0]
    (image,) = axes.images
    assert image.get_array().shape == (3, 2)
    assert image.get_clim() == (0, 100)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["200", "400"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "50", "100"]
    assert axes.yaxis_inverted()  # depth 0 on top
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "100", (0, 1): "50", (0, 2): "0", (1, 0): "25", (1, 1): "75", (1, 2): "90"}
    assert axes.get_title() == "Retrieval\nmean 56.7%, chance 25.0%"
    assert [to_hex(image.cmap(share)).upper() for share in (0.0, 1.0)] == ["#F0496E", "#0CD79F"]
