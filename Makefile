# The two commands: `make demo` and `make test`. Each sets up what it needs in .venv, with pinned versions.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
OUTPUT ?= runs/demo
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed-cpu

.PHONY: demo test lint clean install

install: $(STAMP)

$(STAMP): requirements/cpu.txt setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed, this is " + sys.version.split()[0] + ": run make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements/cpu.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: $(STAMP)
	$(RUN) -m dcpo_megatron.cli demo --seed $(SEED) --output $(OUTPUT)

test: $(STAMP) lint
	$(RUN) -m pytest tests

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info
