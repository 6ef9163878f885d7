"""Commands that read a recipe as `fit` does, and train nothing."""

import dataclasses
from typing import Any, ClassVar, Self

from jsonargparse import Namespace

from meap_lit.recipe.cli import KEYS, RecipeCLI, check_pair
from meap_lit.recipe.explain import input_errors
from meap_lit.recipe.parser import Parser


class DryRunCLI(RecipeCLI):
    """A command that builds model, data and budget of a recipe, but no Trainer. None of them reads a file yet."""

    name: ClassVar[str]
    description: ClassVar[str]
    example: ClassVar[str]
    """Options of the command, for its usage."""
    options_class: ClassVar[Any]
    """Dataclass of the command's own options."""
    options: Any
    parts: Namespace
    """Model, data and budget."""

    def __init_subclass__(cls) -> None:
        cls.keys = {**KEYS, **dict.fromkeys(field.name for field in dataclasses.fields(cls.options_class))}

    @classmethod
    def read(cls, arguments: list[str]) -> Self:
        """Run the command on the words after its name. Its own options may be spelled with hyphens.

        Raises:
            UserError: If the recipe, an override or an option is wrong, or the command cannot be carried out.
        """
        names = (field.name for field in dataclasses.fields(cls.options_class))
        spellings = {f"--{name.replace('_', '-')}": f"--{name}" for name in names}
        words = (word.partition("=") for word in arguments)
        return cls.run(["fit", *(spellings.get(option, option) + sign + value for option, sign, value in words)])

    def make_parser(self) -> Parser:
        parser = super().make_parser()
        parser.prog = f"python -m meap_lit {self.name}"
        parser.description = self.description
        parser.usage = f"{parser.prog} --config RECIPE [--config OVERLAY ...] {self.example} [--KEY VALUE ...]"
        parser.add_class_arguments(self.options_class, as_group=False)  # among the first options of the help
        return parser

    def build(self) -> None:
        recipe = self.config
        with input_errors(KEYS):
            self.parts = self.parser.instantiate(Namespace(model=recipe.model, data=recipe.data, budget=recipe.budget))
        check_pair(self.parts.model, self.parts.data)
        names = (field.name for field in dataclasses.fields(self.options_class))
        self.options = self.options_class(**{name: recipe[name] for name in names})

    def start(self) -> None:
        """Run nothing."""
