# Two targets do all set-up on a fresh machine with Python 3.11 and make: `make quickstart` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
LONG := runs/quickstart-long

# Threads that sleep while they wait, and offline datasets: see sslkit/__init__.py.
export OMP_WAIT_POLICY := PASSIVE
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: quickstart quickstart-long test test-slow bench ablations docs clean

$(BIN)/.installed: pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (about 6 GB with torch; some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

quickstart: $(BIN)/.installed
	@sh benchmarks/quickstart.sh quickstart $(RUN) $(BIN)

quickstart-long: $(BIN)/.installed
	@sh benchmarks/quickstart.sh quickstart_long $(LONG) $(BIN)

test: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist loadfile

test-slow: $(BIN)/.installed
	$(BIN)/python -m pytest -m slow

bench: $(BIN)/.installed
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/micro_batch_memory.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/neighbours.py
	$(BIN)/python benchmarks/pieces.py
	$(BIN)/python benchmarks/indexing.py
	$(BIN)/python benchmarks/processes.py
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/starting.py
	$(BIN)/python benchmarks/soak.py

ablations: $(BIN)/.installed
	$(BIN)/python benchmarks/ablations.py

docs: $(BIN)/.installed
	$(BIN)/zensical build --strict

clean:
	rm -rf $(VENV) runs site
