from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from meap_lit.errors import UserError
from meap_lit.evaluation.attention.segments import SEGMENTS, AttentionSegments
from meap_lit.evaluation.results import figures
from meap_lit.evaluation.task import Result
from meap_lit.inference.language_model import LanguageModel
from meap_lit.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def model(source_folder):
    return LanguageModel(str(source_folder), device="cpu")


@pytest.fixture
def task():
    return AttentionSegments(lengths=[300, 400], depths=[0, 50, 100], num_items=2)


def texts(tokenizer, item):
    """The text of each segment."""
    starts = [0, *item.fields["ends"]]
    pieces = [item.input_ids[start:end] for start, end in zip(starts, item.fields["ends"], strict=False)]
    return dict(zip(SEGMENTS, [tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces], strict=True))


def check_segments(tokenizer, items, beginning, eos):
    for item in items:
        found = texts(tokenizer, item)
        assert found["answer"].strip() == item.fields["needle"]
        assert found["query"].strip() == f"Who sings in {item.fields['needle'].split()[1]}?"
        assert found["context_before"].startswith(beginning)
        assert found["eos"] == eos
        assert (found["context_after"] == "") == (item.cell["depth"] == 100)
        assert item.num_tokens == len(item.input_ids) <= item.cell["length"]


def test_segments_are_found_among_the_tokens(model, task):
    items = task.items(model)
    assert [item.cell for item in items[::2]] == [
        {"length": length, "depth": depth} for length in (300, 400) for depth in (0, 50, 100)
    ]
    assert len({item.id for item in items}) == 12
    check_segments(model.tokenizer, items, "This is what people say.", "<|endoftext|>")
    for item in items[2:4]:
        before, needle, after = item.fields["ends"][:3]
        assert before / (before + after - needle) == pytest.approx(0.5, abs=0.1)


def test_segments_are_found_with_a_real_tokenizer(model, task):
    folder = Path(__file__).parents[3].parent / "shared" / "data" / "tokenizer-llama2"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    model.tokenizer = Tokenizer.load(str(folder))
    check_segments(model.tokenizer, task.items(model), "<s> This is what people say.", "</s>")


def test_shares_are_those_of_transformers_and_add_to_one(model, task, source_folder):
    eager = LlamaForCausalLM.from_pretrained(source_folder, attn_implementation="eager")
    items = task.items(model)[1::4]
    for item, record in zip(items, task.answer(model, items), strict=True):
        with torch.no_grad():
            attentions = eager(torch.tensor([item.input_ids]), output_attentions=True).attentions
        last = torch.cat(attentions)[:, :, -1]  # [L, H, T]
        start = 0
        for name, end in zip(SEGMENTS, item.fields["ends"], strict=True):
            torch.testing.assert_close(torch.tensor(record["shares"][name]), last[..., start:end].sum(-1))
            start = end
        torch.testing.assert_close(torch.tensor(record["shares"]["bos"]), last[..., 0])
        scores = task.score(record)
        assert sum(scores[name] for name in SEGMENTS) == pytest.approx(100, abs=1e-3)
        assert scores["context_before"] > scores["bos"] > 0


def test_a_model_that_looks_everywhere_alike_gives_the_lengths_of_the_segments(model, task):
    for layer in model.decoder.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    items = task.items(model)
    for item, record in zip(items, task.answer(model, items), strict=True):
        ends = item.fields["ends"]
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        wanted = {name: 100 * size / ends[-1] for name, size in zip(SEGMENTS, sizes, strict=True)}
        assert task.score(record) == pytest.approx(wanted | {"bos": 100 / ends[-1]}, abs=1e-3)


def test_bars_show_the_mean_of_each_segment_beside_that_of_the_other(task):
    def result(label, answer):
        shares = {
            "context_before": [[0.5, 0.5]] * 2,
            "answer": [answer] * 2,
            "context_after": [[0.1, 0.1]] * 2,
            "query": [[0.1, 0.1]] * 2,
            "eos": [[0.1, 0.1]] * 2,
            "bos": [[0.2, 0.2]] * 2,
        }
        record = {"id": "0", "cell": {"length": 9, "depth": 50}, "shares": shares}
        return Result(task, label, [record | {"scores": task.score(record)}])

    drawn = figures([result("ntp", [0.1, 0.3]), result("meap", [0.3, 0.5])])
    axes = drawn["attention_segments"].axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers if hasattr(bars, "patches")]
    assert heights == [pytest.approx([50, answer, 10, 10, 10]) for answer in (20, 40)]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(SEGMENTS)
    panels = drawn["attention_to_answer"].axes[:2]
    assert [[text.get_text() for text in panel.texts] for panel in panels] == [["10", "30"] * 2, ["30", "50"] * 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "lengths must name at least one value and each once, got []"),
        ({"depths": [50, 101]}, "task.depths must be in [0, 100], got 101"),
        ({"depths": []}, "depths must name at least one value and each once, got []"),
        ({"num_items": 0}, "num_items must be at least 1, got 0"),
        ({"num_options": 1}, "num_options must be in [2, 8], got 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError) as error:
        AttentionSegments(**options)
    assert message in str(error.value)


def test_a_length_without_room_is_named(model):
    with pytest.raises(UserError, match="length 20 has no room for 4 facts and a question; make it at least"):
        AttentionSegments(lengths=[20]).items(model)
