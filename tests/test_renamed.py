"""Recipes, runs and words of earlier versions are understood."""

import importlib
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from meap_lit import renamed
from meap_lit.checkpoint.export import Export
from meap_lit.cli import read_command
from meap_lit.errors import UserError
from meap_lit.recipe.cli import RecipeCLI
from meap_lit.recipe.file import recipe_words
from meap_lit.renamed import current

CONFIG = Path(__file__).parent / "support" / "config_0.1.yaml"
OLD_MODULE = "meap_lit.evaluation.needle"


OLD_CLASSES = [
    "meap_lit.data.chat.PrepareChat",
    "meap_lit.data.merge.MergeShards",
    "meap_lit.data.python_text.PythonText",
    "meap_lit.data.synthetic.FactCorpus",
    "meap_lit.data.synthetic.FactInstructions",
    "meap_lit.data.text.PrepareText",
    "meap_lit.data.tokenizer.TrainTokenizer",
    "meap_lit.duplication.Duplication",
    "meap_lit.evaluation.attention.MaskedAttention",
    "meap_lit.evaluation.attention_segments.AttentionSegments",
    "meap_lit.evaluation.commonsense.Commonsense",
    "meap_lit.evaluation.copying.Copying",
    "meap_lit.evaluation.facts.FactRetrieval",
    "meap_lit.evaluation.hallucination.Hallucination",
    "meap_lit.evaluation.judges.ChatJudge",
    "meap_lit.evaluation.judges.RecordedJudge",
    "meap_lit.evaluation.key_value.KeyValueRetrieval",
    "meap_lit.evaluation.multi_document_qa.MultiDocumentQA",
    "meap_lit.evaluation.needle.MagicNumber",
    "meap_lit.evaluation.needle.MultiNeedle",
    "meap_lit.evaluation.needle.Needle",
    "meap_lit.evaluation.perplexity.Perplexity",
    "meap_lit.evaluation.reasoning.Reasoning",
    "meap_lit.parallel.strategies.FlatSharded",
    "meap_lit.strategies.FlatSharded",
    "meap_lit.strategies.Sharded",
]


@pytest.mark.parametrize("old", OLD_CLASSES)
def test_an_old_class_path_leads_to_a_class_that_exists(old):
    module, name = current(old).rsplit(".", 1)
    assert isinstance(getattr(importlib.import_module(module), name), type)
    module, name = old.rsplit(".", 1)
    with suppress(ModuleNotFoundError):
        assert not hasattr(importlib.import_module(module), name), "a name that still exists is not an old one"


def test_a_run_of_an_earlier_version_resumes_to_the_same_bits_and_is_exported(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepared.texts, "texts")
    assert "meap_lit.data.text.PrepareText" in CONFIG.read_text()
    RecipeCLI.run(["fit", "--config", str(CONFIG)])
    stopped = "runs/toy/version_0/checkpoints/step=5.ckpt"
    old_name = ["--trainer.strategy.class_path", "meap_lit.strategies.Sharded"]
    cli = RecipeCLI.run(["fit", "--config", str(CONFIG), "--ckpt_path", stopped, *old_name])
    assert cli.trainer.global_step == 12
    for run in ("version_0", "version_1"):
        Export(checkpoint=f"runs/toy/{run}", output=run).run()
    whole, resumed = load_file("version_0/model.safetensors"), load_file("version_1/model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(weight.equal(resumed[name]) for name, weight in whole.items())
    assert "meap_lit.data.text" not in Path("runs/toy/version_1/config.yaml").read_text()


def test_a_command_that_reads_recipes_knows_old_names(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task:\n  class_path: {OLD_MODULE}.Needle\n  init_args: {{lengths: [40], depths: [0.5]}}\n")
    command = read_command(["evaluate", "--config", str(recipe), "--checkpoint", "one"])
    assert type(command.task).__name__ == "Needle"
    words = ["--task.class_path", f"{OLD_MODULE}.MultiNeedle", "--task.depths", "[0.5]"]
    command = read_command(["evaluate", "--config", str(recipe), "--checkpoint", "one", *words])
    assert type(command.task).__name__ == "MultiNeedle"
    prompt = read_command(["generate", "--checkpoint", "one", "--prompt", f"{OLD_MODULE}.Needle"]).prompt
    assert prompt == [f"{OLD_MODULE}.Needle"]


def test_a_run_with_a_strategy_that_is_gone_goes_on_with_the_one_that_took_its_place():
    options = {"shard_size": 2, "save_distributed_checkpoint": True}
    strategy = {"class_path": "meap_lit.strategies.FlatSharded", "init_args": options}
    expected = {"class_path": "meap_lit.parallel.strategies.Sharded", "init_args": {"shard_size": 2}}
    assert current({"trainer": {"strategy": strategy}}) == {"trainer": {"strategy": expected}}


def test_a_recipe_that_names_the_mask_token_is_read_without_it():
    model = {"class_path": "meap_lit.modules.MEAPPretraining", "init_args": {"mask_token_id": 1, "seed": 2}}
    assert current({"model": model})["model"]["init_args"] == {"seed": 2}


@pytest.fixture
def _renamed_keys(monkeypatch):
    monkeypatch.setattr(renamed, "KEYS", {"model.share": "mask_ratio", "model.mask_ratio.of": "ratio"})


@pytest.mark.usefixtures("_renamed_keys")
def test_keys_and_classes_are_renamed_wherever_a_recipe_names_them():
    recipe = {
        "model": {"class_path": f"{OLD_MODULE}.Needle", "init_args": {"share": {"of": 0.1}}},
        "data": {"init_args": {"share": "joined", "datasets": {"model.share": 1.0}}},
        "trainer": {"note": "${model.init_args.share.of} of ${data.init_args.share}"},
    }
    assert current(recipe) == {
        "model": {
            "class_path": "meap_lit.evaluation.tasks.needle.Needle",
            "init_args": {"mask_ratio": {"ratio": 0.1}},
        },
        "data": {"init_args": {"share": "joined", "datasets": {"model.share": 1.0}}},
        "trainer": {"note": "${model.init_args.mask_ratio.ratio} of ${data.init_args.share}"},
    }


@pytest.mark.usefixtures("_renamed_keys")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--model.share.of 0.1", "--model.mask_ratio.ratio 0.1"),
        ("--model.init_args.share={of: 0.1}", '--model.init_args.mask_ratio={"ratio": 0.1}'),
        ("--model {share: {of: 0.1}}", '--model {"mask_ratio": {"ratio": 0.1}}'),
        (f"--data.preparation+ {OLD_MODULE}.Needle", "--data.preparation+ meap_lit.evaluation.tasks.needle.Needle"),
        ("fit --config share --chat", "fit --config share --chat"),
        ("fit --probe.batch_size 10 --chat", "fit --chat"),
        ("fit --probe.batch_size=10 --chat", "fit --chat"),
    ],
)
def test_words_are_renamed(old, new):
    words = [old] if "={" in old else old.split(" ", 1) if "{" in old else old.split()
    assert " ".join(recipe_words(words)) == new


@pytest.mark.usefixtures("_renamed_keys")
def test_a_key_under_both_of_its_names_is_refused():
    with pytest.raises(UserError, match=r"model\.share is now called mask_ratio, and both are given; leave out share"):
        current({"model": {"init_args": {"share": 1, "mask_ratio": 2}}})
