"""Prompts of an exact length with needles where they belong."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.figures import draw
from meap_lit.evaluation.tasks.haystack_task import HaystackPrompt, HaystackTask, grid_plot
from meap_lit.evaluation.tasks.needle import MagicNumber, Needle
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.oracle import Oracle, run, shared_data, text_of

DEPTHS = (0.0, 10.0, 50.0, 94.0, 100.0)


@dataclass(kw_only=True)
class Hide(HaystackTask):
    """Hides `needles` and asks nothing."""

    name = "hide"
    metrics = ("found",)

    needles: tuple[str, ...] = ("\nThe quiet stone.\n",)
    cut_at = "token"
    max_new_tokens: int = 7

    def prompts(self):
        return [
            HaystackPrompt(repeat, self.needles, "Begin: ", " :end", {"repeat": repeat})
            for repeat in range(self.num_repeats)
        ]

    def score(self, record):
        return {"found": float(len(record["model_answer"]))}


class HideAfterSentence(Hide):
    cut_at = "sentence"


class HideAfterLine(Hide):
    cut_at = "line"


@pytest.fixture(scope="module")
def model(prepared) -> Oracle:
    return Oracle(Tokenizer.load(prepared.tokenizer))


@pytest.fixture(scope="module")
def haystack(prepared) -> str:
    return str(prepared.texts)


def parts(model, item, needles: Sequence[str] = ("\nThe quiet stone.\n",)) -> list[str]:
    """The haystack between the needles."""
    text = text_of(model, item.input_ids)
    assert text.startswith("Begin: ")
    assert text.endswith(" :end")
    return re.split("|".join(map(re.escape, needles)), text.removeprefix("Begin: ").removesuffix(" :end"))


@pytest.mark.parametrize("kind", [Hide, HideAfterSentence])
def test_prompt_and_answer_fill_the_length(kind, model, haystack) -> None:
    items = kind(lengths=(40, 100, 301), depths=DEPTHS, num_repeats=2, haystack=haystack).items(model)
    assert [item.id for item in items[:3]] == [f"length=40/depth={d}/repeat={r}" for d, r in ((0, 0), (0, 1), (10, 0))]
    assert len({item.id for item in items}) == len(items) == 30
    for item in items:
        assert item.num_tokens == len(item.input_ids) + 7 == item.cell["length"]
        assert item.fields["num_prompt_tokens"] == len(item.input_ids)
        assert item.input_ids[0] == model.tokenizer.eos_token_id
        assert item.input_ids == model.encode(text_of(model, item.input_ids)), "as the whole prompt is tokenized"
        before, after = parts(model, item)
        if item.cell["depth"] == 0:
            assert (before, item.fields["true_depths"]) == ("", [0])
        if item.cell["depth"] == 100:
            assert (after, item.fields["true_depths"]) == ("", [100])


def test_depth_is_a_share_of_the_haystacks_tokens(model, haystack) -> None:
    for item in Hide(lengths=(300,), depths=DEPTHS, haystack=haystack).items(model):
        before, after = (len(model.tokenizer.encode(part)) for part in parts(model, item))
        measured = 100 * before / (before + after)
        assert abs(measured - item.cell["depth"]) < 1
        assert abs(measured - item.fields["true_depths"][0]) < 1


def test_sentences_stay_whole_and_the_true_depth_is_recorded(model, haystack) -> None:
    items = HideAfterSentence(lengths=(800,), depths=(0.0, 40.0, 60.0, 80.0), haystack=haystack).items(model)
    moved = 0
    for item in items:
        before, after = parts(model, item)
        assert not before or before.endswith(".")
        measured = 100 * len(model.tokenizer.encode(before)) / len(model.tokenizer.encode(before + after))
        assert abs(measured - item.fields["true_depths"][0]) < 1
        moved += item.fields["true_depths"][0] < item.cell["depth"] - 2
    assert moved, "the documents have one sentence each"


@pytest.mark.parametrize("length", [100, 900])
@pytest.mark.parametrize(
    "text", ["河边的旧石头守着花园。市场很安静。" * 200, "for stone in river:\n    keep(stone)\n" * 60]
)
def test_a_text_without_ends_of_sentences_is_refused(model, tmp_path, text, length) -> None:
    (tmp_path / "a.txt").write_text(text)
    options = {"lengths": (length,), "depths": (50.0,), "haystack": str(tmp_path)}
    where = r"has no end of a sentence \(a period before a space\) from 0% to (49|50)% of its tokens, where a needle "
    with pytest.raises(UserError, match=where + "belongs; name another haystack$"):
        HideAfterSentence(**options).items(model)
    small = {"max_new_tokens": 2, **options, "lengths": (900,)}
    with pytest.raises(UserError, match=where + "belongs; add --task.boundary token$"):
        Needle(**small).items(model)
    (item,) = Needle(**small, boundary="token").items(model)
    assert abs(item.fields["true_depths"][0] - 50) < 1
    assert HideAfterSentence(**{**options, "depths": (0.0, 100.0)}).items(model)


def test_a_text_with_periods_in_one_part_only_is_refused_for_the_other(model, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(
        "the old river keeps a stone. " * 60 + "for stone in river:\n    keep(stone)\n" * 200
    )
    options = {"lengths": (3500,), "haystack": str(tmp_path)}
    HideAfterSentence(**options, depths=(0.0, 20.0)).items(model)
    with pytest.raises(UserError, match=r"from .*% to 90% of its tokens"):
        HideAfterSentence(**options, depths=(0.0, 90.0)).items(model)


def test_a_long_sentence_in_a_short_context_is_no_reason_to_refuse(model, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(("the old river and the stone and the market " * 15 + ". ") * 9)
    (item,) = HideAfterSentence(lengths=(120,), depths=(90.0,), haystack=str(tmp_path)).items(model)
    assert item.fields["true_depths"] == [0]


def test_lines_stay_whole(model) -> None:
    needle = "The quiet stone.\n"
    task = HideAfterLine(lengths=(900, 1300), depths=DEPTHS, needles=(needle,))
    for item in task.items(model):
        assert item.cell["length"] - 90 < item.num_tokens <= item.cell["length"], "less than a line is missing"
        lines = [line for part in parts(model, item, (needle,)) for line in part.splitlines(keepends=True)]
        assert set(lines) == {
            "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
        }


def test_several_needles_are_spread_evenly_to_the_end(model, haystack) -> None:
    needles = ("\nA stone.\n", "\nA river.\n", "\nA market.\n")
    task = Hide(lengths=(600,), depths=(0.0, 40.0, 100.0), needles=needles, haystack=haystack)
    depths = [item.fields["true_depths"] for item in task.items(model)]
    assert [[round(depth) for depth in row] for row in depths] == [[0, 33, 67], [40, 60, 80], [100, 100, 100]]
    for item in task.items(model):
        assert [match[0] for match in re.finditer(r"\nA \w+\.\n", text_of(model, item.input_ids))] == list(needles)


def test_repeats_have_other_orders_and_a_seed_gives_them_again(model, haystack) -> None:
    def texts(**changes):
        task = Hide(lengths=(200,), depths=(50.0,), num_repeats=4, haystack=haystack, **changes)
        return [text_of(model, item.input_ids) for item in task.items(model)]

    assert len(set(texts())) == 4
    assert texts() == texts()
    assert texts()[0] == texts(seed=1)[0], "the first is in the order of the names"
    assert not set(texts()[1:]) & set(texts(seed=1))


def test_a_short_haystack_is_repeated(model, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("the old river keeps a lantern. ")
    (item,) = Hide(lengths=(300,), depths=(100.0,), haystack=str(tmp_path)).items(model)
    assert item.num_tokens == 300
    before, _ = parts(model, item)
    assert before.count("the old river keeps a lantern. ") > 5


def test_chat_prompts_have_the_length_as_well(model) -> None:
    items = Hide(lengths=(300,), depths=(50.0,), prompt_style="chat", template="alpaca").items(model)
    assert [item.num_tokens for item in items] == [300]
    assert "### Instruction:\nBegin: The grass" in text_of(model, items[0].input_ids)
    assert ":end\n\n### Response:" in text_of(model, items[0].input_ids)


def test_equal_ids_are_one_object(model) -> None:
    first, second = Hide(lengths=(300, 310), depths=(50.0,)).items(model)
    assert len({id(token_id) for item in (first, second) for token_id in item.input_ids}) < 60


WRONG_OPTIONS = [
    ({"lengths": ()}, "lengths must name at least one value and each once, got []"),
    ({"lengths": (50, 50)}, "lengths must name at least one value and each once, got [50, 50]"),
    ({"depths": ()}, "depths must name at least one value"),
    ({"depths": (0.0, 101.0)}, "depths must be in [0, 100], got 101 percent"),
    ({"depths": (-1.0,)}, "depths must be in [0, 100], got -1 percent"),
    ({"num_repeats": 0}, "num_repeats must be at least 1, got 0"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_OPTIONS)
def test_wrong_options(change, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Hide(**{"lengths": (50,), "depths": (0.0,), **change})


def test_a_length_without_room(model, haystack) -> None:
    least = len(model.encode("Begin: \nThe quiet stone.\n :end")) + 7
    for length in (1, 10, least):
        with pytest.raises(UserError, match=rf"^length {length} has no room .* alone need {least} tokens$"):
            Hide(lengths=(length,), depths=(50.0,), haystack=haystack).items(model)
    (item,) = Hide(lengths=(least + 5,), depths=(50.0,), haystack=haystack).items(model)
    assert item.num_tokens <= least + 5


def test_a_haystack_too_short_to_go_without_repeat(model, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("the old river keeps a lantern. " * 5)
    size = len(model.tokenizer.encode("the old river keeps a lantern. " * 5))
    task = Hide(lengths=(60, 300), depths=(50.0,), haystack=str(tmp_path), repeat=False)
    with pytest.raises(UserError, match=rf"a* has {size} tokens, \d+ too few for length 300; add text, or set repeat"):
        task.items(model)
    assert Hide(lengths=(60,), depths=(50.0,), haystack=str(tmp_path), repeat=False).items(model)


@pytest.mark.parametrize("needles", [("\nA stone.\n", "\nA stone.\n"), ("\nHere we go.\n",)])
def test_a_needle_that_is_there_already(needles, model) -> None:
    with pytest.raises(
        UserError, match=r"needle '.*' must appear once in its context, but the haystack or another needle"
    ):
        Hide(lengths=(300,), depths=(50.0,), needles=needles).items(model)


def test_essays_in_llama_2_tokens() -> None:
    model = Oracle(Tokenizer.load(shared_data("tokenizer-llama2")))
    model.encode = lambda text: [1, *model.tokenizer.encode(text)]
    task = HideAfterSentence(
        lengths=(1000, 3000), depths=(0.0, 52.0, 100.0), num_repeats=2, haystack=shared_data("haystack")
    )
    for item in task.items(model):
        assert item.num_tokens == item.cell["length"]
        assert text_of(model, item.input_ids).count("\nThe quiet stone.\n") == 1
        assert abs(item.fields["true_depths"][0] - item.cell["depth"]) < 8


def test_a_question_is_drawn_together_at_all_lengths_and_depths(model) -> None:
    task = MagicNumber(lengths=(1100, 1200), depths=(0.0, 50.0, 100.0), num_repeats=4)
    groups: dict[str, int] = {}
    for item in task.items(model):
        groups[item.group] = groups.get(item.group, 0) + 1
    assert list(groups.values()) == [6] * 4


def test_repeats_of_the_same_needle_are_one_question(model) -> None:
    task = Needle(lengths=(1100,), depths=(50.0,), num_repeats=3)
    assert {item.group for item in task.items(model)} == {"0"}


def test_figure_has_a_panel_for_each_result(model) -> None:
    task = Hide(lengths=(100, 200), depths=(0.0, 50.0, 100.0), num_repeats=2)
    answers = {"NTP": lambda prompt: "x" * 25, "MEAP": lambda prompt: "x" * 50}  # as many percent
    results = [run(task, Oracle(model.tokenizer, answer), label) for label, answer in answers.items()]
    results[1].records[:] = [record for record in results[1].records if record["cell"]["length"] == 100]
    figure = draw(grid_plot("hide", "found"), {result.label: [result] for result in results})
    assert figure is not None
    first, second = figure.axes[:2]
    assert [axes.get_title() for axes in (first, second)] == ["NTP: 25.0%", "MEAP: 50.0%"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["100", "200"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0", "50", "100"]
    assert first.images[0].get_array().tolist() == [[25, 25]] * 3
    assert [row[0] for row in second.images[0].get_array().tolist()] == [50] * 3
    assert [text.get_text() for text in second.texts] == ["50"] * 3, "what was skipped stays empty"
