"""In a step that is not logged the host asks the device for nothing, so that it can run ahead of it."""

import json
import os

import pytest

from meap_lit.callbacks import stopping
from meap_lit.data.prepare.text import PrepareText
from meap_lit.modules import MEAPFineTuning, MEAPPretraining
from tests.support.devices import on_devices
from tests.support.toy_module import fork
from tests.support.waiting import waits_of


@pytest.fixture
def mixed(prepared, tmp_path):
    """Options of a run on two datasets."""
    output = str(tmp_path / "another")
    files = [str(prepared.texts / f"{number}.txt") for number in range(60)]
    PrepareText(input=files, tokenizer=prepared.tokenizer, output=output, val_share=0.0, num_workers=1).run()
    return ["--data.datasets", json.dumps({prepared.dataset: 0.7, output: 0.3})]


def check(unlogged, logged, makes_tensors=False):
    assert not unlogged, "\n".join(unlogged)
    assert logged, "what is logged is read"
    assert makes_tensors == any(what.startswith("tensor") for what in logged), "the host's own numbers stay there"


@on_devices
def test_pretraining(toy_recipe, mixed, device):
    options = ["--model.protect", "[eos]", "--model.span_len", "2", "--trainer.accelerator", device]
    options += ["--model.compile", "false"]  # nothing is compiled under the modes that record
    check(*waits_of(toy_recipe, *mixed, *options))


@on_devices
def test_fine_tuning_in_bf16_with_adapters(toy_sft_recipe, device):
    options = ["--model.lora.rank", "2", "--trainer.precision", "bf16-mixed", "--trainer.accelerator", device]
    options += ["--model.compile", "false"]
    check(*waits_of(toy_sft_recipe, *options))


def test_two_ranks_do_not_ask_each_other_either(toy_recipe, tmp_path, monkeypatch):
    """But after the first step and after that which follows a validation: how long a step takes is not known before."""
    monkeypatch.setattr(stopping, "ASK_EVERY_S", 1e9)

    def run():
        unlogged, logged = waits_of(toy_recipe, "--trainer.devices", "2", "--trainer.strategy", "ddp")
        checks = [what for what in unlogged if "stopping.py" in what]
        assert sum(what.startswith("tolist") for what in checks) == 2
        waits = [what for what in unlogged if what not in checks], logged
        (tmp_path / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(waits))

    assert fork(run, num_ranks=2) == [0, 0]
    for rank in (0, 1):
        check(*json.loads((tmp_path / f"{rank}.json").read_text()), makes_tensors=True)  # to decide together


@pytest.mark.parametrize("module", [MEAPPretraining, MEAPFineTuning])
def test_one_number_that_is_read_would_be_found(toy_recipe, toy_sft_recipe, monkeypatch, module):
    plain = module.training_step

    def curious(self, batch, batch_idx):
        loss = plain(self, batch, batch_idx)
        self.seen = loss.item()
        return loss

    monkeypatch.setattr(module, "training_step", curious)
    unlogged, _ = waits_of(toy_recipe if module is MEAPPretraining else toy_sft_recipe)
    assert len(unlogged) == 7 * 2
    assert all(what.startswith("aten._local_scalar_dense") and "curious" in what for what in unlogged)
