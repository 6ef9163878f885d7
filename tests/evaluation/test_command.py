"""Every recipe of the command `evaluate` whose items are continued, by a model that looks the answer up beside one that
guesses: items, batches, records on disk, scores, tables and figures are those of a user."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import yaml

from meap_lit.cli import main
from meap_lit.evaluation import command as evaluate
from meap_lit.inference.language_model import LanguageModel
from meap_lit.recipe.file import lineage

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "eval").glob("*.yaml"))
RECORDS = json.loads((ROOT / "data" / "eval" / "reasoning.json").read_text())
PEOPLE = ("Anna", "Bruno", "Clara", "Dario", "Elena", "Fritz", "Greta", "Hugo", "Irina", "Jonas")

GRID = ["--task.lengths", "[2000]", "--task.depths", "[0,52,100]"]
ESSAYS = [*GRID, "--task.haystack", "null", "--task.num_repeats", "1"]
QUESTIONS = ["--task.file", "{folder}/questions.jsonl", "--task.num_documents", "5", "--task.gold", "[0,2,4]"]
SUMMARIES = ["--task.file", "{folder}/articles.jsonl"]


# ------------------------------------------------------------------------------------------------------- readers


def finish_sentences(prompt: str) -> str:
    """The rest of each sentence that the prompt leaves blank, or begins at its end."""
    document, question = re.split(r"\n\nNow, the questions? (?:is|are): ", prompt)
    stems = re.findall(r"(The [^_?]+?)_{4,}", question) or [re.split(r"questions?\. ", question)[-1]]
    return ". ".join(re.findall(re.escape(stem) + r"(.+)\n", document)[0] for stem in stems)


def find_number(prompt: str) -> str:
    key = re.findall(r"number for (\S+) mentioned", prompt)[0]
    return re.findall(rf"numbers for {key} is: (\d+)", prompt)[0]


def answers_of(prompt: str) -> list[str]:
    """The answer to the question that a prompt ends with, if it holds all that it follows from; and some other one."""
    (record,) = (record for record in RECORDS if f"is: {record['question']}Before" in prompt)
    assert all(prompt.count(f"\n{sentence}\n") == 1 for sentence in record["derivations"])
    return [record["answer"], "?"]


def values(prompt: str) -> list[str]:
    """The value that is asked for, and all values."""
    data, key = re.search(r"JSON data:\n(\{.*\})\n\nKey: \"(.*)\"\nCorresponding value:", prompt, re.DOTALL).groups()
    pairs = json.loads(data)
    return [pairs[key], *pairs.values()]


def towns(prompt: str) -> list[str]:
    """Where the person of the question lives, and all towns."""
    person = re.search(r"Question: where does (\w+) live", prompt)[1]
    found = re.findall(r"(\w+) lives in (\S+)\.", prompt)
    return [dict(found).get(person, "?"), *(town for _, town in found)]


# by the beginning of a recipe's name: options, what the oracle says of a prompt, what one who guesses says, and between
# which scores, in percent, guessing ends
CASES = {
    "needle_ruler": ([*GRID, "--task.num_repeats", "2"], find_number, lambda prompt: "1234567", (0, 0)),
    "needle": (ESSAYS, finish_sentences, lambda prompt: "?", (0, 0)),
    "reasoning": ([*ESSAYS, "--task.num_needles", "[2,5]"], lambda p: answers_of(p)[0], lambda p: "?", (0, 0)),
    "key_value_75": (
        ["--task.file", "{folder}/pairs.jsonl", "--task.gold", "[0,3]"],
        lambda prompt: values(prompt)[0],
        lambda prompt: random.Random(prompt).choice(values(prompt)[1:]),
        (5, 50),  # of four pairs; 40 items have a standard error of 7
    ),
    "key_value": (
        ["--task.num_pairs", "5", "--task.num_sets", "12"],
        lambda prompt: values(prompt)[0],
        lambda prompt: random.Random(prompt).choice(values(prompt)[1:]),
        (4, 40),  # one in five; 60 items have a standard error of 5
    ),
    "multi_document_qa": (
        QUESTIONS,
        lambda prompt: towns(prompt)[0],
        lambda prompt: random.Random(prompt).choice(towns(prompt)[1:] or ["?"]),
        (0, 45),  # one in five; 30 items have a standard error of 7
    ),
    "hallucination": (SUMMARIES, lambda prompt: "An old market.", lambda prompt: "A new market.", None),
}


def case_of(recipe: Path):
    return next((case for name, case in CASES.items() if recipe.stem.startswith(name)), None)


@pytest.fixture(scope="module")
def folder(source_folder, tmp_path_factory) -> Path:
    """Two checkpoints whose context is long, and data in the formats of the benchmarks."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name in ("oracle", "guess"):
        shutil.copytree(source_folder, folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    rng = random.Random(0)
    pairs = [[f"{rng.getrandbits(64):016x}", f"{rng.getrandbits(64):016x}"] for _ in range(80)]
    rows = {
        "pairs": [
            {"ordered_kv_records": pairs[n : n + 4], "key": pairs[n][0], "value": pairs[n][1]} for n in range(0, 80, 4)
        ],
        "questions": [
            {
                "question": f"where does {person} live",
                "answers": [f"{person}ville"],
                "ctxs": [
                    {"title": other, "text": f"{other} lives in {other}ville.", "isgold": other == person}
                    for other in PEOPLE
                ],
            }
            for person in PEOPLE
        ],
        "articles": [{"document": f"An old market near the river {n}.", "summary": "A market."} for n in range(3)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def test_there_is_a_case_for_every_recipe_whose_items_are_continued():
    without = {"attention", "attention_segments", "commonsense", "copying", "judge", "perplexity"}
    assert {recipe.stem for recipe in RECIPES if case_of(recipe) is None} == without


def test_no_two_recipes_write_into_the_same_folder():
    folders = []
    for recipe in RECIPES:
        if recipe.stem != "judge":
            files = [yaml.safe_load(file.read_text()) for file in reversed(lineage(recipe))]
            class_path = next(file["task"]["class_path"] for file in files if "class_path" in file.get("task", {}))
            folders.append(next((file["name"] for file in files if "name" in file), class_path))
    assert len(set(folders)) == len(folders) > 15


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if case_of(recipe)], ids=lambda recipe: recipe.stem)
def test_an_oracle_is_always_right_and_guessing_is_chance(recipe, folder, tmp_path, monkeypatch, capsys):
    options, look_up, guess, chance = case_of(recipe)

    class Reader(LanguageModel):
        """Reads the text of its prompts instead of having weights."""

        def continue_texts(self, prompts, *, max_new_tokens, stop_token_ids=(), is_done=None):
            reply = look_up if self.checkpoint.endswith("oracle") else guess
            return [" " + reply(self.tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in prompts]

    monkeypatch.setattr(evaluate, "LanguageModel", Reader)
    monkeypatch.chdir(ROOT)
    if recipe.stem == "needle_multi":
        options = [*options, "--task.prompt_style", "chat", "--task.template", "alpaca"]
    words = [word.replace("{folder}", str(folder)) for word in options]
    command = ["evaluate", "--config", str(recipe), "--output", str(tmp_path), *words]
    assert main([*command, "--checkpoint", str(folder / "guess"), str(folder / "oracle")]) == 0
    (file,) = tmp_path.glob("*/*--*/result.json")
    content = json.loads(file.read_text())
    guessed, found = content["results"]
    assert len(found["items"]) == len({item["id"] for item in found["items"]}) > 2
    printed = capsys.readouterr().out
    if chance is None:
        assert content["extra"]["not judged yet (python -m meap_lit judge) (oracle)"] == 3
        return
    metric = next(iter(found["scores"]))
    for name, mean in found["scores"].items():
        assert mean["value"] == (0 if name == "closed_book" else 100), name
    value = guessed["scores"][metric]["value"]
    assert chance[0] <= value <= chance[1]
    assert content["difference"][metric]["value"] == pytest.approx(100 - value)
    assert f"{metric} by" in printed
    assert list(file.parent.glob("*.png"))
