import json
import re
from dataclasses import asdict, replace
from itertools import product, takewhile

import pytest
import tokenizers
import torch
from matplotlib.colors import to_hex
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from meap_lit.cli import main
from meap_lit.data.corpora.facts import NAMES, OPENING, PLACES, FactCorpus
from meap_lit.errors import UserError
from meap_lit.evaluation.figures import draw
from meap_lit.evaluation.task import Result
from meap_lit.evaluation.tasks.facts import FactRetrieval, option_scores
from meap_lit.inference.language_model import LanguageModel
from meap_lit.model import Decoder, DecoderConfig
from meap_lit.tokenizer.tokenizer import Tokenizer

GRID = FactRetrieval(lengths=(200, 400), depths=(0.0, 0.5, 1.0), num_items=10, num_options=4, seed=0)


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
    return GRID.build(tokenizer)


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
    cells = [(item.cell["length"], item.cell["depth"]) for item in items]
    assert cells == [(length, depth) for length in GRID.lengths for depth in GRID.depths for _ in range(GRID.num_items)]


def test_items_fit_their_length_and_use_most_of_it(items):
    for item in items:
        size = len(item.fields["context_ids"]) + max(map(len, item.fields["options"]))
        assert item.cell["length"] - 60 < size <= item.cell["length"]


def test_tokens_spell_the_text_and_the_people(tokenizer, items):
    for item in items:
        assert tokenizer.decode(item.fields["context_ids"]) == item.fields["text"]
        for option in item.fields["options"]:
            assert tokenizer.decode(option)[1:] in NAMES
    num_tokens = {len(option) for item in items for option in item.fields["options"]}
    assert num_tokens == {1} or max(num_tokens) > 3  # the two tokenizers: both cases occur


def test_an_option_is_encoded_with_the_text_before_it(tokenizer, items):
    for item in items:
        text = tokenizer.encode(item.fields["text"])
        for option in item.fields["options"]:
            whole = item.fields["context_ids"] + option
            assert whole == tokenizer.encode(item.fields["text"] + tokenizer.decode(option))
        assert item.fields["context_ids"] == text[: len(item.fields["context_ids"])]


def test_options_are_the_people_of_the_context_and_the_answer_is_the_needle(tokenizer, items):
    for item in items:
        context = item.fields["text"][: item.fields["text"].rindex("Who sings")]
        stated = dict(re.findall(r"In (\w+) (\w+) sings\.", context))
        options = [tokenizer.decode(option)[1:] for option in item.fields["options"]]
        assert len(stated) == len(set(options)) == GRID.num_options
        assert set(options) == {word for word in re.findall(r"\w+", context) if word in NAMES}
        (asked,) = re.findall(r"Who sings in (\w+)\?", item.fields["text"])
        assert options[item.fields["answer"]] == stated[asked]
        assert item.fields["needle"] == f"In {asked} {stated[asked]} sings."


def test_near_duplicates_are_answered_by_the_place_as_a_whole(tokenizer):
    grid = replace(GRID, lengths=(600,), depths=(0.5,), num_options=12, near_duplicates=True)
    for item in grid.build(tokenizer):
        context, asked = re.fullmatch(r"(.*)Who sings in (\w+ \w+)\? In \2", item.fields["text"]).groups()
        stated = dict(re.findall(r"In (\w+ \w+) (\w+ \w+) sings\.", context))
        options = [tokenizer.decode(option).strip() for option in item.fields["options"]]
        assert len(stated) == 12
        assert stated[asked].endswith(options[item.fields["answer"]])


def test_right_option_stands_at_every_index(items):
    assert {item.fields["answer"] for item in items} == set(range(GRID.num_options))


def test_needle_stands_once_and_at_the_asked_depth(items):
    for item in items:
        assert item.fields["text"].count(item.fields["needle"]) == 1
        before, after = item.fields["text"][: item.fields["text"].rindex(" Who sings")].split(item.fields["needle"])
        before = before.removeprefix(OPENING + " ")
        depth = len(before) / (len(before) + len(after))
        assert depth == pytest.approx(item.cell["depth"], abs=50 / (len(before) + len(after)))  # half a sentence or so
        assert (before == "") == (item.cell["depth"] == 0)
        assert (after == "") == (item.cell["depth"] == 1)


def test_same_grid_same_items_and_other_seed_other_items(tokenizer, items):
    assert GRID.build(tokenizer) == items
    other = replace(GRID, seed=1).build(tokenizer)
    assert all(one.fields["text"] != two.fields["text"] for one, two in zip(items, other, strict=True))


def test_an_item_does_not_depend_on_the_rest_of_the_grid(tokenizer, items):
    alone = FactRetrieval(lengths=(400,), depths=(0.5,), num_items=10, seed=0).build(tokenizer)
    assert alone == [item for item in items if item.cell == {"length": 400, "depth": 0.5}]


def test_people_and_places_are_drawn_anew(items):
    needles = [item.fields["needle"] for item in items]
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
    (item,) = FactRetrieval(lengths=(400,), depths=(0.5,), num_items=1, seed=0).build(with_bos)
    assert item.fields["context_ids"].count(with_bos.bos_token_id) == writes
    assert (item.fields["context_ids"][0] == with_bos.bos_token_id) == writes


@pytest.mark.parametrize("batch_tokens", [1, 3000, 1_000_000])
def test_a_reader_scores_all(tokenizer, items, batch_tokens):
    table = GRID.result(Reader(tokenizer), items, "reader", batch_tokens).table()
    assert {cell: mean.value for cell, mean in table.items()} == dict.fromkeys(product(GRID.lengths, GRID.depths), 100)


def test_accuracy_lands_in_its_cell(tokenizer, items):
    """A reader that sees nothing at depth 0.5 of the long context is wrong there and nowhere else."""
    blind = {tuple(item.fields["context_ids"]) for item in items if item.cell == {"length": 400, "depth": 0.5}}

    class HalfBlind(Reader):
        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = super().forward(input_ids)
            for row, ids in enumerate(input_ids.tolist()):
                if any(tuple(ids[: len(context)]) == context for context in blind):
                    hidden[row] *= -1
            return hidden

    table = GRID.result(HalfBlind(tokenizer), items, "half blind").table()
    wrong = [cell for cell, mean in table.items() if mean.value < 100]
    assert wrong == [(400, 0.5)]
    assert table[400, 0.5].value == 0


def test_scores_are_those_of_one_sequence_at_a_time(tokenizer, items):
    """Padding, shared rows and gathering change nothing: against plain log-likelihoods of whole sequences."""
    decoder = make_decoder(tokenizer)
    some = items[::7]
    scores = option_scores(decoder, some, batch_tokens=1600)
    for item, row in zip(some, scores, strict=True):
        for option, score in zip(item.fields["options"], row, strict=True):
            ids = torch.tensor([item.fields["context_ids"] + option])
            with torch.no_grad():
                log_probs = decoder.logits(decoder(ids[:, :-1])).log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
            assert score == pytest.approx(log_probs[-len(option) :].sum().item(), abs=1e-4)


def test_random_weights_guess(tokenizer):
    grid = FactRetrieval(lengths=(200,), depths=(0.0, 1.0), num_items=200, seed=0)
    result = grid.result(make_decoder(tokenizer), grid.build(tokenizer), "random", batch_tokens=20_000)
    assert result.mean().value == pytest.approx(25, abs=9)  # four standard deviations of 400 guesses


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
        FactRetrieval(lengths=(20,), seed=0).build(tokenizer)
    needed = int(re.search(r"at least (\d+)", str(raised.value))[1])
    assert FactRetrieval(lengths=(needed,), depths=(0.5,), num_items=1, seed=0).build(tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (0.5, 50)}, "retrieval depths must be in [0, 1], got 50"),
        ({"depths": ()}, "at least one value"),
        ({"lengths": [64, 64]}, "each once"),
        ({"num_items": 0}, "num_items must be at least 1, got 0"),
        ({"num_options": 1}, f"num_options must be in [2, {len(NAMES)}], got 1"),
        ({"num_options": 99}, f"num_options must be in [2, {len(NAMES)}], got 99"),
    ],
)
def test_wrong_grid_is_named(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FactRetrieval(**{"lengths": (200,), **changes})


def test_figure_shows_length_across_and_depth_down():
    scores = {(200, 0.0): 100, (200, 0.5): 50, (200, 1.0): 0, (400, 0.0): 25, (400, 0.5): 75, (400, 1.0): 90}
    cells = [({"length": length, "depth": depth}, score) for (length, depth), score in scores.items()]
    records = [{"id": str(cell), "cell": cell, "scores": {"accuracy": score}} for cell, score in cells]
    figure = draw(
        GRID.plots[0], {"Retrieval": [Result(GRID, "Retrieval", records, about={"task": {"init_args": asdict(GRID)}})]}
    )
    axes = figure.axes[0]
    (image,) = axes.images
    assert image.get_array().shape == (3, 2)
    assert image.get_clim() == (0, 100)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["200", "400"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "0.5", "1"]
    assert axes.yaxis_inverted()  # depth 0 on top
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "100", (0, 1): "50", (0, 2): "0", (1, 0): "25", (1, 1): "75", (1, 2): "90"}
    assert axes.get_title() == "Retrieval: 56.7%"
    assert figure.get_suptitle() == "Facts: accuracy (%), guessing 25"
    assert [to_hex(image.cmap(share)).upper() for share in (0.0, 1.0)] == ["#F0496E", "#0CD79F"]


# ----------------------------------------------------------------------------------------------- as a task


class LooksUp:
    """A decoder that says what came next where the longest piece of the text so far has stood before."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def parameters(self):
        return iter([self.weight])

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for now in range(1, len(ids)):
                lengths = [self.common(ids[: then + 1], ids[: now + 1]) for then in range(now)]
                scores[row, now, ids[lengths.index(max(lengths)) + 1]] = 10
        return scores

    @staticmethod
    def common(first: list[int], second: list[int]) -> int:
        """Tokens that two texts end with alike."""
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first[::-1], second[::-1], strict=False)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class Model:
    def __init__(self, tokenizer: Tokenizer, decoder) -> None:
        self.tokenizer, self.decoder = tokenizer, decoder


@pytest.fixture
def task(prepared) -> FactRetrieval:
    return FactRetrieval(lengths=[220], depths=[0.0, 1.0], num_items=4, filler=str(prepared.texts))


def test_looking_it_up_is_right_and_a_model_without_context_guesses(prepared, task):
    tokenizer = Tokenizer.load(prepared.tokenizer)
    finder = Model(tokenizer, LooksUp(tokenizer.vocab_size))
    items = task.items(finder)
    assert len(items) == len({item.id for item in items}) == 8
    assert all(item.num_tokens <= 220 for item in items)
    records = [
        {"cell": item.cell, **item.fields, **answer}
        for item, answer in zip(items, task.answer(finder, items), strict=True)
    ]
    assert [task.score(record) for record in records] == [{"accuracy": 100.0}] * 8
    wrong = {**records[0], "option_scores": records[0]["option_scores"][::-1]}
    wrong["answer"] = (len(wrong["option_scores"]) - 1 - records[0]["answer"] + 1) % 4
    assert task.score(wrong) == {"accuracy": 0.0}


def test_the_facts_stand_among_sentences_of_the_given_text(prepared, task):
    tokenizer = Tokenizer.load(prepared.tokenizer)
    item = task.items(Model(tokenizer, None))[0]
    sentences = {text[:40] for path in prepared.texts.iterdir() for text in [path.read_text()]}
    assert any(sentence in item.fields["text"] for sentence in sentences)
    assert item.fields["text"].count(item.fields["needle"]) == 1


def test_on_a_checkpoint_by_the_command(source_folder, prepared, tmp_path):
    recipe = tmp_path / "facts.yaml"
    recipe.write_text(
        "task:\n  class_path: meap_lit.evaluation.tasks.facts.FactRetrieval\n"
        "  init_args: {lengths: [200, 300], depths: [0.5], num_items: 3}\nname: looked_up\n"
    )
    command = [
        "evaluate",
        "--config",
        str(recipe),
        "--checkpoint",
        str(source_folder),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    (result,) = (tmp_path / "out" / "looked_up").rglob("result.json")
    content = json.loads(result.read_text())
    assert [cell["length"] for cell in content["results"][0]["cells"]] == [200, 300]
    assert (result.parent / "facts.png").is_file()
    model = LanguageModel(str(source_folder))
    record = content["results"][0]["items"][0]
    rows = [record["context_ids"] + option for option in record["options"]]
    sums = [float(p.sum()) for p, _ in model.log_probs(rows, [len(record["context_ids"])] * 4)]
    assert record["option_scores"] == pytest.approx(sums, abs=1e-4)


def test_no_room(prepared):
    with pytest.raises(UserError, match="retrieval length 20 has no room"):
        FactRetrieval(lengths=[20]).items(Model(Tokenizer.load(prepared.tokenizer), None))
