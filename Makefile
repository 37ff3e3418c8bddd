# Two targets do all set-up on a fresh machine with Python 3.11 and make: `make quickstart` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
LONG := runs/quickstart-long

# Threads that sleep while they wait, and offline datasets: see sslkit/__init__.py.
export OMP_WAIT_POLICY := PASSIVE
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: quickstart quickstart-long test test-slow test-wheel test-oldest test-newest bench ablations docs clean

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

# Wheel and sdist: built, compared, installed and used.
test-wheel: $(BIN)/.installed
	$(BIN)/python -m pytest -m "slow or not slow" tests/packaging

# The same tests with every dependency at the lower bound that pyproject.toml allows, and with the newest there is.
# Each makes an environment of its own (about 6 GB).
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable ".[dev]"
	.venv-oldest/bin/python -m pytest -m "not slow" --numprocesses auto --dist loadfile

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager --editable ".[dev]"
	.venv-newest/bin/python -m pytest -m "not slow" --numprocesses auto --dist loadfile

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
	rm -rf $(VENV) .venv-oldest .venv-newest dist runs site
