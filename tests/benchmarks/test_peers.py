"""The benchmark beside peers at toy size: all contenders take the same loss, and the table says what was timed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import benchmarks.peers
from benchmarks.peers import Contender, TransformersStep, benchmark, ratio, table
from benchmarks.peers import Timings as T
from benchmarks.step import TrainingStep
from meap_lit.errors import UserError
from meap_lit.model import DecoderConfig

TOY = DecoderConfig(
    num_layers=2, num_heads=2, num_kv_heads=1, hidden_size=16, intermediate_size=16, vocab_size=64, max_seq_len=32
)


def weights(step: TrainingStep) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value for name, value in step.model.state_dict().items()}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_with_our_weights_transformers_takes_our_steps(qk_norm: bool) -> None:
    """The same loss, and after two unmasked steps the same weights: shapes, labels, clipping and optimizer agree."""
    config = DecoderConfig(**{**vars(TOY), "qk_norm": qk_norm})
    ours, theirs = (Contender(name, False, config, 2, "fp32", "cpu")() for name in ("meap_lit", "transformers"))
    assert isinstance(theirs, TransformersStep)
    torch.testing.assert_close(ours.input_ids, theirs.input_ids)
    names = {name.removeprefix("model."): name for name in theirs.model.state_dict()}
    theirs.model.load_state_dict({names[name]: value for name, value in weights(ours).items()})
    before = weights(ours)["lm_head.weight"].clone()
    torch.testing.assert_close(ours.loss(ours.input_ids), theirs.loss(theirs.input_ids))
    for _ in range(2):
        ours(0.0)
        theirs(0.5)  # peers never mask
    assert not torch.equal(weights(ours)["lm_head.weight"], before)
    for name, value in weights(theirs).items():
        torch.testing.assert_close(value, weights(ours)[name], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Contender, "peak_bytes", lambda contender, mask_ratio: 7_000_000)
    output = tmp_path / "results" / "peers.md"
    benchmark(decoder=TOY, micro_batch_size=2, peers=["transformers"], compile=[False], repetitions=3, output=output)
    report = output.read_text()
    assert report in capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:4]] == ["meap_lit", "transformers"]
    for row in rows[2:4]:
        assert float(row[4].replace(",", "")) == pytest.approx(2 * 32 / (float(row[1]) / 1e3), rel=0.1)
        assert row[5] == "7"
    assert rows[-1][0] == "transformers"


def test_each_peer_is_compared_in_its_faster_way() -> None:
    names = [("meap_lit", False), ("meap_lit", True), ("transformers", False), ("transformers", True)]
    contenders = [Contender(name, compiled, TOY, 2, "fp32", "cpu") for name, compiled in names]
    seconds = [[2.0, 2.0, 2.0], [1.0, 2.0, 1.0], [3.0, 3.0, 3.0], [9.0, 9.0, 9.0]]
    lines = table(contenders, [T(wall, [2 * one for one in wall]) for wall in seconds], [0] * 4)
    assert lines[-1] == "| transformers | 3.000 | 1.500 to 3.000 | 3.000 | 1.500 to 3.000 |"
    assert "| meap_lit, compiled | 1000.0 |" in lines[3]


def test_a_ratio_above_one_says_that_the_peer_took_longer() -> None:
    assert ratio([1.0, 1.0, 1.0], [1.25, 1.25, 1.25]) == "1.250 | 1.250 to 1.250"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetitions": 1}, "--repetitions must be at least 2"),
        ({"micro_batch_size": 0}, "--micro_batch_size at least 1"),
        ({"peers": ["litgpt"]}, "--peers litgpt is not installed; pip install litgpt, or leave it out"),
        ({"decoder": DecoderConfig(**{**vars(TOY), "vocab_size": None})}, "--decoder.vocab_size must be given"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.peers, "_versions", lambda: {"meap_lit": "1", "transformers": "5"})
    with pytest.raises(UserError, match=message):
        benchmark(**options)
