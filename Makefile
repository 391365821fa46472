# Needs python3 (3.11 or later, or PYTHON=...) and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
# Modules are compiled when they are first imported, if Python may keep that: pip would compile all 19,500 (two minutes).
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile,--no-compile)
# Extra arguments for the command behind a target: make test ARGS="-n 0 -k ir -x" (-n 0: in one process)
ARGS ?=

.PHONY: help demo serve test test-long doors doors-fast lint bench venv

help:
	@echo "make demo    index Python's documentation, fine-tune a small model on it, swap it in while it answers (two to four minutes)"
	@echo "make serve   the demonstration's index in a browser, at http://127.0.0.1:8080 (Ctrl-C stops it)"
	@echo "make test    run the tests"
	@echo "make test-long  run the tests that repeat kills many times"
	@echo "make doors   test the doors beside their frameworks, each in an environment of its own (.doors)"
	@echo "make lint    ruff check, ruff format --check, mypy"
	@echo "make bench   measure speed, memory and quality"

demo: venv
	$(BIN)/python -m ultrarag.demo $(ARGS)

serve: venv
	@test -d .demo/checkpoint || $(BIN)/python -m ultrarag.demo
	$(BIN)/ultrarag serve .demo/index --weights dense=1 --data_dir .demo/data $(ARGS)

test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-long: venv
	$(BIN)/python -m pytest -n 2 --dist load -m long $(ARGS)

doors: venv
	$(BIN)/python tests/doors/run.py $(ARGS)

doors-fast: venv
	$(BIN)/python tests/doors/run.py --fast langchain haystack llamaindex

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python benchmarks/run.py $(ARGS)

venv: $(VENV)/.ready

# The stamp comes last, so an interrupted set-up is taken up again; a .venv without a working pip is made anew.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or later is needed: make PYTHON=...")'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || { echo "Making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing $(TORCH) (1 of 2)"
	$(BIN)/python -m pip install --disable-pip-version-check $(COMPILE) $(TORCH)
	@echo "Installing ultrarag-retrieval and what its tests need (2 of 2; about 100 packages, a minute or more)"
	@rm -rf ultrarag.egg-info  # with the next line: what a checkout of before the distribution was renamed has installed
	@$(BIN)/python -m pip uninstall --disable-pip-version-check -qq -y ultrarag
	$(BIN)/python -m pip install --disable-pip-version-check $(COMPILE) -qq -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip check
	@touch $@
