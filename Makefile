# Every target makes the environment that it needs in .venv first, and leaves it alone the next time.
# Stamp files say what is in it: .venv/.base (the package), .venv/.course (and JupyterLab), .venv/.dev (and the tests' tools).

VENV := .venv
BIN  := $(VENV)/bin
# Notebooks and test files that run side by side, in the order of their names (pytest-xdist would begin with the files
# of many tests, and leave those of a few long ones to the end, where one worker waits), and more words for pytest.
JOBS ?= 2
SPREAD := -n $(JOBS) --dist loadfile --no-loadscope-reorder
PYTEST_ARGS ?=


# The first Python that is new enough; another one: make demo PYTHON=/path/to/python3
ENOUGH  := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p $(ENOUGH) 2>/dev/null && echo $$p && exit; done; echo python3)
INSTALL := $(BIN)/python -m pip install -c constraints.txt
FROM    := pyproject.toml constraints.txt

# The real subsets: LDM_EDU_DATA_DIR where it is set, else ../shared/data where it is there.
REAL_DATA := $(or $(LDM_EDU_DATA_DIR),$(wildcard ../shared/data))

# The notebooks of the course, in the order of their names; exercises are run by their own tests. And those of them
# that open the data set of the settings: the others draw what they need, whatever stands there.
PAGES := $(sort $(shell find nbs -name '*.ipynb' -not -path '*/.*' -not -path 'nbs/exercises/*'))
PAGES_WITH_DATA := $(if $(PAGES),$(shell grep -l 'settings\.data_dir' $(PAGES)))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-real test-exercises fuzz lint lab notebooks export exercises clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.base  ## sample the shipped model, train a small one for a minute, write demo.png
	$(BIN)/ldm-edu demo

test: $(VENV)/.dev  ## run all notebooks under profile ci on toy data, and tests/
	$(BIN)/python -m pytest $(SPREAD) $(PYTEST_ARGS)

test-real: $(VENV)/.dev  ## run the notebooks that read data on the real CelebA and COCO subsets in LDM_EDU_DATA_DIR
	@test -d "$(REAL_DATA)" || { echo "make test-real: no folder with real data. Set LDM_EDU_DATA_DIR to one" \
		"with celeba/ and coco/ in it; data/README.md says how each is obtained." >&2; exit 1; }
	set -e; data=$$(cd "$(REAL_DATA)" && pwd); for dataset in celeba coco; do \
		LDM_EDU_DATASET=$$dataset LDM_EDU_DATA_DIR="$$data" \
			$(BIN)/python -m pytest $(PAGES_WITH_DATA) $(SPREAD) --no-compare; done

test-exercises: $(VENV)/.dev  ## prove the graders of the exercises both ways, by nbgrader itself
	LDM_EDU_NBGRADER=1 $(BIN)/python -m pytest tests/exercises/test_by_nbgrader.py -n $(JOBS) --no-loadscope-reorder $(PYTEST_ARGS)

# How many tries of each kind `make fuzz` makes.
EXAMPLES ?= 1000

fuzz: $(VENV)/.dev  ## try the public functions, files and commands with arguments of all kinds, for an hour or so
	LDM_EDU_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -c tests/fuzz/pytest.ini --rootdir tests/fuzz \
		tests/fuzz $(SPREAD) $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## check format, lint, types and spelling, and change nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/codespell

lab: $(VENV)/.course  ## open JupyterLab on the course
	$(BIN)/jupyter lab nbs

notebooks: $(VENV)/.dev  ## run all notebooks in place under profile laptop, then clean and export
	LDM_EDU_STATIC=1 LDM_EDU_PROFILE=laptop LDM_EDU_DATASET=toy \
		$(BIN)/jupyter nbconvert --to notebook --execute --inplace --coalesce-streams $(PAGES)
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

export: $(VENV)/.dev  ## format everything, clean the notebooks, write the modules and student exercises that they give
	$(BIN)/ruff format
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(MAKE) exercises

exercises: $(VENV)/.dev  ## write the student version of the exercises into the package
	course=$$(mktemp -d) && cp -r nbs/exercises/source nbs/exercises/nbgrader_config.py "$$course" && \
		$(BIN)/ldm-edu generate "$$course" --students ldm_edu/exercises/notebooks && rm -rf "$$course"

clean:  ## remove builds and caches (.venv, data/ and runs/ stay)
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) $(ENOUGH) 2>/dev/null || { echo "This needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
		"install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(FROM) | $(VENV)/.python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.course: $(FROM) | $(VENV)/.python
	$(INSTALL) -e '.[course]'
	@touch $@ $(VENV)/.base

$(VENV)/.dev: $(FROM) | $(VENV)/.python
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.base $(VENV)/.course
