# Everything here does its own set-up; a second call goes straight to work.
SHELL := bash
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
FAULTS ?= 40
SEED ?= 1

# OpenMP threads that spin while they wait slow several torch processes on few cores down 4 to 6 times.
export OMP_WAIT_POLICY ?= passive
export OMP_NUM_THREADS ?= 1
# DeepSpeed must not compile its CUDA operators when it is installed.
export DS_BUILD_OPS ?= 0
export VENV

.PHONY: help quickstart test test-slurm soak gpu-check sweep-demo lint format typecheck audit docs site clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/.ready-run ## from text to a pretrained HOPE: about 5 minutes on 2 cores (ARGS="--text FILE" for your text)
	$(BIN)/hope quickstart $(ARGS)

# Unit tests share the cores. The others start several processes each, which mostly wait: two at a time. Exit code 5: none was chosen.
test: $(VENV)/.ready-test ## unit, distributed and integration tests (ARGS="-k name" for some)
	@failed=0; export TORCHDYNAMO_DISABLE=1; \
	$(BIN)/python -m pytest tests/unit -n logical --maxprocesses 4 --dist loadfile $(ARGS) || [ $$? -eq 5 ] || failed=1; \
	$(BIN)/python -m pytest tests/distributed tests/integration -n 2 --dist loadfile $(ARGS) || [ $$? -eq 5 ] || failed=1; \
	exit $$failed
	@echo "not run: the tests on a real Slurm cluster (make test-slurm) and the soak (make soak)"

test-slurm: $(VENV)/.ready-test ## training that survives a real Slurm cluster, made on this machine (root, tools/install_slurm.sh)
	TORCHDYNAMO_DISABLE=1 $(BIN)/python -m pytest tests/slurm -rs $(ARGS)

soak: $(VENV)/.ready-test ## random faults on one run, which must end in the bits of the undisturbed one (FAULTS=200 SEED=1)
	TORCHDYNAMO_DISABLE=1 $(BIN)/python tools/soak.py --faults $(FAULTS) --seed $(SEED) --out runs/soak.json $(ARGS)

gpu-check: $(VENV)/.ready-test ## on a GPU: tests, training measured beside its rehearsal (10 minutes); elsewhere: what it would do
	$(BIN)/python tools/gpu_check.py $(ARGS)

sweep-demo: $(VENV)/.ready-run ## a small real scaling-law sweep on 2 cores, about half an hour; started again it goes on
	test -f runs/quickstart/data/train/manifest.json || { \
	  $(BIN)/hope data tokenizer python-stdlib --vocab-size 1024 --out runs/quickstart/data/tokenizer.model && \
	  $(BIN)/hope data prepare python-stdlib --tokenizer runs/quickstart/data/tokenizer.model --out runs/quickstart/data --held-out 0.05; }
	$(BIN)/hope sweep run demo --workers 2
	$(BIN)/hope sweep report demo

lint: $(VENV)/.ready-dev ## style, formatting, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.ready-dev ## format the code, and mend what can be mended by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.ready-dev ## mypy
	$(BIN)/mypy

audit: $(VENV)/.ready-dev ## known weaknesses of the versions in constraints/; without network it says so (ARGS=--require fails then)
	$(BIN)/python tools/audit.py $(ARGS)

docs: $(VENV)/.ready-run ## write docs/configuration.md from the schema
	$(BIN)/python tools/make_config_docs.py

site: ## the documentation as a site, in build/site; fails at a broken link
	test -x build/site-venv/bin/mkdocs || { python3 -m venv build/site-venv && build/site-venv/bin/pip install --quiet "mkdocs>=1.6,<2" "mkdocs-material>=9.5,<10"; }
	NO_MKDOCS_2_WARNING=1 build/site-venv/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

clean: ## remove the virtual environment and caches; runs/ and data/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +

$(VENV)/.ready-%: setup.py tools/setup_env.sh
	tools/setup_env.sh $*
