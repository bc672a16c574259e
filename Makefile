# make demo    the built-in model in full precision and with Q&C, side by side
# make test    all tests, or those of TESTS="path ..."
# make lint    ruff, mypy and the order of imports
# make bench   speed and memory, ratios in one run
# make experiment   the ablation behind the README's table (hours on two cores; goes on where it was cut off)
# make caching      every table and plot of Apply Cache, on ComfyUI (some hours of one core, JOBS=8 shares
#                   them out; what is measured is kept: ANEW=--anew begins again)

PYTHON ?= python3
VENV ?= .venv
TESTS ?=
RUN = $(VENV)/bin/python
JOBS ?= 1
ANEW ?=

.PHONY: demo test lint bench experiment caching clean

demo: $(VENV)/.demo
	$(RUN) -m qandc_core demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 $(TESTS)

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	mkdir -p build/typed && ln -sfn ../.. build/typed/qandc_pack
	MYPYPATH=build/typed $(RUN) -m mypy -p qandc_pack.nodes  # a part of a package, as ComfyUI imports them
	$(VENV)/bin/lint-imports

bench: $(VENV)/.demo
	$(RUN) -m benchmarks.speed --out benchmarks/results

experiment: $(VENV)/.demo
	$(RUN) -m qandc_core experiment --out benchmarks/results

caching: $(VENV)/.demo
	$(RUN) -m benchmarks.caching --jobs $(JOBS) $(ANEW)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install -q -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
