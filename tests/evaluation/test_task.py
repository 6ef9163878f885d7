"""A prompt in the style of a task."""

import pytest

from meap_lit.evaluation.tasks.key_value import KeyValueRetrieval
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.oracle import Oracle, text_of


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "the old stone"),
        ({"prompt_style": "chat"}, "[INST] the old stone[/INST]"),
        ({"prompt_style": "chat", "system": "be quiet"}, "[INST] be quiet\n\nthe old stone[/INST]"),
    ],
)
def test_prompt_style(prepared, options, text):
    model = Oracle(Tokenizer.load(prepared.tokenizer))
    task = KeyValueRetrieval(num_pairs=2, template="mistral", **options)
    assert text_of(model, task.encode_prompt(model, "the old stone")) == text
