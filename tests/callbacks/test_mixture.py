import json

import pytest
from litdata import StreamingDataset

from meap_lit.callbacks.metrics import read_metrics
from meap_lit.callbacks.mixture import Mixture
from meap_lit.data.prepare.chat import PrepareChat
from meap_lit.recipe.cli import RecipeCLI


@pytest.fixture(scope="module")
def short_answers(prepared, tmp_path_factory) -> str:
    """Sixty conversations, shorter than those of the fixture `chat`."""
    folder = tmp_path_factory.mktemp("short_answers")
    with open(folder / "chat.jsonl", "w") as file:
        for number in range(60):
            turns = [
                {"role": "user", "content": f"the river {number}"},
                {"role": "assistant", "content": "finds stone"},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    output = str(folder / "short_answers")
    PrepareChat(
        input=[str(folder / "chat.jsonl")],
        tokenizer=prepared.tokenizer,
        template="mistral",
        output=output,
        val_share=0.0,
        num_workers=1,
    ).run()
    return output


def test_shares_are_those_of_the_tokens_in_the_batches(toy_sft_recipe, chat, short_answers, tmp_path):
    options = ["--data.datasets", json.dumps({chat: 0.4, short_answers: 0.6}), "--trainer.log_every_n_steps", "5"]
    options += ["--trainer.callbacks+=tests.support.recording.Recorder", "--trainer.callbacks.folder", str(tmp_path)]
    trainer = RecipeCLI.run(["fit", "--config", str(toy_sft_recipe), *options]).trainer
    short = {tuple(sample["input_ids"].tolist()) for sample in StreamingDataset(f"{short_answers}/train")}
    tokens, expected = {True: 0, False: 0}, []
    for line in (tmp_path / "0.jsonl").read_text().splitlines():
        for document in (document for row in json.loads(line)["contents"] for document in row):
            tokens[tuple(document) in short] += len(document)
        expected.append(tokens[True] / sum(tokens.values()))
    logged = dict(read_metrics(tmp_path / "runs" / "toy" / "version_0")["mix/short_answers"])
    micro_batches = {step: 2 * step - 1 for step in (5, 10, 12)}  # counted from 0
    assert logged == pytest.approx({step: expected[number] for step, number in micro_batches.items()}, rel=1e-6)
    assert 0 < expected[-1] < 0.5, "shares of tokens are not those of samples"
    mixture = next(callback for callback in trainer.callbacks if isinstance(callback, Mixture))
    assert mixture.shares == pytest.approx({"dataset": 1 - expected[-1], "short_answers": expected[-1]}, rel=1e-9)
