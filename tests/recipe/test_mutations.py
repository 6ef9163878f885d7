"""Hundreds of recipes made wrong at random: each is accepted, or refused in one line."""

import logging
import random
import shlex
from pathlib import Path

import pytest
import yaml

from meap_lit.cli import main, read_command
from meap_lit.errors import UserError
from meap_lit.recipe.cli import RecipeCLI
from meap_lit.recipe.file import check_words
from tests.recipe.test_cli import EVALUATIONS, OVERLAYS, RUNNABLE
from tests.support.mutations import VALUES, any_place, merged, mutants

LONGEST = 1000


class Built(RecipeCLI):
    """Reads a recipe and builds its objects; nothing is run."""

    def start(self):
        pass


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def training_seeds(runs):
    seeds = {str(path): merged(path) for path in RUNNABLE}
    seeds |= {str(path): merged(Path("recipes/quickstart.yaml"), path) for path in OVERLAYS}
    for tree in seeds.values():
        tree["trainer"] |= {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False}
        tree["trainer"]["logger"]["init_args"]["save_dir"] = str(runs)
    return seeds


def outcomes(cases, run, monkeypatch, capsys):
    """How many of the cases, each a name and words of a command, were accepted and how many refused."""
    accepted = refused = 0
    for name, words in cases:
        with monkeypatch.context() as patch:
            patch.setattr("meap_lit.cli.read_command", lambda arguments, words=words: _Run(run, words))
            try:
                status = main(["stand-in"])
            except BaseException as error:
                raise AssertionError(f"{name} ends in a traceback") from error
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert (status, len(lines)) in ((0, 0), (2, 1)), f"{name}: {lines}"
        assert all(len(line) < LONGEST + 100 and line.isprintable() for line in lines), f"{name}: {lines}"
        assert all(len(line) > len("error: ") + 10 for line in lines), f"{name}: {lines}"
        accepted += status == 0
        refused += status == 2
    return accepted, refused


class _Run:
    def __init__(self, run, words):
        self.words, self._run = words, run

    def run(self):
        self._run(self.words)


@pytest.mark.slow
def test_a_mutated_recipe_is_accepted_or_refused_in_a_line(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    seeds = training_seeds(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)  # some mutants name a folder of logs, which is made

    def cases():
        for mutant in mutants(seeds, 204, seed=1):
            recipe.write_bytes(mutant.text)
            yield mutant.name, ["fit", "--config", str(recipe)]

    accepted, refused = outcomes(cases(), Built.run, monkeypatch, capsys)
    assert accepted >= 10  # otherwise something else is wrong with all
    assert refused >= 130


@pytest.mark.slow
def test_a_mutated_evaluation_is_accepted_or_refused_in_a_line(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    seeds = {str(path): merged(path) for path in EVALUATIONS}
    monkeypatch.chdir(tmp_path)

    def cases():
        for mutant in mutants(seeds, 136, seed=2):
            recipe.write_bytes(mutant.text)
            command = ["judge", "--predictions", "x"] if "judge" in mutant.name else ["evaluate", "--checkpoint", "x"]
            yield mutant.name, [*command, "--config", str(recipe)]

    accepted, refused = outcomes(cases(), read_command, monkeypatch, capsys)
    assert accepted >= 5
    assert refused >= 80


@pytest.mark.slow
def test_a_random_option_is_accepted_or_refused_in_a_line(tmp_path, monkeypatch, capsys):
    generator = random.Random(3)
    recipe = Path("recipes/quickstart.yaml").resolve()
    tree = merged(recipe)
    monkeypatch.chdir(tmp_path)
    logs = ["--trainer.logger.init_args.save_dir", str(tmp_path)]

    def cases():
        for _ in range(40):
            place = any_place(tree, generator, inside=dict)
            value = generator.choice(VALUES)
            text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n...")[0]
            option = "--" + ".".join(str(key) for key in place if key != "init_args")
            words = ["fit", "--config", str(recipe), *logs, f"{option}={text.strip()}"]
            yield shlex.join(words)[:200], words

    accepted, refused = outcomes(cases(), Built.run, monkeypatch, capsys)
    assert accepted >= 1
    assert refused >= 25


# ----------------------------------------------------------------------------------------------- one by one

BOMB = "bomb:\n- &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"- &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed_everything: 1", "seed_everything: \xff", "recipe {recipe}, line 1: not valid UTF-8"),
        ("max_steps: 12", "max_steps: 012", "recipe {recipe}, line 19: YAML reads 012 as a number in base 8; quote it"),
        (
            "max_steps: 12",
            "max_steps: 1:12",
            "recipe {recipe}, line 19: YAML reads 1:12 as a number in base 60; quote",
        ),
        ("lr: 3.0e-3", "lr: " + "9" * 5000, "recipe {recipe}, line 8: a number of 5,000 digits; the most is 400"),
        (
            "mask_ratio: ",
            f"mask_ratio: {'[' * 2000}1{']' * 2000}\n    x: ",
            "line 7: values are nested more than 50 levels deep",
        ),
        ("seed_everything: 1", BOMB, "line 7: more than 100,000 values, aliases (*name) counted as what they name"),
        ("seed_everything: 1", "x: &x [*x]", "line 1: *x is a part of itself"),
        ("lr: 3.0e-3", "lr: 3.0e-3, lr: 1.0e-3", "line 8: the key 'lr' appears twice; keep one of the two"),
        ("micro_batch_size: 4", "micro_batch_size: ${nope.key}", "data.micro_batch_size: the recipe has no key nope"),
        ("micro_batch_size: 4", "micro_batch_size: ${model}", "data.micro_batch_size must be a whole number, got "),
        ("micro_batch_size: 4", "micro_batch_size: ${", "data.micro_batch_size: a reference (${...}) that"),
        ("max_steps: 12", "max_steps: '${budget.max_steps}'", "budget.max_steps"),
        ("lr: 3.0e-3", "lr: 1.0e+30", "model.optimizer.lr must be in (0, 1], got 1e+30"),
        ("name: toy", 'name: "t\\0y"', "trainer.logger.name holds a NUL character, got t\\x00y"),
        ("lr: 3.0e-3", "lr: .nan", "model.optimizer.lr must be finite, got nan"),
        ("mask_ratio: 0.15", "mask_ratio: .nan", "model.mask_ratio must be finite, got nan"),
        ("lr: 3.0e-3", "betas: [0.9, 1.5], lr: 3.0e-3", "model.optimizer.betas must be in [0, 1), got 1.5"),
        ("lr: 3.0e-3", "eps: 0.0, lr: 3.0e-3", "model.optimizer.eps must be in (0, 1), got 0"),
        (
            "lr: 3.0e-3",
            "weight_decay: -1.0, lr: 3.0e-3",
            "model.optimizer.weight_decay must be in [0, 1 / ",
        ),
        ("lr: 3.0e-3", f"lr: {'x' * 10_000}", "got xxx"),
        ("class_path: meap_lit.data.pretraining.PretrainingData", "class_path: [a]", "a class_path must be text, not"),
        ("max_steps: 12", "max_steps: 100000000000000000000", "budget.max_steps must have at most 64 bits, got 1000"),
    ],
)
def test_what_was_a_traceback_or_accepted_is_refused(toy_recipe, capsys, old, new, message):
    text = toy_recipe.read_text()
    assert old in text
    toy_recipe.write_bytes(text.replace(old, new).encode("latin-1"))
    assert main(["fit", "--config", str(toy_recipe)]) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message.replace("{recipe}", str(toy_recipe)) in line
    assert len(line) < 400


FLOW_BOMB = ", ".join(f"&a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12))


@pytest.mark.parametrize(
    "words",
    [
        ("fit", "--config", "recipes/quickstart.yaml", "--data.storage_options"),
        ("plan", "--config", "recipes/quickstart.yaml", "--data.datasets"),
        ("evaluate", "--config", "recipes/eval/needle.yaml", "--checkpoint", "x", "--task"),
    ],
)
@pytest.mark.parametrize("between", [" ", "="])
def test_a_word_that_is_a_huge_value_is_refused(capsys, words, between):
    *others, option = words
    bomb = f"[&a0 [1, 1], {FLOW_BOMB}]"
    assert main([*others, *([option, bomb] if between == " " else [f"{option}={bomb}"])]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option}, line 1: more than 100,000 values, aliases")


@pytest.mark.parametrize("text", ["a: 1 & b: 2 * c", "&x {a: 1, a: 2, b: *x1}", "{&*", "&a [1, 2] *a"])
def test_a_text_that_looks_like_aliases_is_taken_as_it_is(text):
    check_words(["generate", "--prompt", text, f"--stop={text}"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("trainer", "null"), ("trainer", "5"), ("trainer", "[1]"), ("budget", "null"), ("budget", "[]")],
        *[("budget", "text"), ("checkpoint", "null"), ("checkpoint", "[1]"), ("checkpoint", "1.5")],
    ],
)
def test_a_group_that_is_no_mapping_is_named(toy_recipe, capsys, key, value):
    content = yaml.safe_load(toy_recipe.read_text()) | {key: yaml.safe_load(value)}
    toy_recipe.write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(toy_recipe)]) == 2
    assert f"error: {key} must be a mapping ({{key: value}}), got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model:", "modle:", "there is no key 'modle"),
        ("budget:", "modle: {}\nbudget:", "there is no key 'modle'; did you mean 'model'?"),
        ("log_every_n_steps: 1", "log_every_n_steps: -1", "trainer.log_every_n_steps must be at least 1, got -1"),
    ],
)
def test_what_is_printed_is_checked_too(toy_recipe, capsys, old, new, message):
    toy_recipe.write_text(toy_recipe.read_text().replace(old, new))
    assert main(["fit", "--config", str(toy_recipe), "--print_config"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert printed.out == ""


def test_a_workers_traceback_becomes_its_last_message(capsys, monkeypatch):
    def fail(arguments):
        raise UserError(
            "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            '  File "x.py", line 1, in f\nmeap_lit.errors.UserError: dataset a\nb is damaged\n'
        )

    monkeypatch.setattr("meap_lit.cli.read_command", fail)
    assert main(["export"]) == 2
    assert capsys.readouterr().err == "error: dataset a b is damaged\n"


@pytest.mark.parametrize("key", ["model", "data"])
def test_a_model_or_data_of_no_class_is_named(toy_recipe, capsys, key):
    toy_recipe.write_text(yaml.safe_dump(yaml.safe_load(toy_recipe.read_text()) | {key: {}}))
    assert main(["fit", "--config", str(toy_recipe)]) == 2
    assert f"error: {key}.class_path must name a class of this project" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("evaluate", "--config", "recipes/quickstart.yaml", "--checkpoint", "x"),
            "keys that this command does not know",
        ),
        (
            ("evaluate", "--config", "recipes/eval/needle.yaml", "--checkpoint", "x", "--batch", "5"),
            "did you mean '--batch_t",
        ),
        (
            ("prepare", "facts", "--num_documents", "9" * 5000, "--output", "x"),
            "num_documents: a number of more than 4300 dig",
        ),
        (("prepare", "facts", "--num_documents", "9" * 30, "--output", "x"), "num_documents must have at most 64 bits"),
        (("prepare", "facts", "--num_documents", "5", "--output", "x" * 300), "name too long; name another path"),
        (
            ("tokenizer", "train", "--input", "", "--vocab_size", "300", "--output", "x"),
            "an input has no name; give files",
        ),
    ],
)
def test_wrong_options_of_the_other_commands_are_named(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    here = Path(__file__).parents[2]
    assert main([str(here / word) if word.startswith("recipes/") else word for word in arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert message in line
    assert len(line) < 400
    assert list(tmp_path.iterdir()) == []


def test_what_lightning_says_of_its_arguments_later_is_named(toy_recipe, monkeypatch):
    def complain(self):
        exec("raise ValueError('`x` must be less')", {"__name__": "lightning.pytorch.trainer"})

    monkeypatch.setattr(RecipeCLI, "start", complain)
    with pytest.raises(UserError, match=r"^trainer: `x` must be less$"):
        RecipeCLI.run(["fit", "--config", str(toy_recipe)])


def test_a_bug_keeps_its_traceback(toy_recipe, monkeypatch):
    def bug(self):
        exec("{}['of ours']", {"__name__": "meap_lit.modules.optimizer"})

    monkeypatch.setattr("meap_lit.modules.optimizer.AdamW.__post_init__", bug)
    with pytest.raises(ValueError, match="of ours") as error:
        Built.run(["fit", "--config", str(toy_recipe)])
    assert not isinstance(error.value, UserError)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_message_of_several_lines_is_printed_as_one(capsys, monkeypatch):
    def fail(arguments):
        raise UserError("data.datasets a\nb\x1b[31m does not exist; " + "x" * 5000 + "; name another")

    monkeypatch.setattr("meap_lit.cli.read_command", fail)
    assert main(["export"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: data.datasets a b\\x1b[31m does not exist; xxx")
    assert line.endswith("xxx; name another\n")
    assert len(line) < 1100
