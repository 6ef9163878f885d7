"""A language model that is a function of the text it reads, and a run of a task with it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from meap_lit.evaluation.task import Result
from meap_lit.tokenizer.chat_template import ChatTemplate
from meap_lit.tokenizer.tokenizer import Tokenizer


class Oracle:
    """Continues a prompt by what `reply` makes of its text."""

    def __init__(self, tokenizer: Tokenizer, reply: Callable[[str], str] = lambda prompt: "") -> None:
        self.tokenizer = tokenizer
        self.reply = reply

    def encode(self, text):
        return [self.tokenizer.eos_token_id, *self.tokenizer.encode(text)]

    def chat_template(self, name="tokenizer"):
        return ChatTemplate.load(name, self.tokenizer)

    def continue_texts(self, prompts, *, max_new_tokens, stop_token_ids=(), is_done=None):
        return [self.reply(text_of(self, prompt)) for prompt in prompts]


def text_of(model, input_ids: list[int]) -> str:
    return model.tokenizer.decode(input_ids, skip_special_tokens=True)


def run(task, model, label="oracle") -> Result:
    items = task.items(model)
    records = [
        {"id": item.id, "cell": dict(item.cell), **item.fields, **answer}
        for item, answer in zip(items, task.answer(model, items), strict=True)
    ]
    return Result(task, label, [{**record, "scores": task.score(record)} for record in records])


def shared_data(name: str) -> str:
    """A folder of real data that is not part of this project; the test is skipped where there is none."""
    folder = Path(__file__).parents[2].parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return str(folder)
