"""Pages of the site that follow from the code, and links from a page to a file of the repository.

MkDocs calls `on_files` and `on_page_markdown` (https://www.mkdocs.org/user-guide/plugins/#events). Generated are the
keys of recipes, the help of every command, the list of recipes, the Python reference, the home page (README.md), and a
page for each file of the repository that a page links to.
"""

import contextlib
import importlib
import inspect
import io
import os
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import docstring_parser
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import meap_lit
from meap_lit import cli
from meap_lit.recipe import packaged
from meap_lit.recipe.cli import CALLBACKS

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=(?:#[^)\s]*)?\))")
"""The path of a link within the repository, without its anchor."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, text in generated_pages():
        files.append(File.generated(config, name, content=text))
    pages = [ROOT / "README.md", *(ROOT / "docs" / file.src_uri for file in files.documentation_pages())]
    for path in sorted(linked_files(pages)):
        files.append(File.generated(config, page_of(path), content=page_text(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = repository_path(page.file.src_uri)

    def to_page(link: re.Match[str]) -> str:
        target = os.path.normpath(here.parent / link[1])
        return os.path.relpath(page_of(PurePosixPath(target)), PurePosixPath(page.file.src_uri).parent)

    return LINK.sub(to_page, markdown)


# ---------------------------------------------------------------------------------------------- files of the repository


def linked_files(pages: list[Path]) -> set[PurePosixPath]:
    """Return the files outside docs/ that pages link to, and those that these link to."""
    found: set[PurePosixPath] = set()
    waiting = [page for page in pages if page.is_file()]
    while waiting:
        page = waiting.pop()
        if page.suffix != ".md":
            continue
        for link in LINK.findall(page.read_text()):
            path = PurePosixPath(os.path.relpath((page.parent / link).resolve(), ROOT))
            is_own = path.parts[0] == "docs" or str(path) == "README.md"
            if not is_own and path not in found and (ROOT / path).is_file():
                found.add(path)
                waiting.append(ROOT / path)
    return found


def page_of(path: PurePosixPath) -> str:
    """Return the source of the page that shows a file of the repository."""
    if path.parts[0] == "docs":
        return str(PurePosixPath(*path.parts[1:]))
    if str(path) == "README.md":
        return "index.md"
    return f"repository/{path}" if path.suffix == ".md" else f"repository/{path}.md"


def repository_path(page: str) -> PurePosixPath:
    """Return the file of the repository that a page shows."""
    if page == "index.md":
        return PurePosixPath("README.md")
    inner = page.removeprefix("repository/")
    return PurePosixPath(inner) if inner != page else PurePosixPath("docs", page)


def page_text(path: PurePosixPath) -> str:
    text = (ROOT / path).read_text()
    language = {".yaml": "yaml", ".py": "python", ".sh": "bash", ".jinja": "jinja"}.get(path.suffix, "text")
    return text if path.suffix == ".md" else f"# `{path}`\n\n```{language}\n{text}\n```\n"


# ---------------------------------------------------------------------------------------------- pages from the code


def generated_pages() -> Iterator[tuple[str, str]]:
    yield "index.md", (ROOT / "README.md").read_text()
    yield "reference/keys.md", "\n".join(keys_page())
    yield "reference/commands.md", "\n".join(commands_page())
    yield "reference/recipes.md", "\n".join(recipes_page())
    yield "reference/python.md", "\n".join(python_page())


def keys_page() -> Iterator[str]:
    """Describe every key of a recipe: the arguments of the classes that recipes name."""
    from meap_lit.callbacks.loggers import MLflow, RunFolder, WandB
    from meap_lit.data.finetuning import FineTuningData
    from meap_lit.data.prepare.dataset import Preparation
    from meap_lit.data.pretraining import PretrainingData
    from meap_lit.evaluation.task import Task
    from meap_lit.masking.duplication import Duplication
    from meap_lit.masking.schedules import MaskSchedule
    from meap_lit.model.config import Context, DecoderConfig, RopeScaling
    from meap_lit.model.lora import LoRA
    from meap_lit.modules import AdamW, MEAPFineTuning, MEAPPretraining

    yield "# Keys of recipes\n"
    yield (
        "Types, defaults and meanings come from the classes. In a recipe, the arguments of a class are under "
        "`init_args`; on the command line that word is left out: `--model.mask_ratio 0.1`. A key without a default "
        "must be given. `trainer` takes the arguments of "
        "[Lightning's Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html), except those that "
        "`budget` decides. [Recipes](../recipes.md) explains `base`, references and overrides.\n"
    )
    chosen = "`class_path` names one of these.\n"
    yield f"## model\n\n{chosen}"
    yield from describe_all([MEAPPretraining, MEAPFineTuning])
    for key, described in {
        "decoder": DecoderConfig,
        "decoder.rope_scaling": RopeScaling,
        "context": Context,
        "lora": LoRA,
        "optimizer": AdamW,
    }.items():
        yield f"### model.{key}\n"
        yield from describe(described)
    yield f"## Mask schedules\n\nA value of `model.mask_ratio`. {chosen}"
    yield from describe_all(subclasses(MaskSchedule, "meap_lit.masking"))
    yield f"## data\n\n{chosen}"
    yield from describe_all([PretrainingData, FineTuningData])
    yield "### data.duplication\n"
    yield from describe(Duplication)
    yield f"## Preparations\n\nSteps under `data.preparation`. {chosen}"
    yield from describe_all(subclasses(Preparation, "meap_lit.data"))
    for key, callback in CALLBACKS.items():
        yield f"## {key}\n"
        yield from describe(callback)
    yield f"## trainer.logger\n\nOr any other logger of Lightning. {chosen}"
    yield from describe_all([RunFolder, WandB, MLflow])
    yield f"## Tasks\n\nThe value of `task` in a recipe of `evaluate`. {chosen}"
    yield from describe_all(subclasses(Task, "meap_lit.evaluation"))


def describe_all(classes: list[type]) -> Iterator[str]:
    for described in classes:
        yield f"### {described.__name__}\n\n`class_path: {described.__module__}.{described.__name__}`\n"
        yield from describe(described)


def subclasses(base: type, package: str) -> list[type]:
    """Return the public classes that derive from `base`, by name."""
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)
    found, waiting = set(), [base]
    while waiting:
        for derived in waiting.pop().__subclasses__():
            waiting.append(derived)
            if not inspect.isabstract(derived) and derived.__module__.startswith("meap_lit"):
                found.add(derived)
    return sorted(found, key=lambda derived: derived.__name__)


def describe(described: type) -> Iterator[str]:
    doc = docstring_parser.parse(inspect.getdoc(described) or "")
    yield f"{doc.short_description or ''}\n"
    rows = list(parameters(described))
    if not rows:
        return
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for name, annotation, default, meaning in rows:
        cells = (f"`{name}`", f"`{annotation}`", f"`{default}`" if default else "", meaning)
        yield "| " + " | ".join(cell.replace("\n", " ") for cell in cells) + " |"
    yield ""


def parameters(described: type) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and meaning of each argument, with those that `**kwargs` passes to a base class."""
    meanings = {}
    for owner in reversed(described.__mro__):
        doc = docstring_parser.parse(inspect.cleandoc(owner.__doc__ or ""))
        meanings |= {parameter.arg_name: parameter.description or "" for parameter in doc.params}
    given = set()
    for owner in described.__mro__:
        signature = inspect.signature(owner.__init__) if "__init__" in vars(owner) else None
        if signature is None or owner is object:
            continue
        for parameter in list(signature.parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name in given:
                continue
            given.add(parameter.name)
            meaning = meanings.get(parameter.name, "")
            yield parameter.name, type_name(parameter.annotation), default_of(parameter), meaning
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            return


def type_name(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text).replace(" | ", " or ")  # "|" ends a cell of a table


def default_of(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return ""
    return type(parameter.default).__name__ if hasattr(parameter.default, "__dict__") else repr(parameter.default)


def commands_page() -> Iterator[str]:
    yield "# Commands\n"
    yield f"```text\n{cli.USAGE}```\n"
    for words in cli.COMMANDS:
        yield f"## {words}\n\n```text\n{help_of(words.split())}```\n"
    for command in cli.RECIPE_COMMANDS:
        yield f"## {command}\n\n```text\n{help_of([command])}```\n"


def help_of(words: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return printed.getvalue()


def recipes_page() -> Iterator[str]:
    yield "# Recipes\n"
    yield "`meap-lit recipes` prints this list, and `meap-lit recipes copy` writes the files out.\n"
    for name in packaged.names():
        if name.endswith(".yaml"):
            text = (packaged.root() / name).read_text()
            yield f'??? example "`{name}`: {quoted(packaged.description(name))}"\n'
            yield "    ```yaml\n" + "".join(f"    {line}\n" for line in text.splitlines()) + "    ```\n"


def quoted(title: str) -> str:
    return title.replace('"', "'")


def python_page() -> Iterator[str]:
    """List the names of the package, then every module; mkdocstrings reads the docstrings."""
    yield "# Python\n\n`from meap_lit import ...` has what a script needs ([how](../python.md)):\n"
    yield "| name | |\n|---|---|"
    for name in meap_lit.__all__:
        value = getattr(meap_lit, name)
        meaning = docstring_parser.parse(inspect.getdoc(value) or "").short_description
        yield f"| [`{name}`][{value.__module__}.{value.__name__}] | {meaning} |"
    yield "\nBelow are all modules.\n"
    for room in pkgutil.iter_modules(meap_lit.__path__):
        if room.ispkg and room.name != "packaged":
            package = importlib.import_module(f"meap_lit.{room.name}")
            yield f"## {room.name}\n\n{inspect.getdoc(package) or ''}\n"
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                if not module.ispkg:
                    yield f"::: {module.name}\n"
