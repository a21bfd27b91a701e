# Two commands for a newcomer: make demo, make test. Both build .venv once and reuse it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2    # test processes; each takes up to 2 GB

.PHONY: demo test test-slow test-gpu test-lowest check keys clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mrmae needs Python 3.11 or newer; set PYTHON=/path/to/it")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## the whole pipeline on handwritten digits, offline, in minutes
	$(BIN)/mrmae demo

test: $(STAMP)  ## what continuous integration runs
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m 'not slow and not gpu'

test-slow: $(STAMP)  ## the long proofs: extraction under SIGKILL, a million records
	$(BIN)/python -m pytest -q -m 'slow and not gpu'

test-gpu: $(STAMP)  ## what only a GPU can show; each test is skipped without one
	$(BIN)/python -m pytest -q -m gpu

test-lowest:  ## the fast suite with the oldest libraries that pyproject.toml admits; uv installs them into .venv-lowest
	test -x $(VENV)-lowest/bin/uv || { $(PYTHON) -m venv $(VENV)-lowest && $(VENV)-lowest/bin/python -m pip install --quiet uv; }
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest --resolution lowest-direct --editable '.[dev]'
	$(VENV)-lowest/bin/python -m pytest -q -n $(JOBS) --dist worksteal -m 'not slow and not gpu' \
		-W ignore::DeprecationWarning -W ignore::FutureWarning

check: $(STAMP)  ## everything a change must pass
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m 'not slow and not gpu'

keys: $(STAMP)  ## docs/keys.md, after a change of a config class
	$(BIN)/mrmae --keys > docs/keys.md

clean:
	rm -rf $(VENV) $(VENV)-lowest build *.egg-info .pytest_cache .mypy_cache .ruff_cache
