"""Which options hold secrets, and that nothing that is written or printed holds one."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from meap_lit.cli import main
from meap_lit.data.prepare.text import PrepareText
from meap_lit.evaluation.command import describe
from meap_lit.evaluation.task import Task
from meap_lit.recipe.cli import RecipeCLI
from meap_lit.secrets import hide_in_text, hide_in_words, is_secret, with_variables, without_secrets

SECRET = "hunter2-do-not-write"


class KeyedLogger(CSVLogger):
    """A logger of a service."""

    def __init__(self, save_dir: str, api_key: str, url: str) -> None:
        super().__init__(save_dir, name="keyed")
        self.given = (api_key, url)


@pytest.mark.parametrize(
    "name",
    [
        *("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "account_key", "api_key", "apiKey"),
        *("api_token", "Authorization", "client_secret", "clientSecret", "connection_string", "hf_token", "password"),
        *("sas_token", "token", "x-api-key", "private_key", "access_tokens", "credentials"),
        *("secretkey", "accessToken", "ssh_key", "encryption_key"),
    ],
)
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer", "max_tokens", "batch_tokens", "eos_token", "eos_token_id", "mask_token", "mask_token_id"),
        *("pad_token", "additional_special_tokens", "num_kv_heads", "key_value", "key", "key_variable", "keep"),
        *("api_key_variable", "auth_method", "secret_file", "tokens", "seed", "data/my_token", "cell_keys"),
    ],
)
def test_names_of_other_things(name):
    assert not is_secret(name)


def test_the_current_folder_of_the_shell_is_no_secret(monkeypatch):
    monkeypatch.setenv("PWD", "/home/me/project")
    monkeypatch.setenv("MY_PWD", "/home/me/hunter2")
    assert with_variables("/home/me/project/data /home/me/hunter2") == "/home/me/project/data ${oc.env:MY_PWD}"


def test_no_option_of_a_recipe_of_ours_is_taken_for_a_secret():
    recipes = [yaml.safe_load(path.read_text()) for path in Path("recipes").rglob("*.yaml")]
    assert len(recipes) > 40
    for recipe in recipes:
        assert without_secrets(recipe) == recipe


def test_a_secret_is_replaced_by_where_it_is_read_from():
    recipe = {
        "data": {"init_args": {"storage_options": {"aws_secret_access_key": SECRET, "region_name": "eu"}}},
        "trainer": {
            "logger": [
                {"init_args": {"api_key": SECRET, "password": 1234, "url": f"https://me:{SECRET}@host:80/x"}},
                {"headers": {"Accept": f"Bearer {SECRET}"}, "address": f"https://host/x?a=1&X-Amz-Signature={SECRET}"},
            ]
        },
        "token": None,
        "credentials": {"nested": [SECRET]},
    }
    shown = without_secrets(recipe)
    assert SECRET not in json.dumps(shown)
    assert shown["data"]["init_args"]["storage_options"] == {
        "aws_secret_access_key": "${oc.env:AWS_SECRET_ACCESS_KEY}",
        "region_name": "eu",
    }
    first, second = shown["trainer"]["logger"]
    assert first["init_args"] == {
        "api_key": "${oc.env:TRAINER_LOGGER_0_API_KEY}",
        "password": "${oc.env:TRAINER_LOGGER_0_PASSWORD}",
        "url": "https://${oc.env:TRAINER_LOGGER_0_URL_LOGIN}@host:80/x",
    }
    assert second["address"].startswith("https://host/x?a=1&X-Amz-Signature=${oc.env:")
    assert shown["token"] is None
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        f"data.storage_options must be a mapping ({{key: value}}), got {{aws_secret_access_key: {SECRET}, b: 2}}",
        f"trainer.logger.api_key must be text, got ['{SECRET}', 1]",
        f"cannot reach https://me:{SECRET}@host/x",
        f"cannot reach https://host/x?se=1&sig={SECRET}&st=2",
        f'{{endpoint_url: "https://host/x?X-Amz-Signature={SECRET}"}}',
        f"got {{'api_key': '{SECRET}'}}",
        f"storage_options: {{aws_secret_access_key: {SECRET}}}",
        f'{{"password": "correct {SECRET}"}}',
        f"cannot reach https://{SECRET}@host/x",
        f"cannot reach http://me:p@{SECRET}@host/x",
        f"cannot reach https://host/x?key={SECRET}",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
    ],
)
def test_messages(text):
    shown = hide_in_text(text)
    assert SECRET not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    "text",
    [
        "tokenizer: max_tokens must be at least 1, got 0; eos_token: </s>, see https://host:80/x?page=1",
        "checkpoint x has no vocabulary row for the mask token: its id is 5, the vocabulary has 4",
        "its answers are none closed by a special token: a model cannot learn from them where to stop",
        "abfs://container@account.dfs.core.windows.net/x, hf://datasets/ORG/NAME@main/x and ORG/NAME@main stay",
    ],
)
def test_a_message_without_secrets_stays_as_it_is(text):
    assert hide_in_text(text) == text


def test_the_words_of_a_command():
    words = ["fit", "--data.storage_options.aws_secret_access_key", SECRET, f"--x.token={SECRET}", "--data.tokenizer"]
    words += ["data/t", "--data.storage_options", f"{{aws_session_token: {SECRET}, region_name: eu}}"]
    shown = hide_in_words(words)
    assert SECRET not in " ".join(shown)
    assert [shown[n] for n in (0, 1, 4, 5)] == [words[n] for n in (0, 1, 4, 5)]
    assert "region_name: eu" in shown[7]


@pytest.mark.parametrize(
    "value",
    [
        f"{{client_kwargs: {{aws_secret_access_key: {SECRET}}}}}",
        f'{{headers: {{Authorization: "Basic {SECRET}"}}}}',
        f'{{"token": {{"private_key": "-----BEGIN PRIVATE KEY-----\\n{SECRET}"}}}}',
        f"[{{x_functions_key: {SECRET}}}, {{Ocp-Apim-Subscription-Key: {SECRET}}}, {{auth_header: {SECRET}}}]",
    ],
)
def test_a_mapping_among_the_words_is_searched_key_by_key(value):
    for words in (["--data.storage_options", value], [f"--data.storage_options={value}"]):
        assert SECRET not in " ".join(hide_in_words(words))
    assert hide_in_words([f"--x.password=p&{SECRET};x"]) == ["--x.password=***"]
    assert hide_in_words(["--task.lengths", "[1, 2]"]) == ["--task.lengths", "[1, 2]"]


def test_what_a_library_raises_is_printed_without_the_password_of_an_address(tmp_path):
    script = "import meap_lit.cli\ndef fail(arguments): raise RuntimeError('http://me:SECRET@host')\n"
    script += "meap_lit.cli.read_command = fail\nmeap_lit.cli.main()"
    words = [sys.executable, "-c", script, "export"]
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert result.stderr.endswith("RuntimeError: http://***@host\n")
    assert "SECRET" not in result.stderr.splitlines()[-1]


def test_a_dataset_keeps_no_signature_of_an_address():
    step = PrepareText(input=[f"https://host/x.jsonl?sig={SECRET}"], tokenizer="tokenizer", output="out")
    assert SECRET not in json.dumps(step._record())


def secret_words(folder):
    return [
        "--data.storage_options",
        f"{{aws_secret_access_key: {SECRET}, region_name: eu}}",
        *("--trainer.logger+", "tests.test_secrets.KeyedLogger"),
        *("--trainer.logger.save_dir", str(folder)),
        *("--trainer.logger.api_key", SECRET),
        *("--trainer.logger.url", f"https://me:{SECRET}@host"),
    ]


def test_nothing_that_a_run_writes_holds_a_secret(toy_recipe, tmp_path, monkeypatch, capsys):
    recipe = yaml.safe_load(toy_recipe.read_text())
    recipe["trainer"]["logger"] = [recipe["trainer"]["logger"]]
    toy_recipe.write_text(yaml.safe_dump(recipe))
    words = ["fit", "--config", str(toy_recipe), "--budget.max_steps", "2", *secret_words(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["meap_lit", *words])
    trainer = RecipeCLI.run(words).trainer
    assert trainer.loggers[1].given == (SECRET, f"https://me:{SECRET}@host"), "it is used all the same"
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "hparams.yaml", "summary.json"} <= {path.name for path in written}
    assert any("tfevents" in path.name for path in written)
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path
    config = tmp_path / "runs" / "toy" / "version_0" / "config.yaml"
    assert "aws_secret_access_key: ${oc.env:AWS_SECRET_ACCESS_KEY}" in config.read_text()

    # a run that is resumed from it says where the secret belongs, and finds it there
    again = ["fit", "--config", str(config), "--budget.max_steps", "3", "--ckpt_path", "last"]
    capsys.readouterr()
    missing = set()
    for _ in range(3):
        assert main(again) == 2
        [line] = capsys.readouterr().err.splitlines()
        name = re.match(r"error: \S+ comes from the environment, where (\w+) is not set; set that variable", line)[1]
        missing.add(name)
        monkeypatch.setenv(name, f"me:{SECRET}" if name.endswith("LOGIN") else SECRET)
    assert missing == {"AWS_SECRET_ACCESS_KEY", "TRAINER_LOGGER_1_API_KEY", "TRAINER_LOGGER_1_URL_LOGIN"}
    cli = RecipeCLI.run(again)
    assert cli.datamodule.storage.options["aws_secret_access_key"] == SECRET
    assert cli.trainer.loggers[1].given == (SECRET, f"https://me:{SECRET}@host")


def test_a_reference_to_the_environment_stays_one(toy_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    monkeypatch.setenv("DEPTH", "2")
    words = [
        "fit",
        "--config",
        str(toy_recipe),
        "--budget.max_steps",
        "2",
        "--model.decoder.num_layers",
        "${oc.env:DEPTH}",
    ]
    RecipeCLI.run(
        [*words, "--data.storage_options", "{aws_session_token: '${oc.env:MY_TOKEN}', x: 'a ${oc.env:MY_TOKEN}'}"]
    )
    saved = yaml.safe_load((tmp_path / "runs" / "toy" / "version_0" / "config.yaml").read_text())
    options = saved["data"]["init_args"]["storage_options"]
    assert options == {"aws_session_token": "${oc.env:MY_TOKEN}", "x": "a ${oc.env:MY_TOKEN}"}
    assert saved["model"]["init_args"]["decoder"]["num_layers"] == 2


@pytest.mark.parametrize("text", ["cost ${x}", r"a\${y} b", "${oc.env:HOME}"])
def test_a_text_that_looks_like_a_reference_survives(toy_recipe, tmp_path, text):
    recipe = yaml.safe_load(toy_recipe.read_text())
    recipe["samples"] = {"prompts": [text.replace("\\$", "\\\\$").replace("${", "\\${")], "max_new_tokens": 1}
    toy_recipe.write_text(yaml.safe_dump(recipe))
    before = RecipeCLI("fit", ["--config", str(toy_recipe)])
    assert before.config.samples.prompts == [text]
    (tmp_path / "saved.yaml").write_text(before.parser.dump(before.config, skip_none=False))
    assert RecipeCLI("fit", ["--config", str(tmp_path / "saved.yaml")]).config.samples.prompts == [text]


def test_a_printed_recipe_holds_none(toy_recipe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(toy_recipe), *secret_words(tmp_path)[:2], "--print_config"])
    shown = capsys.readouterr().out
    assert "aws_secret_access_key: ${oc.env:AWS_SECRET_ACCESS_KEY}" in shown
    assert SECRET not in shown


def test_wrong_values_are_not_echoed(toy_recipe, capsys):
    for words in (
        ["--data.storage_option", f"{{aws_secret_access_key: {SECRET}}}"],
        ["--data.storage_options", f"[{{aws_secret_access_key: {SECRET}}}]"],
        ["--data.datasets", f"s3://me:{SECRET}@bucket/x"],
    ):
        assert main(["fit", "--config", str(toy_recipe), *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert SECRET not in line


@dataclass(kw_only=True)
class KeyedTask(Task):
    """A task that asks a service."""

    api_key: str

    name = "keyed"
    metrics = ("score",)

    def items(self, model):
        return []

    def answer(self, model, items):
        return []

    def score(self, record):
        return {}


def test_results_hold_none():
    assert describe(KeyedTask(api_key=SECRET))["init_args"]["api_key"] == "${oc.env:API_KEY}"
