import dataclasses
import json
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from litdata import StreamingDataset

from meap_lit.data.prepare.chat import PrepareChat
from meap_lit.data.stream.chat import POSITIONS_STEP
from meap_lit.data.stream.micro_batches import Slice, TrainStream
from meap_lit.errors import UserError
from meap_lit.model.loss import IGNORE_INDEX
from meap_lit.recipe.cli import RecipeCLI


def fit(recipe, *overrides):
    return RecipeCLI.run(["fit", "--config", str(recipe), *overrides])


ALL = Slice()


def stream(data, *, rank_slice=ALL, micro_batch_size=2, start=0):
    return TrainStream(
        data.order(),
        data._reader("train"),
        rank_slice=rank_slice,
        global_batch_size=4,
        micro_batch_size=micro_batch_size,
        start=start,
    )


def rows(batches):
    """All rows of some batches, as [ids, labels, positions] each."""
    return [
        (batch["input_ids"][row].tolist(), batch["labels"][row].tolist(), batch["position_ids"][row].tolist())
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ]


@pytest.fixture
def data(toy_sft_recipe):
    return fit(toy_sft_recipe, "--budget.max_steps", "1").datamodule


def test_ranks_and_micro_batches_share_out_the_same_rows(data):
    whole = list(islice(stream(data, micro_batch_size=4), 3))
    expected = rows(whole)
    assert expected == rows(islice(stream(data, micro_batch_size=1), 12))
    ranks = [islice(stream(data, rank_slice=Slice(rank, 2), micro_batch_size=1), 6) for rank in (0, 1)]
    interleaved = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert expected == rows(interleaved)
    counts = [tuple(batch[name] for name in ("num_labels", "num_masked", "num_copies")) for batch in interleaved]
    assert counts[0] == counts[1] == counts[2] == counts[3], "counts are those of the whole step"
    assert counts[0] == tuple(whole[0][name] for name in ("num_labels", "num_masked", "num_copies"))


def test_a_later_start_goes_on_where_the_earlier_run_was(data):
    assert rows(islice(stream(data, start=8), 4)) == rows(islice(stream(data), 4, 8))


def test_every_visit_of_a_sample_is_masked_anew(data):
    mask_token_id = data.tokenizer.mask_token_id
    per_epoch = data.rows_in(1) // data.global_batch_size
    batches = list(islice(stream(data, micro_batch_size=4), 2 * per_epoch + 2))
    masks = {}  # of a copy's own tokens, the masks it was seen with
    for batch in batches:
        ends = torch.tensor(batch["documents"].lengths).cumsum(0).tolist()
        for start, end in zip([0, *ends], ends):
            ids, in_copy = (batch[name].flatten()[start:end] for name in ("input_ids", "in_copy"))
            if in_copy.any():
                first, second = ids.chunk(2)
                masks.setdefault(tuple(first.tolist()), []).append(tuple((second == mask_token_id).tolist()))
    seen_twice = [drawn for drawn in masks.values() if len(drawn) >= 2]
    assert len(seen_twice) > 20
    assert all(sum(drawn[0]) == sum(drawn[1]) for drawn in seen_twice), "as many"
    assert sum(drawn[0] != drawn[1] for drawn in seen_twice) > 0.8 * len(seen_twice), "but elsewhere"


def test_epochs_are_a_budget(toy_sft_recipe, chat, capsys):
    """What does not fill a step at the end is said, in rows and in conversations."""
    options = ["--data.global_batch_size", "14", "--budget.max_steps", "null", "--budget.max_epochs", "1"]
    cli = fit(toy_sft_recipe, *options)
    rows = list(islice(cli.datamodule.order().iterate(0), cli.datamodule.order().num_rows(1)))
    assert cli.trainer.global_step == len(rows) // 14 >= 1
    trained, left = (
        {document.visit.sample for row in part for document in row.documents}
        for part in (rows[: len(rows) // 14 * 14], rows[len(rows) // 14 * 14 :])
    )
    assert left
    assert len(trained) + len(left) == len(list(StreamingDataset(f"{chat}/train")))
    said = f"{len(rows) % 14} rows (conversations: {len(left)})"
    out = capsys.readouterr().out
    assert f"budget.max_epochs 1 leaves out {said} at the end, less than an optimizer step of data.global_ba" in out
    assert re.search(rf"^left out of the last epoch +{re.escape(said)}$", out, re.MULTILINE)


def test_the_longest_input_follows_the_layout(toy_sft_recipe):
    longest = {}
    for layout, positions in (("concat", "continued"), ("concat", "restarted"), ("separate", "continued")):
        options = ["--data.duplication.layout", layout, "--data.duplication.copy_positions", positions]
        data = fit(toy_sft_recipe, "--budget.max_steps", "1", *options).datamodule
        longest[layout, positions] = data.longest_input
    assert longest["separate", "continued"] == longest["concat", "restarted"] <= 200
    assert longest["concat", "continued"] == 2 * longest["separate", "continued"]


def test_a_row_may_be_longer_than_the_models_context(toy_sft_recipe):
    cli = fit(toy_sft_recipe, "--data.seq_len", "1000", "--budget.max_steps", "1")
    assert cli.model.config.max_seq_len == 400


def test_a_document_longer_than_the_models_context_is_named(toy_sft_recipe, source_folder, tmp_path):
    short = tmp_path / "short"
    short.mkdir()
    for file in Path(source_folder).iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 300}))
    with pytest.raises(
        UserError, match=r"longest input of the data, 3\d\d tokens .* 300 tokens; .* model.context.max_seq_len$"
    ):
        fit(toy_sft_recipe, "--model.init_from", str(short))


def test_datasets_are_mixed_and_must_share_a_template(toy_sft_recipe, prepared, chat, tmp_path):
    def prepare(template):
        records = [{"prompt": f"ask {number}", "completion": "stone garden " * 9} for number in range(60)]
        (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
        output = str(tmp_path / template)
        PrepareChat(
            input=[str(tmp_path / "records.jsonl")],
            tokenizer=prepared.tokenizer,
            template=template,
            output=output,
            val_share=0.0,
            num_workers=1,
        ).run()
        return output

    other = prepare("mistral")
    data = fit(toy_sft_recipe, "--data.datasets", f"{{{chat}: 1, {other}: 3}}", "--budget.max_steps", "1").datamodule
    sources = [key.visit.source for row in islice(data.order().iterate(0), 40) for key in row.documents]
    assert 0.6 < sources.count(1) / len(sources) < 0.9
    with pytest.raises(UserError, match=r"different chat templates: .* \(mistral\), .*alpaca \(alpaca\); prep"):
        fit(toy_sft_recipe, "--data.datasets", f"{{{chat}: 1, {prepare('alpaca')}: 1}}")


def test_another_tokenizer_is_refused(toy_sft_recipe, tmp_path):
    from meap_lit.data.prepare.tokenizer import TrainTokenizer

    (tmp_path / "text.txt").write_text("quite another text " * 50)
    TrainTokenizer(input=[str(tmp_path / "text.txt")], vocab_size=270, output=str(tmp_path / "tokenizer")).run()
    with pytest.raises(UserError, match="was prepared with another tokenizer than"):
        fit(toy_sft_recipe, "--data.tokenizer", str(tmp_path / "tokenizer"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("seq_len", "420", "data.seq_len was 400 in the run of the checkpoint and is 420 now"),
        (
            "duplication.mask_ratio",
            "0",
            r"data.duplication was {'mask_ratio': 0.2, .*} in the run .* and is {.*: 0.0, ",
        ),
        ("seed", "5", "data.seed was 1 in the run of the checkpoint and is 5 now"),
    ],
)
def test_a_resume_counts_on_the_same_rows(toy_sft_recipe, tmp_path, option, value, message):
    fit(toy_sft_recipe, "--budget.max_steps", "5")
    checkpoint = tmp_path / "runs" / "toy" / "version_0" / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=message):
        fit(toy_sft_recipe, "--ckpt_path", str(checkpoint), f"--data.{option}", value)


def test_a_checkpoint_from_before_an_option_of_the_copies_resumes(data):
    data.setup("fit")
    state = {"step": 1, "samples": data.global_batch_size, "datasets": data.fingerprints, "rows": data.row_settings}
    older = {name: value for name, value in data.row_settings["duplication"].items() if name != "mask_inputs"}
    data.load_state_dict({**state, "rows": {**data.row_settings, "duplication": older}})
    data.duplication = dataclasses.replace(data.duplication, mask_inputs=False)
    with pytest.raises(UserError, match=r"^data.duplication was .*'mask_inputs': True"):
        data.load_state_dict({**state, "rows": {**data.row_settings, "duplication": older}})


def test_the_loss_has_a_multiple_of_256_rows(data):
    """Buffers of many sizes fragment the memory of a process, until it has none left."""
    data.setup("fit")
    rows = list(islice(data.order().iterate(0), 8))
    reader = data._reader("train")
    for count in (1, 3, 8):
        batch = reader.read(rows[:count], rows[:count], count)
        labels, positions = batch["labels"].flatten(), batch["label_positions"]
        supervised = (labels != IGNORE_INDEX).nonzero()[:, 0]
        assert len(supervised) == batch["num_labels"]
        assert set(supervised.tolist()) <= set(positions.tolist())
        assert len(positions) == len(set(positions.tolist()))
        assert len(positions) == min(-(-len(supervised) // POSITIONS_STEP) * POSITIONS_STEP, len(labels))
