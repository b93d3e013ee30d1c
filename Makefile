# make demo: train, evaluate and save a real text classifier.   make test: run every test.
# Each target makes .venv when it is missing or when pyproject.toml has changed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test lint bench docs nightly clean

demo: $(READY)
	$(VENV)/bin/stabletx train docstrings --name demo

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not nightly" tests

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)
	$(RUN) -m pytest benchmarks

docs: $(READY)
	$(RUN) -m pytest tests/test_docs_run.py

nightly: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --timeout 7200 tests

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs
