"""Build the wheel: the package, and in it the recipes and sample inputs of the repository; see pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["meap_lit*"]), "meap_lit.packaged.recipes", "meap_lit.packaged.data"],
    package_dir={"meap_lit.packaged.recipes": "recipes", "meap_lit.packaged.data": "data"},
    package_data={
        "meap_lit": ["py.typed", "**/*.jinja", "**/*.html"],
        "meap_lit.packaged.recipes": ["**/*.yaml", "**/*.jinja", "**/*.sh"],
        "meap_lit.packaged.data": ["instructions.*", "eval/needles.jsonl", "eval/reasoning.json"],
    },
)
