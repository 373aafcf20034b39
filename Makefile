PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One more than two cores: tests that wait for a process or a compiler leave a core idle.
WORKERS ?= 3

.PHONY: install demo test lint clean gpu table3-cpu report

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: install
	$(BIN)/atom-fast demo --output runs/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# Everything worth measuring on a GPU, with the Python that has torch; nothing is installed. CIFAR=DIR for Table 1.
gpu:
	$(PYTHON) -m benchmarks gpu --out runs/gpu $(if $(CIFAR),--cifar $(CIFAR))

table3-cpu: install
	$(BIN)/python -m benchmarks table3 --edition cpu --out runs/benchmarks

report: install
	$(BIN)/python -m benchmarks report

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .ruff_cache
