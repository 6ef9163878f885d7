import yaml

from meap_lit.checkpoint.card import model_card
from meap_lit.checkpoint.source import open_source
from meap_lit.cli import main


def test_the_card_of_a_run_has_its_recipe_without_secrets(toy_recipe, tmp_path):
    schedule = ["--model.mask_ratio", "meap_lit.masking.Linear", "--model.mask_ratio.start", "0.0"]
    schedule += ["--model.mask_ratio.end", "0.2", "--data.storage_options", "{aws_secret_access_key: hunter2}"]
    assert main(["fit", "--config", str(toy_recipe), "--budget.max_steps", "2", *schedule]) == 0
    card = model_card(open_source(tmp_path / "runs" / "toy"), "org/toy", adapter_only=False)
    _, about, text = card.split("---\n")
    assert yaml.safe_load(about) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["meap"],
    }
    assert text.startswith("# toy\n\nA model of ")
    assert "tokens seen: 512\n" in text  # 2 steps of 8 rows of 32
    assert "input tokens that were masked (mask_ratio): Linear (start 0.0, end 0.2)\n" in text
    recipe = yaml.safe_load(text.split("```")[1].removeprefix("yaml"))
    assert recipe["data"]["init_args"]["seq_len"] == 32
    assert "hunter2" not in card


def test_the_card_of_a_checkpoint_has_the_recipe_that_made_it(toy_recipe, tmp_path):
    fit = ["fit", "--config", str(toy_recipe), "--trainer.logger.version", "main", "--budget.max_steps"]
    assert main([*fit, "1"]) == main([*fit, "2", "--ckpt_path", "last", "--model.mask_ratio", "0"]) == 0
    checkpoints = tmp_path / "runs" / "toy" / "main" / "checkpoints"
    for step, ratio in ((1, 0.15), (2, 0.0)):
        card = model_card(open_source(checkpoints / f"step={step}.ckpt"), "org/toy", adapter_only=False)
        assert f"input tokens that were masked (mask_ratio): {ratio}\n" in card


def test_the_card_of_a_folder_says_no_more_than_it_knows(source_folder):
    card = model_card(open_source(source_folder), "org/toy", adapter_only=False)
    assert "mask_ratio" not in card
    assert "Recipe" not in card
