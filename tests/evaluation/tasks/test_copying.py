import json
import math
import re

import pytest
import torch
from transformers import LlamaForCausalLM

from meap_lit.cli import main
from meap_lit.data.stream.text import TokenBlocks
from meap_lit.errors import UserError
from meap_lit.evaluation.results import figures
from meap_lit.evaluation.runner import choose_items
from meap_lit.evaluation.statistics import bootstrap
from meap_lit.evaluation.task import Result, difference
from meap_lit.evaluation.tasks.copying import Copying, ordinary_ids
from meap_lit.inference.language_model import LanguageModel
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.oracle import run
from tests.support.word_tokenizer import save_word_level

VOCAB_SIZE = 320
MASK_TOKEN_ID = 1


class Copier:
    """A decoder that is sure of the token that stood `period` positions before, and at first knows nothing.

    Args:
        period: From an occurrence to the next.
        blind_at: Positions at which it is sure of the mask token, which stands nowhere.
    """

    def __init__(self, period: int, blind_at: tuple[int, ...] = ()) -> None:
        self.period = period
        self.blind_at = blind_at

    def __call__(self, input_ids):
        logits = torch.zeros(*input_ids.shape, VOCAB_SIZE)  # [B, T, V]
        seen = input_ids[:, : max(0, input_ids.size(1) - self.period + 1)]
        logits[:, self.period - 1 :].scatter_(2, seen[..., None], 1000.0)
        for position in self.blind_at:
            logits[:, position - 1] = 0
            logits[:, position - 1, MASK_TOKEN_ID] = 1000
        return logits

    def logits(self, hidden):
        return hidden


@pytest.fixture
def model(source_folder):
    return LanguageModel(str(source_folder), device="cpu")


@pytest.fixture
def task(prepared):
    return Copying(dataset=prepared.dataset, seq_len=60, span_len=10, distances=(0, 7, 41), num_spans=12)


@pytest.fixture
def random_task(prepared):
    return Copying(
        dataset=prepared.dataset, seq_len=60, source="random", span_len=10, distances=(0, 7, 41), num_spans=12
    )


# -------------------------------------------------------------------------------------------------------- items


def test_a_span_of_a_sequence_comes_back_after_the_end_of_another(model, task, prepared):
    blocks = [block.tolist() for block in TokenBlocks(f"{prepared.dataset}/val", 60)]
    items = task.items(model)
    assert [item.cell for item in items] == [{"distance": distance} for distance in (0, 7, 41)] * 12
    assert len({item.id for item in items}) == 36
    spans = set()
    for number in range(12):
        near, middle, far = items[3 * number : 3 * number + 3]
        assert near.group == middle.group == far.group
        span, between = far.input_ids[:10], far.input_ids[10:51]
        assert near.input_ids == span * 2
        assert middle.input_ids == [*span, *between[-7:], *span]
        assert far.input_ids == [*span, *between, *span]
        assert far.num_tokens == 60
        assert far.fields == {"span": model.tokenizer.decode(span)}
        homes = {
            (n, start) for n, block in enumerate(blocks) for start in range(0, 60, 10) if block[start:][:10] == span
        }
        others = {n for n, block in enumerate(blocks) if block[-41:] == between}
        assert len(homes) == len(others) == 1
        assert {n for n, _ in homes} != others
        spans |= homes
    assert len(spans) == 12


def test_random_spans_stand_around_text(model, random_task, prepared):
    blocks = [block.tolist() for block in TokenBlocks(f"{prepared.dataset}/val", 60)]
    items = random_task.items(model)
    assert len(items) == 36
    for item in items[2::3]:
        assert item.input_ids[:10] == item.input_ids[-10:]
        assert any(block[-41:] == item.input_ids[10:51] for block in blocks)
    drawn = {token_id for item in items for token_id in item.input_ids[:10]}
    assert drawn <= set(range(VOCAB_SIZE)) - {model.tokenizer.eos_token_id, model.tokenizer.mask_token_id}
    assert len(drawn) > 80  # 120 draws of 318 are 100 different ones, give or take 4


def test_any_ordinary_token_may_be_drawn_and_no_special_one(tmp_path, prepared):
    words = Tokenizer.load(str(save_word_level(tmp_path, 12, has_mask=False, unk_token="w5")))
    assert words.mask_token_id == 12
    assert ordinary_ids(words) == [2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert len(ordinary_ids(Tokenizer.load(prepared.tokenizer))) == VOCAB_SIZE - 2


@pytest.mark.parametrize("source", ["text", "random"])
def test_the_seed_and_the_tokenizer_alone_decide(source, model, prepared, source_folder):
    def texts(**changed):
        options = {"seq_len": 60, "span_len": 10, "distances": (0, 7), "num_spans": 12, "source": source}
        return [item.input_ids for item in Copying(dataset=prepared.dataset, **(options | changed)).items(model)]

    first = texts()
    assert first == texts()
    assert first != texts(seed=1)
    assert first[::2] == texts(distances=(0,))
    model.config = None  # nothing of the checkpoint but its tokenizer
    assert first == texts()


# ------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("source", ["text", "random"])
@pytest.mark.parametrize("distance", [0, 7, 41])
def test_who_copies_has_no_loss_on_the_repeated_span(model, prepared, source, distance):
    task = Copying(
        dataset=prepared.dataset, seq_len=60, source=source, span_len=10, distances=(distance,), num_spans=12
    )
    first_of_each = (10 + distance,)  # does not count, however wrong
    model.decoder = Copier(10 + distance, blind_at=first_of_each)
    result = run(task, model, "copier")
    assert result.mean().value == pytest.approx(0, abs=1e-6)
    assert result.mean("first_loss").value == pytest.approx(math.log(VOCAB_SIZE))
    assert result.mean("gain").value == pytest.approx(math.log(VOCAB_SIZE))
    assert result.mean("copy_accuracy").value == 100

    model.decoder = Copier(10 + distance, blind_at=(11 + distance, 19 + distance))  # the first and last that count
    wrong = run(task, model, "copier")
    assert wrong.mean().value > 10
    assert wrong.mean("copy_accuracy").value == pytest.approx(100 * 7 / 9)


def test_who_knows_nothing_has_the_loss_of_a_uniform_guess(model, random_task):
    model.decoder = Copier(1000)
    result = run(random_task, model)
    for metric, wanted in (("copy_loss", math.log(VOCAB_SIZE)), ("first_loss", math.log(VOCAB_SIZE)), ("gain", 0)):
        assert result.mean(metric).value == pytest.approx(wanted, abs=1e-5)
    assert result.mean("copy_accuracy").value == 0  # its best guess is EOS


@pytest.mark.parametrize("source", ["text", "random"])
def test_losses_are_those_of_transformers(model, prepared, source_folder, source):
    task = Copying(dataset=prepared.dataset, seq_len=60, source=source, span_len=10, distances=(0, 41), num_spans=3)
    other = LlamaForCausalLM.from_pretrained(source_folder)
    items = task.items(model)
    for item, record in zip(items, task.answer(model, items), strict=True):
        start = 10 + item.cell["distance"]
        with torch.no_grad():
            logits = other(torch.tensor([item.input_ids])).logits[0]
        nll = [-logits[n - 1].log_softmax(-1)[item.input_ids[n]].item() for n in range(1, start + 10)]
        first, copy = sum(nll[:9]) / 9, sum(nll[start : start + 9]) / 9
        best = [int(logits[n - 1].argmax()) == item.input_ids[n] for n in range(start + 1, start + 10)]
        assert record == pytest.approx({"first_loss": first, "copy_loss": copy, "copied": sum(best) / 9}, rel=1e-4)
        assert task.score(record) == pytest.approx(
            {"first_loss": first, "copy_loss": copy, "gain": first - copy, "copy_accuracy": 100 * sum(best) / 9},
            abs=1e-3,
        )


# ------------------------------------------------------------------------------------------------------ results


def result_of(task, label, losses):
    """From the copy losses of each span at each distance; the first loss is always 5."""
    records = [
        {
            "id": f"text-{span}/{distance}",
            "group": f"text-{span}",
            "cell": {"distance": distance},
            "first_loss": 5.0,
            "copy_loss": loss,
            "copied": loss / 10,
        }
        for span, row in enumerate(losses)
        for distance, loss in zip((0, 1000), row, strict=True)
    ]
    return Result(task, label, [{**record, "scores": task.score(record)} for record in records])


def test_figure_and_tables_by_distance_from_the_records_alone():
    task = Copying(dataset="unused")
    results = [result_of(task, "ntp", [[1.0, 2.0], [2.0, 4.0]]), result_of(task, "meap", [[1.0, 1.0], [1.0, 2.0]])]
    axes = figures(results)["copying"].axes[0]
    assert {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()} == {
        "ntp, repeated": [1.5, 3.0],
        "meap, repeated": [1.0, 1.5],
        "ntp, first time": [5.0, 5.0],
        "meap, first time": [5.0, 5.0],
    }
    assert list(axes.get_lines()[0].get_xdata()) == [0, 1000]
    accuracy = {distance: mean.value for distance, mean in results[0].along("distance", "copy_accuracy").items()}
    assert accuracy == pytest.approx({0: 15, 1000: 30})
    # a span is drawn with all its distances: 0 and -1 together, -1 and -2
    assert difference(*results) == bootstrap([{"a": [0.0, -1.0], "b": [-1.0, -2.0]}])
    assert difference(*results)[:3] == (-1.0, -1.5, -0.5)
    assert difference(*results, "gain").value == 1.0


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"span_len": 1}, "task.span_len must be at least 2, got 1; the first token of a span does not count"),
        ({"num_spans": 0}, "task.num_spans must be at least 1, got 0"),
        ({"distances": ()}, "task.distances must name at least one value and each once, got []"),
        ({"distances": (3, 0, 3)}, "at least one value and each once, got [3, 0, 3]"),
        ({"distances": (-1,)}, "task.distances must be at least 0, got -1"),
        ({"distances": (0, 42)}, "two spans of 10 tokens with 42 between need task.seq_len 61, got 60"),
        ({"seq_len": 0}, "task.seq_len must be at least 1, got 0"),
        ({"dataset": "nowhere"}, "dataset folder nowhere does not exist"),
        ({"num_sequences": 1}, "gives 1 sequences of 61 tokens, too few: they have 6 spans for task.num_spans 12"),
        ({"num_spans": 13, "num_sequences": 2}, "they have 12 spans for task.num_spans 13"),
    ],
)
def test_wrong_options_are_one_line(model, prepared, options, message):
    usual = {"dataset": prepared.dataset, "seq_len": 60, "span_len": 10, "distances": (0, 41), "num_spans": 12}
    with pytest.raises(UserError) as error:
        Copying(**(usual | options)).items(model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_span_of_two_sequences_can_be_asked_for(model, prepared):
    task = Copying(dataset=prepared.dataset, seq_len=60, num_sequences=2, span_len=10, distances=(5,), num_spans=12)
    blocks = TokenBlocks(f"{prepared.dataset}/val", 60)
    spans = sorted(blocks[row][start : start + 10].tolist() for row in (0, 1) for start in range(0, 60, 10))
    assert sorted(item.input_ids[:10] for item in task.items(model)) == spans


def test_what_is_longer_than_the_context_is_refused_or_left_out(model, prepared):
    task = Copying(dataset=prepared.dataset, split="train", seq_len=450, span_len=10, distances=(0, 390), num_spans=2)
    with pytest.raises(UserError) as error:
        choose_items(task, model, "stop")
    assert "2 of 4 items of copying are longer than the context of" in str(error.value)
    assert "400 tokens: the longest needs 409" in str(error.value)
    items, num_skipped = choose_items(task, model, "skip")
    assert ([item.cell["distance"] for item in items], num_skipped) == ([0, 0], 2)


# ------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize("source", ["text", "random"])
def test_the_recipe_compares_two_checkpoints(prepared, source_folder, tmp_path, capsys, source):
    toy = ["--task.dataset", prepared.dataset, "--task.seq_len", "60", "--task.span_len", "10", "--device", "cpu"]
    toy += ["--task.distances", "[0,7,41]", "--task.num_spans", "6", "--task.source", source]
    checkpoints = ["--checkpoint", str(source_folder), str(source_folder), "--label", "ntp", "meap"]
    output = ["--output", str(tmp_path), "--batch_tokens", "200"]
    assert main(["evaluate", "--config", "recipes/eval/copying.yaml", *toy, *checkpoints, *output]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^copy_loss +\d\.\d{4} ± \d\.\d{4} nats .*\+0\.0000 \[\+0\.0000, \+0\.0000\]$", out, re.MULTILINE)
    assert re.search(r"^copy_accuracy +\d\.\d\d ± \d\.\d\d % ", out, re.MULTILINE)
    assert re.findall(r"^(  \d+|copy_\w+ by distance)", out, re.MULTILINE) == [
        *("copy_loss by distance", "  0", "  7", "  41"),
        *("copy_accuracy by distance", "  0", "  7", "  41"),
    ]
    pair = tmp_path / "copying" / "ntp--meap"
    assert [file.name for file in pair.glob("*.png")] == ["copying.png"]
    summary = json.loads((pair / "result.json").read_text())["results"][0]
    assert (summary["scores"].keys(), summary["cells"][0]["copy_loss"]["n"]) == ({*Copying.metrics}, 6)
    assert {item["group"] for item in summary["items"]} == {f"{source}-{number}" for number in range(6)}
