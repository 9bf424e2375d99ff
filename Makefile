# make run    set up and run the main job on the embedded model (at most 5 minutes once installed)
# make test   set up, lint, type-check and test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test tests lint format clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V). Set PYTHON=..." >&2; exit 3; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	# torch first, at its pinned version: a bare requirement would pull the CUDA build on Linux
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $(STAMP)

# Exit code 4 is an answer too: no configuration keeps the promise on this machine.
run: $(STAMP)
	$(BIN)/autotune run || [ $$? -eq 4 ]

# Side by side: tests of servers and loads wait a lot.
test: $(STAMP)
	$(MAKE) -j2 lint tests

tests: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist worksteal -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
