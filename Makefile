# make demo | test | lint | docs | bench | notebooks: each makes .venv when it is missing.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint docs bench notebooks clean

# The demo needs the package alone; tests and checks, and the notebooks, add their tools to the same environment.
.venv/.package: pyproject.toml constraints.txt
	@echo "Making .venv (one to two minutes; needs 2 GB)"
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.dev: .venv/.package
	$(PIP) install --quiet --constraint constraints.txt --editable ".[test,dev,docs]"
	touch $@

.venv/.notebooks: .venv/.package
	$(PIP) install --quiet --constraint constraints.txt --editable ".[notebooks]"
	touch $@

demo: .venv/.package
	$(BIN)/slitlamp demo

# Two processes of one thread each: the models of the tests are too small for two threads to help.
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadscope

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, into site/: a warning (a dead link, a name without a docstring) is an error.
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/.package
	@found=; for script in benchmarks/[!_]*.py; do \
	  [ -e "$$script" ] || continue; found=1; echo "== $$script"; $(BIN)/python "$$script"; \
	done; [ -n "$$found" ] || echo "There are no benchmarks yet (benchmarks/*.py)."

# In place, outputs kept; metadata that change with every run are not.
notebooks: .venv/.notebooks
	@found=; for notebook in notebooks/*.ipynb; do \
	  [ -e "$$notebook" ] || continue; found=1; echo "== $$notebook"; \
	  OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace \
	    --ExecutePreprocessor.record_timing=False --ClearMetadataPreprocessor.enabled=True \
	    --ClearMetadataPreprocessor.preserve_nb_metadata_mask="['kernelspec', ('language_info', 'name')]" "$$notebook"; \
	done; [ -n "$$found" ] || echo "There are no notebooks yet (notebooks/*.ipynb)."

clean:
	rm -rf .venv dist build
