"""A prompt in the style of a task."""

import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.tasks.key_value import KeyValueRetrieval
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.oracle import Oracle, text_of


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "the old stone"),
        ({"prompt_style": "chat", "template": "mistral"}, "[INST] the old stone[/INST]"),
        (
            {"prompt_style": "chat", "template": "mistral", "system": "be quiet"},
            "[INST] be quiet\n\nthe old stone[/INST]",
        ),
    ],
)
def test_prompt_style(prepared, options, text):
    model = Oracle(Tokenizer.load(prepared.tokenizer))
    task = KeyValueRetrieval(num_pairs=2, **options)
    assert text_of(model, task.encode_prompt(model, "the old stone")) == text


@pytest.mark.parametrize("options", [{"template": "llama3"}, {"system": "be quiet"}])
def test_options_of_a_chat_without_a_chat_are_refused(options):
    with pytest.raises(UserError, match=r"task.system and task.template do nothing with prompt_style raw; add --task"):
        KeyValueRetrieval(num_pairs=2, **options)
