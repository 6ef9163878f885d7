"""The rows of a preview are those that a run hands to the decoder."""

import pytest

from meap_lit.model import Decoder
from meap_lit.preview.rows import rows_of_step
from meap_lit.recipe.cli import RecipeCLI

pytestmark = pytest.mark.slow


@pytest.fixture
def read_by_decoder(monkeypatch):
    """Rows that the decoder reads in training: input ids and position ids, from first to last."""
    rows = []
    forward = Decoder.forward

    def recorded(self, input_ids, position_ids=None, documents=None, **options):
        if self.training:
            positions = [None] * len(input_ids) if position_ids is None else position_ids.tolist()
            rows.extend(zip(input_ids.tolist(), positions))
        return forward(self, input_ids, position_ids, documents, **options)

    monkeypatch.setattr(Decoder, "forward", recorded)
    return rows


def previewed(cli, step, num_rows):
    return rows_of_step(cli.model, cli.datamodule, step=step, max_steps=cli.trainer.max_steps, num_rows=num_rows)


SCHEDULE = '{"class_path": "meap_lit.masking.WarmupHold", "init_args": {"mask_ratio": 0.4, "warmup_steps": 2}}'


@pytest.mark.parametrize("words", [[], ["--model.mask_ratio", SCHEDULE], ["--model.mask_scope", "batch"]])
def test_rows_of_text_are_those_of_the_run(toy_recipe, read_by_decoder, words):
    """Of steps 1 and 2: a schedule masks other shares of their rows."""
    cli = RecipeCLI.run(["fit", "--config", str(toy_recipe), "--budget.max_steps", "3", *words])
    rows = previewed(cli, step=1, num_rows=12)  # a step has 8
    assert [[token.input_id for token in row.tokens] for row in rows] == [ids for ids, _ in read_by_decoder[8:20]]
    assert [(row.number, row.step) for row in rows] == [(number, number // 8) for number in range(8, 20)]
    mask = cli.datamodule.tokenizer.mask_token_id
    for row in rows:
        assert row.num_masked == sum(token.input_id == mask for token in row.tokens) > 0
        assert row.mask_ratio == cli.model.mask_ratio(row.step, 3)
        assert [token.position for token in row.tokens] == list(range(32))
        labels = [token.label for token in row.tokens]
        assert all(token.original == label for token, label in zip(row.tokens[1:], labels) if token.input_id == mask)
        assert all(token.input == label for token, label in zip(row.tokens[1:], labels) if token.input_id != mask)


@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_packed_rows_are_those_of_the_run(toy_sft_recipe, read_by_decoder, layout):
    words = ["--budget.max_steps", "3", "--data.duplication.layout", layout]
    cli = RecipeCLI.run(["fit", "--config", str(toy_sft_recipe), *words])
    rows = previewed(cli, step=2, num_rows=4)
    for row, (input_ids, position_ids) in zip(rows, read_by_decoder[8:12], strict=True):
        length = len(input_ids) - row.num_padding
        assert [token.input_id for token in row.tokens] == input_ids[:length]
        assert [token.position for token in row.tokens] == position_ids[:length]
        assert set(input_ids[length:]) <= {cli.datamodule.tokenizer.eos_token_id}
    documents = [document for row in rows for document in row.documents]
    assert any(document.copy for document in documents)
    for document in documents:
        if document.copy and document.tokens:
            for original, copied in zip(document.tokens, document.copy, strict=True):
                assert copied.original == (original.input if copied.input_id != original.input_id else None)
        masked = {place for place, token in enumerate(document.copy) if token.original is not None}
        assert {place + 1 for place, token in enumerate(document.copy) if token.label is not None} == masked
    assert all(bool(document.tokens) != bool(document.copy) for document in documents) == (layout == "separate")


def test_the_share_that_is_masked_is_of_the_answers_with_a_copy(toy_sft_recipe):
    """P = 0.2 of each answer of more than 10 tokens, rounded down to at least one."""
    cli = RecipeCLI.run(["fit", "--config", str(toy_sft_recipe), "--budget.max_steps", "1"])
    rows = previewed(cli, step=0, num_rows=4)
    assert sum(row.num_masked for row in rows) > 20
    for row in rows:
        assert row.mask_ratio == 0.2
        assert 0.8 * 0.2 * row.num_maskable <= row.num_masked <= 0.2 * row.num_maskable
