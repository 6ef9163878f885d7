import math
import re

import pytest
import torch
from transformers import LlamaForCausalLM

from meap_lit.cli import main
from meap_lit.evaluation.results import figures
from meap_lit.evaluation.task import Result
from meap_lit.evaluation.tasks.perplexity import Perplexity, context_ends, nll_by_context
from meap_lit.inference.language_model import LanguageModel


@pytest.fixture
def model(source_folder):
    return LanguageModel(str(source_folder), device="cpu")


def evaluate(task, model):
    items = task.items(model)
    return [
        {"id": item.id, "cell": item.cell, **answer, "scores": task.score(answer)}
        for item, answer in zip(items, task.answer(model, items), strict=True)
    ]


@pytest.mark.parametrize(
    ("seq_len", "ends"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (5, [1, 2, 4, 5]), (20, [1, 2, 4, 8, 16, 20])]
)
def test_contexts_are_grouped_by_doubling_length(seq_len, ends):
    assert context_ends(seq_len) == ends


def test_likelihoods_are_those_of_transformers(model, prepared, source_folder):
    task = Perplexity(dataset=prepared.dataset, seq_len=40, num_sequences=2)
    items = task.items(model)
    assert [item.num_tokens for item in items] == [40, 40]
    other = LlamaForCausalLM.from_pretrained(source_folder)
    for item, record in zip(items, evaluate(task, model), strict=True):
        rows = torch.tensor([item.input_ids])
        with torch.no_grad():
            log_probs = other(rows[:, :-1]).logits[0].log_softmax(-1)
        nll = -log_probs[range(40), rows[0, 1:]]
        wanted = [nll[a:b].sum().item() for a, b in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 40))]
        assert record["nll_sums"] == pytest.approx(wanted, rel=1e-4)
        assert record["num_tokens"] == [1, 1, 2, 4, 8, 16, 8]
        assert record["scores"]["nll"] == pytest.approx(nll.mean().item(), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model, prepared):
    torch.nn.init.zeros_(model.decoder.lm_head.weight)
    task = Perplexity(dataset=prepared.dataset, split="train", seq_len=50, num_sequences=4)
    result = Result(task, "nothing", evaluate(task, model))
    assert result.mean().n == 4
    extra = task.extra(result)
    assert extra["perplexity"] == pytest.approx(320, rel=1e-5)
    assert extra["nll, context 33 to 50"] == pytest.approx(math.log(320), rel=1e-5)


def test_it_is_the_validation_loss_of_the_same_rows(toy_recipe, tmp_path, prepared, capsys):
    assert main(["fit", "--config", str(toy_recipe), "--budget.max_steps", "2"]) == 0
    run = tmp_path / "runs" / "toy" / "version_0"
    capsys.readouterr()
    validate = ["validate", "--config", str(toy_recipe), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert main([*validate, "--data.val_samples", "10"]) == 0
    loss = float(re.search(r"val/loss\D+([\d.]+)", capsys.readouterr().out)[1])

    model = LanguageModel(str(run), device="cpu")
    task = Perplexity(dataset=prepared.dataset, seq_len=32, num_sequences=10)
    result = Result(task, "toy", evaluate(task, model))
    assert result.mean().n == 10
    assert result.mean().value == pytest.approx(loss, rel=1e-5)


def test_figures_by_context_from_the_records_alone():
    task = Perplexity(dataset="unused")
    records = [
        {"context_ends": [1, 2, 4], "num_tokens": [1, 1, 2], "nll_sums": sums}
        for sums in ([6.0, 2.0, 2.0], [4.0, 2.0, 4.0])
    ]
    for number, record in enumerate(records):
        record |= {"id": str(number), "cell": {}, "scores": task.score(record)}
    assert [record["scores"]["nll"] for record in records] == [2.5, 2.5]
    assert nll_by_context(records) == {1: 5.0, 2: 2.0, 4: 1.5}
    result = Result(task, "toy", records)
    assert task.extra(result) == {
        "perplexity": math.exp(2.5),
        "nll, context 1": 5.0,
        "nll, context 2": 2.0,
        "nll, context 3 to 4": 1.5,
    }
    line = figures([result])["perplexity"].axes[0].get_lines()[0]
    assert list(line.get_xdata()) == [1, 2, 4]
    assert list(line.get_ydata()) == [5.0, 2.0, 1.5]
