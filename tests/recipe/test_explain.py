from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.recipe.explain import check_values, explain


class Group:
    def __init__(self, steps: int | None = None, every: int = 1000) -> None: ...


KNOWN = {"model": None, "budget": Group, "hang": None}


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            'Parser key "data": Problem with given class_path \'m.Data\': Parser key "duplication.duplication": '
            'Unable to load config "3"',
            "data.duplication must be a mapping ({key: value}), got 3",
        ),
        (
            'Parser key "budget.budget": Unable to load config "null"',
            "budget must be a mapping ({key: value}), got null; a run needs one of budget.max_tokens, budget.max_steps "
            "and budget.max_epochs",
        ),
        (
            "Parser key \"model\": Errors: - Expected a <class 'float'> - Multiple subclasses with name Linear. "
            "Give the full class path to avoid ambiguity: meap_lit.masking.Linear, other.Linear. Given value: Linear",
            "model: several classes are called Linear; name one of meap_lit.masking.Linear, other.Linear",
        ),
        ("unrecognized arguments: --outptu x", "unrecognized arguments: --outptu x; did you mean '--output'?"),
        (
            "Parser key \"trainer.logger\": Errors: - Problem with given class_path 'm.Logger': the following "
            "arguments are required: save_dir - Expected a <class 'bool'> Given value type: <class 'Namespace'>",
            "trainer.logger: the following arguments are required: save_dir",
        ),
        (
            'Parser key "size": Does not validate against any of the Union subtypes Subtypes: [...] Errors: - '
            "Expected a <class 'int'> - Expected a typing.Literal[64, 32] - Expected a typing.Literal['half'] "
            "Given value: fp8",
            "size must be 64, 32 or half, got fp8",
        ),
        (
            "Parser key \"size\": Expected a <class 'int'>. Got value: 4000000.0",
            "size must be a whole number, got 4000000.0; write 4_000_000",
        ),
        (
            "Parser key \"size\": Expected a <class 'int'>. Got value: 0.5",
            "size must be a whole number, got 0.5",
        ),
    ],
)
def test_a_complaint_in_one_line(message, line):
    assert explain(message, {"output": None, "input": None}) == line


def test_a_module_of_the_current_folder_is_found_by_another_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "Parser key \"model\": Problem with given class_path 'mine.Rise': No module named 'mine'"
    line = "model: class_path mine.Rise cannot be imported: No module named 'mine'"
    assert explain(message, {}) == line
    (tmp_path / "mine.py").touch()
    assert explain(message, {}) == f"{line}; to find it in the current folder, run python -m meap_lit"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--hng.timeout_minutes", "; did you mean '--hang'?"),
        ("--budget.stps", "; did you mean '--budget.steps'?"),
        ("--budget.zzz", "; choose from --budget.steps, --budget.every"),
        ("--budget.steps.first", ""),
        ("--zzz", "; choose from --model, "),
    ],
)
def test_an_unknown_option_of_a_recipe(given, hint):
    line = explain(f"unrecognized arguments: {given} 5", KNOWN)
    assert line.startswith(f"unrecognized arguments: {given} 5{hint}")
    assert hint or line.endswith("5")
    key, meant = given.removeprefix("--"), hint.replace("--", "")
    assert explain(f"Option '{key}' is not accepted", KNOWN).startswith(f"there is no key '{key}'{meant}")


# ------------------------------------------------------------------------------- what the parser lets pass


@dataclass
class Options:
    size: int
    rate: float = 1.0
    name: str | None = None


class Base:
    def __init__(self, seed: int = 0, weights: dict[str, float] | None = None) -> None: ...


class Part(Base):
    def __init__(self, options: Options, anything: Any = 1, implicit: int = None, **kwargs: Any) -> None: ...  # noqa: RUF013


PART = {"class_path": "tests.recipe.test_explain.Part", "init_args": {"options": {"size": 1}}}
RECIPE = {
    "seed_everything": 0,
    "trainer": {"log_every_n_steps": 10},
    "data": PART,
    "budget": {"steps": 3, "every": 5},
    "base": None,
}


def changed(value, path, recipe=RECIPE):
    """A copy of `recipe` with `value` at a dotted path."""
    first, _, rest = path.partition(".")
    below = recipe.get(first)
    return recipe | {first: changed(value, rest, below if isinstance(below, Mapping) else {}) if rest else value}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.init_args.options", None, "data.options must not be null; give it a value"),
        ("data.init_args.options.size", None, "data.options.size must not be null; give it a value"),
        ("data.init_args.options.rate", None, "data.options.rate must not be null; leave it out for its default"),
        ("data.init_args.seed", None, "data.seed must not be null; leave it out for its default"),
        ("budget.every", None, "budget.every must not be null; leave it out for its default"),
        (
            "trainer.callbacks",
            [PART, changed(None, "init_args.options", PART)],
            "trainer.callbacks[1].options must not be null; give it a value",
        ),
        ("seed_everything", -1, "seed_everything must be in [0, 4294967295], got -1"),
        ("seed_everything", 2**32, "seed_everything must be in [0, 4294967295], got 4294967296"),
        ("trainer.log_every_n_steps", 0, "trainer.log_every_n_steps must be at least 1, got 0"),
        ("trainer.num_nodes", 0, "trainer.num_nodes must be in [1, 100000], got 0"),
        ("trainer.gradient_clip_val", -1.0, "trainer.gradient_clip_val must be at least 0, got -1"),
    ],
)
def test_a_value_that_the_parser_lets_pass_is_named(path, value, message):
    with pytest.raises(UserError) as error:
        check_values(changed(value, path), KNOWN)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.init_args.options.name", None),
        ("data.init_args.weights", None),
        ("data.init_args.weights", {"a": 1.0}),
        ("data.init_args.anything", None),
        ("data.init_args.implicit", None),
        ("budget.steps", None),
        ("data", None),
        ("trainer.log_every_n_steps", None),
    ],
)
def test_null_is_taken_where_it_means_something(path, value):
    check_values(changed(value, path), KNOWN)


@pytest.mark.parametrize("command", ["fit", "plan", "preview"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.mask_ratio.hold_off", "-3"), "model.mask_ratio.hold_off must be at least 0, got -3"),
        (("--model.mask_ratio.mask_ratio", "15"), "model.mask_ratio.mask_ratio must be in [0, 1), got 15; write 0.15"),
    ],
)
def test_a_wrong_value_of_a_schedule_is_named_though_a_number_would_do(toy_recipe, capsys, command, words, message):
    schedule = ["--model.mask_ratio", "meap_lit.masking.WarmupHold"]
    assert main([command, "--config", str(toy_recipe), *schedule, *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("--trainer.callbacks+=nothing.Here", "trainer.callbacks: class_path nothing.Here cannot be imported"),
        ("--trainer.callbacks=[nothing.Here]", "trainer.callbacks: class_path nothing.Here cannot be imported"),
        ("--trainer.logger=[{class_path: nothing.Here}]", "trainer.logger: class_path nothing.Here cannot be imported"),
        ("--trainer.profiler.class_path=nothing.Here", "trainer.profiler: class_path nothing.Here cannot be imported"),
        ("--model=nothing.Here", "model: class_path nothing.Here cannot be imported: No module named 'nothing'"),
        ("--model.mask_ratio=nothing.Here", "model.mask_ratio: class_path nothing.Here cannot be imported"),
        ("--data.preparation+=nothing.Here", "data.preparation: class_path nothing.Here cannot be imported"),
        (
            "--trainer.callbacks+=meap_lit.callbacks.Budge",
            "trainer.callbacks: class_path meap_lit.callbacks.Budge",
        ),
        (
            "--trainer.callbacks+=torch.nn.Linear",
            "trainer.callbacks: a class_path must name a subclass of Callback",
        ),
        ("--model=torch.nn.Linear", "model: a class_path must name a subclass of LightningModule, got torch.nn.Linear"),
    ],
)
def test_a_class_path_that_names_no_fitting_class_is_named_with_its_key(capsys, override, line):
    assert main(["fit", "--config", "recipes/quickstart.yaml", override, "--print_config"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
