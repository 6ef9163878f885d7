import hashlib
import json
import sysconfig
from pathlib import Path

import pytest

from meap_lit.data.corpora import python_text
from meap_lit.data.corpora.python_text import PythonText, documentation
from meap_lit.errors import UserError

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_documentation_is_that_of_modules_classes_and_functions_without_indentation():
    source = (
        '"""Of the module."""\n'
        'class A:\n    """Of a class.\n\n    More.\n        Indented.\n    """\n'
        '    def f(self):\n        "Of f."\n'
    )
    assert documentation(source) == "Of the module.\n\nOf a class.\n\nMore.\n    Indented.\n\nOf f."
    assert documentation("x = 1\n'no documentation'\n") == ""
    assert documentation("print 'old syntax'\n") == ""


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    essays = folder / "essays"
    essays.mkdir()
    for number in range(40):
        (essays / f"{number}.txt").write_text(f"Essay number {number}. It says little.")
    step = PythonText(output=str(folder / "text"), prose=[str(essays)], max_bytes="600KB", held_out_share=0.2)
    step.run()
    return folder / "text"


def test_every_file_is_on_one_side_and_recorded_with_its_hash(collected):
    files = json.loads((collected / "files.json").read_text())
    sides = {
        side: {hashlib.sha256(text.encode()).hexdigest() for text in texts(collected / side / "sources.jsonl")}
        for side in ("train", "held_out")
    }
    assert len(sides["train"]) > 5
    assert sides["held_out"]
    assert not sides["train"] & sides["held_out"]
    of_python = [entry for entry in files if entry["file"].startswith("python/")]
    for entry in of_python:
        content = (STDLIB / entry["file"].removeprefix("python/")).read_bytes()
        assert entry["sha256"] in sides[entry["side"]]
        assert hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest() == entry["sha256"]
    assert sum(entry["bytes"] for entry in of_python) <= 600_000
    assert len(files) == len({entry["file"] for entry in files})


def test_prose_is_documentation_and_the_users_own_text(collected):
    prose = {side: texts(collected / side / "prose.jsonl") for side in ("train", "held_out")}
    essays = {side: [text for text in found if text.startswith("Essay number")] for side, found in prose.items()}
    assert len(essays["train"]) + len(essays["held_out"]) == 40
    assert essays["held_out"]
    assert len(prose["train"]) > len(essays["train"])
    assert not any("import " in text and "def " in text for text in essays["train"])


def test_the_same_command_collects_the_same(collected, tmp_path):
    record = json.loads((collected / "preparation.json").read_text())["arguments"]
    PythonText(output=str(tmp_path / "again"), **record).run()
    for file in ("files.json", "train/prose.jsonl", "held_out/sources.jsonl"):
        assert (tmp_path / "again" / file).read_bytes() == (collected / file).read_bytes()


@pytest.mark.slow
def test_installed_packages_are_read_if_asked_for():
    names = {name for name, _ in python_text._sources(packages=True)}
    assert any(name.startswith("packages/torch/nn/") for name in names)
    assert not any(name.startswith("packages/") for name, _ in python_text._sources(packages=False))
    assert not any("/tests/" in name for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_share": 5}, "held_out_share must be in (0, 1), got 5; write 0.05 for 5%"),
        ({"max_bytes": "much"}, "max_bytes must be a size in KB, MB, GB, TB such as 64MB, got 'much'"),
        ({"prose": ["no_such_folder"]}, "no_such_folder does not exist; put text there, or leave it out with prose"),
        ({"max_bytes": "1KB"}, "change held_out_share"),
    ],
)
def test_wrong_options_leave_nothing(tmp_path, options, message):
    with pytest.raises(UserError) as error:
        PythonText(output=str(tmp_path / "text"), **options).run()
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_links_to_nowhere_and_folders_named_like_files_are_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "b.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c.py").mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(python_text._sources(packages=False)) == [("python/a.py", "x = 1")]
