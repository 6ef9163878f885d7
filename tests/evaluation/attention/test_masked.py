import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.evaluation.attention.masked import MaskedAttention, key_statistics, statistics
from meap_lit.evaluation.attention.weights import attention_weights
from meap_lit.evaluation.results import extras, figures
from meap_lit.evaluation.task import Result
from meap_lit.inference.language_model import LanguageModel


@pytest.fixture
def model(source_folder):
    return LanguageModel(str(source_folder), device="cpu")


@pytest.fixture
def task(prepared):
    return MaskedAttention(dataset=prepared.dataset, seq_len=60, num_sequences=3, block_size=16)


def reference(source_folder, input_ids, masked):
    """Attention to the positions `masked` and variance of the rest, [L, H] each, row by row in float64."""
    eager = LlamaForCausalLM.from_pretrained(source_folder, attn_implementation="eager").double()
    with torch.no_grad():
        weights = torch.cat(eager(input_ids[None], output_attentions=True).attentions).double().numpy()
    attention, variance = [], []
    for i in range(len(input_ids)):
        there = [j for j in range(i + 1) if j in masked]
        others = [j for j in range(i + 1) if j not in masked]
        if len(there) >= 1 and len(others) >= 2:
            attention.append(weights[:, :, i, there].mean(-1))
            variance.append(weights[:, :, i, others].var(-1))
    assert 0 < len(attention) < len(input_ids)
    return np.mean(attention, axis=0), np.mean(variance, axis=0)


# ------------------------------------------------------------------------------------------------- statistics


def test_statistics_of_each_query_by_hand():
    weights = torch.tensor([[1.0, 0, 0, 0], [0.3, 0.7, 0, 0], [0.5, 0.2, 0.3, 0], [0.1, 0.4, 0.3, 0.2]])[None]
    mean, variance = key_statistics(weights, torch.tensor([False, True, False, False]))
    # the first query sees no masked key, the second only one other
    assert mean[0].tolist() == pytest.approx([0, 0, 0.2, 0.4])
    assert variance[0].tolist() == pytest.approx([0, 0, 0.01, 0.02 / 3])


def test_the_variance_of_nearly_equal_weights_keeps_its_digits():
    seq_len = 4096
    noise = torch.randn(1, 1, seq_len, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = (1 + 0.01 * noise) / seq_len
    input_mask = torch.arange(seq_len) % 7 == 0
    _, variance = key_statistics(weights.float(), input_mask)
    assert float(variance) == pytest.approx(float(weights[0, 0, ~input_mask].var(correction=0)), rel=1e-4)


def test_halving_the_weights_of_masked_keys_is_a_decay_of_half():
    query, key = torch.randn(2, 40, 8), torch.randn(1, 40, 8)
    weights, input_mask = attention_weights(query, key), torch.arange(40) % 5 == 1
    clean, _ = key_statistics(weights, input_mask)
    masked, _ = key_statistics(weights.masked_fill(input_mask, 0) + weights.masked_fill(~input_mask, 0) / 2, input_mask)
    record = {
        reading: {"attention": [mean.mean(1).tolist()], "variance": [[1.0, 1.0]]}
        for reading, mean in (("clean", clean), ("masked", masked))
    }
    scores = MaskedAttention(dataset="unused").score(record)
    assert scores == pytest.approx({"decay": 50, "variance_increase": 0})


@pytest.mark.parametrize("block_size", [1, 7, 60])
def test_statistics_are_those_of_whole_weights_in_float64(model, source_folder, block_size):
    input_ids = torch.randint(320, (60,), generator=torch.Generator().manual_seed(1))
    positions = [0, 5, 17, 18, 40]
    input_mask = torch.zeros(60, dtype=torch.bool)
    input_mask[positions] = True
    found = statistics(model.decoder, input_ids, input_mask, block_size)
    attention, variance = reference(source_folder, input_ids, positions)
    np.testing.assert_allclose(found["attention"], attention, rtol=1e-5)
    np.testing.assert_allclose(found["variance"], variance, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- task


def test_both_readings_count_the_same_positions(model, task, source_folder):
    items = task.items(model)
    assert [item.num_tokens for item in items] == [60, 60, 60]
    read = []
    handle = model.decoder.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0][0]))
    records = task.answer(model, items)
    handle.remove()
    drawn = set()
    for item, record, clean, masked in zip(items, records, read[::2], read[1::2], strict=True):
        assert clean.tolist() == item.input_ids
        positions = (clean != masked).nonzero()[:, 0].tolist()
        assert len(positions) == 9  # 15% of 60
        assert set(masked[positions].tolist()) == {model.tokenizer.mask_token_id}
        for reading, input_ids in (("clean", clean), ("masked", masked)):
            attention, variance = reference(source_folder, input_ids, positions)
            np.testing.assert_allclose(record[reading]["attention"], attention, rtol=1e-5)
            np.testing.assert_allclose(record[reading]["variance"], variance, rtol=1e-4)
        drawn.add(tuple(positions))
    assert len(drawn) == 3


def test_answers_do_not_depend_on_batch_or_blocks(model, task, prepared):
    items = task.items(model)
    other = MaskedAttention(dataset=prepared.dataset, seq_len=60, num_sequences=3, block_size=60)
    for alone, together in zip(
        [other.answer(model, [item])[0] for item in items], task.answer(model, items), strict=True
    ):
        for reading in ("clean", "masked"):
            np.testing.assert_allclose(alone[reading]["attention"], together[reading]["attention"], rtol=1e-5)


def test_a_model_that_cannot_tell_the_mask_from_a_token_has_no_change(model, task):
    with torch.no_grad():
        model.decoder.embed_tokens.weight[:] = model.decoder.embed_tokens.weight[0].clone()
    for record in task.answer(model, task.items(model)):
        assert task.score(record) == {"decay": 0, "variance_increase": 0}


def a_record(number, clean, masked):
    return {
        "id": str(number),
        "cell": {},
        **{
            reading: {"attention": [[attention]], "variance": [[variance]]}
            for reading, (attention, variance) in (("clean", clean), ("masked", masked))
        },
    }


@pytest.fixture
def results(task):
    """Of two checkpoints; the second read its sequences in another order, and one more."""
    ntp = [a_record(0, (0.4, 1.0), (0.4, 1.0)), a_record(1, (0.6, 2.0), (0.5, 2.0))]
    meap = [
        a_record(2, (9.0, 9.0), (9.0, 9.0)),
        a_record(1, (0.8, 4.0), (0.2, 2.2)),
        a_record(0, (0.6, 2.0), (0.1, 1.4)),
    ]
    for record in [*ntp, *meap]:
        record["scores"] = task.score(record)
    return [Result(task, "ntp", ntp), Result(task, "meap", meap)]


def test_two_checkpoints_are_compared_clean_to_masked(task, results):
    extra = extras(results)
    paper = {
        name.replace(", clean to masked", "").removesuffix(" (ntp to meap)"): value
        for name, value in extra.items()
        if "(ntp to meap)" in name
    }
    # attention 0.4, 0.6 to 0.1, 0.2; variance 1, 2 to 1.4, 2.2
    assert paper == pytest.approx(
        {
            "decay, %": 70,  # 0.5 to 0.15
            "decay, t": 7,  # differences 0.3 and 0.4: mean 0.35, standard error 0.05
            "decay, p": 2 / math.pi * math.atan(1 / 7),
            "variance increase, %": 20,  # 1.5 to 1.8
            "variance difference": 0.3,
            "variance increase, t": 3,  # differences 0.4 and 0.2
            "variance increase, p": 2 / math.pi * math.atan(1 / 3),
        }
    )
    assert extra["decay, clean to masked, % (ntp)"] == pytest.approx(10)
    assert extra["variance difference, clean to masked (ntp)"] == 0
    assert extra["variance increase, clean to masked, p (ntp)"] == 1


def test_one_checkpoint_has_the_control_alone(task, results):
    extra = extras(results[:1])
    assert len(extra) == 7
    assert all(name.endswith("(ntp)") for name in extra)


def test_figures_draw_layers_and_heads_of_models_of_any_size(task, results):
    for record in results[1].records:
        for reading in ("clean", "masked"):
            record[reading] = {"attention": [[0.2, 0.3], [0.1, 0.1]], "variance": [[0.2, 0.3], [0.1, 0.1]]}
    drawn = figures(results)
    assert set(drawn) == {"attention_masked", "attention_variance", "attention_decay"}
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn["attention_masked"].axes[0].get_lines()}
    assert set(lines) == {"ntp, clean", "ntp, masked", "meap, clean", "meap, masked"}
    assert lines["ntp, masked"] == pytest.approx([0.45])
    assert lines["meap, clean"] == pytest.approx([0.25, 0.1])
    texts = [[text.get_text() for text in axes.texts] for axes in drawn["attention_decay"].axes[:2]]
    assert texts == [["10"], ["0"] * 4]


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.0}, "task.mask_ratio 0 masks 0 of 60 tokens; at least 1 must be masked and 2 must not"),
        ({"mask_ratio": 0.99}, "task.mask_ratio 0.99 masks 59 of 60 tokens"),
        ({"mask_ratio": 15}, "mask_ratio must be in [0, 1), got 15; write 0.15 for 15%"),
        ({"block_size": 0}, "task.block_size must be at least 1, got 0"),
        ({"seq_len": 2}, "task.mask_ratio 0.15 masks 1 of 2 tokens"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError) as error:
        MaskedAttention(**({"dataset": "unused", "seq_len": 60} | options))
    assert message in str(error.value)


def test_a_model_without_a_row_for_the_mask_is_refused(model, task):
    model.tokenizer.mask_token_id = 320
    with pytest.raises(UserError) as error:
        task.extent(model)
    assert "has no vocabulary row for the mask token: its id is 320, the rows are 320" in str(error.value)


# ----------------------------------------------------------------------------------------------------- recipe


def test_the_recipe_compares_two_checkpoints(prepared, source_folder, tmp_path, capsys):
    toy = ["--task.init_args.dataset", prepared.dataset, "--task.init_args.seq_len", "60", "--device", "cpu"]
    checkpoints = ["--checkpoint", str(source_folder), str(source_folder), "--label", "ntp", "meap"]
    output = ["--output", str(tmp_path / "evaluations")]
    assert main(["evaluate", "--config", "recipes/eval/attention.yaml", *toy, *checkpoints, *output]) == 0
    out = capsys.readouterr().out
    paper = {line.split("(")[0].strip(): line.split()[-1] for line in out.splitlines() if "(ntp to meap)" in line}
    controls = {line.split("(")[0].strip(): line.split()[-1] for line in out.splitlines() if "(ntp)" in line}
    assert len(paper) == 7
    assert paper == controls  # for it is the same checkpoint twice
    pair = tmp_path / "evaluations" / "attention" / "ntp--meap"
    assert sorted(file.name for file in pair.glob("*.png")) == [
        "attention_decay.png",
        "attention_masked.png",
        "attention_variance.png",
    ]
