import json
from itertools import takewhile

import pytest
import torch

from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.evaluation.tasks.facts import FactRetrieval
from meap_lit.inference.language_model import LanguageModel
from meap_lit.tokenizer.tokenizer import Tokenizer


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
