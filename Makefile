# `make quickstart` and `make test` set up everything they need; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-fast lint docs install install-dev clean

quickstart: $(VENV)/installed
	$(BIN)/python -m meap_lit fit --config recipes/quickstart.yaml

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2

# the inner loop
test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site, into site/; a broken link is an error
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

# uv applies the override in pyproject.toml that leaves torchvision out. It does not read pip's variable for a folder of
# wheels, so that variable is passed on.
UV := UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

$(BIN)/uv:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed, got " + sys.version.split()[0] + "; run make PYTHON=python3.12, for example")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv

$(VENV)/installed: pyproject.toml setup.py constraints.txt | $(BIN)/uv
	$(UV) --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml setup.py constraints.txt | $(BIN)/uv
	$(UV) --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV)
