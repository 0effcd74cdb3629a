# make demo    sets everything up and runs the main job on synthetic identities, in under 10 minutes on 2 CPU cores
# make test    sets everything up and runs the tests
# make lint    ruff and mypy
# make docs    builds the documentation into build/docs and checks every link in it
# make audit   asks PyPI for known vulnerabilities of the locked versions
# make bench   runs all benchmarks in a small size and writes their table, in some 14 minutes on 2 CPU cores
# make gpu-check  on a machine with a GPU: the GPU tests and the demo there, and what ran how fast

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
PROCESSES ?= 2
# files of tests that run at the same time; many of them start two processes, and wait
TEST_PROCESSES ?= 2

.PHONY: setup demo test lint docs audit bench bench-check gpu-check clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml data_shards/resize.c
	@echo "Installing into .venv (8.6 GB, some minutes) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)
	rm -rf demo
	$(BIN)/facescale synthesize demo/pictures --identities 400 --images-per-identity 20 --size 112 --seed 7
	$(BIN)/facescale shard demo/pictures demo/shards --holdout-identities 100 --holdout-images 2
	$(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes $(PROCESSES) \
	    -m trainer.train --config launch/recipes/demo.yaml
	$(BIN)/facescale evaluate demo/run
	$(BIN)/facescale report demo/run

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs.yml
	@echo "build/docs/index.html"

# asks PyPI for known vulnerabilities of the locked versions; fails where one could not be asked for
audit: $(STAMP)
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement requirements.lock

bench: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement benchmarks/requirements.txt
	$(BIN)/python benchmarks/bench.py

bench-check: $(STAMP)
	$(BIN)/python benchmarks/bench.py --quick --no-table --out build/bench
	$(BIN)/python benchmarks/check.py build/bench/bench.json --tolerance 0.5

gpu-check: $(STAMP)
	$(BIN)/python benchmarks/gpu_check.py

clean:
	rm -rf demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache
