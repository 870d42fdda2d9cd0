PYTHON ?= python3
VENV ?= .venv
BENCH ?=
OUT ?= runs/bench

installed := $(VENV)/.installed

.PHONY: demo test lint format docs bench clean

demo: $(installed)
	$(VENV)/bin/qformers demo --output runs/demo

test: $(installed)
	$(VENV)/bin/pytest -n 2

lint: $(installed)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(installed)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# The figures and the site in dist/site; a link that leads nowhere fails it
docs: $(installed)
	$(VENV)/bin/python docs/figures.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# make bench BENCH=name OUT=folder; without BENCH every benchmark runs
bench: $(installed)
	$(VENV)/bin/python benchmarks/run.py $(BENCH) --output $(OUT)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist
	find src tests benchmarks examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

# torch alone and first: whichever build this machine's index offers is then the one the rest is fitted to
$(installed): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt torch==2.13.0
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[demo,dev]'
	touch $@
