# Every target works from a fresh checkout: it makes .venv first where that is missing or out of date.
PYTHON ?= python3
# Two workers halve the time on two cores; PYTEST_ARGS= runs one test after another.
PYTEST_ARGS ?= -n 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
INSTALLED_BENCH := $(VENV)/.installed-bench

.PHONY: demo test lint bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/quickstart_numpyro.py
	$(BIN)/python examples/quickstart_pyro.py
	$(BIN)/python examples/weight_averaging.py --dataset digits --backend pyro --constant --svi-rate 0.02 \
		--epochs 200 --cycle 20 --chains 1 --no-samplers

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED_BENCH)
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/memory.py

# torch goes first and alone, at the version in constraints.txt: a CPU build, where one is offered, is then
# what the rest of the packages find installed.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[all,dev]'
	touch $@

$(INSTALLED_BENCH): $(INSTALLED)
	$(PIP) install -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
