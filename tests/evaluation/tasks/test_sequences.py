import pytest

from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.data.stream.text import TokenBlocks
from meap_lit.errors import UserError
from meap_lit.evaluation.tasks.perplexity import Perplexity
from meap_lit.inference.language_model import LanguageModel


@pytest.fixture(scope="module")
def model(source_folder):
    return LanguageModel(str(source_folder), device="cpu")


def test_sequences_are_the_first_blocks_of_the_split(model, prepared):
    blocks = Perplexity(dataset=prepared.dataset + "/", seq_len=30, num_sequences=3).blocks(model)
    source = TokenBlocks(f"{prepared.dataset}/val", 30)
    assert blocks == [source[index].tolist() for index in range(3)]
    assert {len(block) for block in blocks} == {31}
    train = Perplexity(dataset=prepared.dataset, split="train", seq_len=30, num_sequences=3).blocks(model)
    assert train != blocks


@pytest.mark.parametrize("num_sequences", [None, 1_000_000])
def test_all_sequences_are_taken_where_no_fewer_are_asked_for(model, prepared, num_sequences):
    blocks = Perplexity(dataset=prepared.dataset, seq_len=30, num_sequences=num_sequences).blocks(model)
    assert len(blocks) == len(TokenBlocks(f"{prepared.dataset}/val", 30)) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "task.seq_len must be at least 1, got 0"),
        ({"num_sequences": 0}, "task.num_sequences must be at least 1, got 0"),
        (
            {"dataset": "nowhere"},
            "dataset folder nowhere does not exist; make it with: python -m meap_lit prepare text",
        ),
        ({"seq_len": 100_000}, "has no chunk with task.seq_len + 1 = 100001 tokens"),
    ],
)
def test_wrong_options_are_named(model, prepared, options, message):
    with pytest.raises(UserError) as error:
        Perplexity(**({"dataset": prepared.dataset, "seq_len": 30} | options)).blocks(model)
    assert message in str(error.value)


def test_a_dataset_of_another_tokenizer_or_without_the_split_is_refused(model, prepared, tmp_path):
    texts, other = [str(prepared.texts / "1*.txt")], str(tmp_path / "tokenizer")
    TrainTokenizer(input=texts, vocab_size=270, output=other).run()
    for tokenizer, val_share, message in (
        (other, 0.1, f"was prepared with another tokenizer than that of {model.checkpoint}"),
        (prepared.tokenizer, 0.0, "has no val split, only train"),
    ):
        dataset = str(tmp_path / f"dataset-{val_share}")
        PrepareText(input=texts, tokenizer=tokenizer, output=dataset, val_share=val_share, num_workers=1).run()
        with pytest.raises(UserError) as error:
            Perplexity(dataset=dataset, seq_len=30).blocks(model)
        assert message in str(error.value)
