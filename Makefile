# `make demo` and `make test` work on a fresh machine with python3 >= 3.11, make and pip.

PYTHON ?= python3
CORES ?= all
RUN ?= best
BIN := .venv/bin

.PHONY: setup demo test test-slow test-gpu test-tracking test-slurm test-browser bench lint docs explain ui publish lock clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/installed  ## make .venv, with all packages in the versions of requirements.lock

demo: .venv/installed  ## set up, then train and compare 8 runs of the embedded default
	$(BIN)/snakemake --cores $(CORES) --config experiment=demo

test: .venv/installed  ## set up, then run the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/installed  ## the test suite and the proofs that take minutes
	$(BIN)/python -m pytest --run-slow

test-tracking: .venv/installed  ## a team's tracking server, for real; needs PostgreSQL's server (apt-get install postgresql)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation -e ".[server]"
	$(BIN)/python -m pytest --run-slow -rs tests/test_team_server.py

test-gpu: .venv/installed  ## the tests that need a CUDA GPU, some of them two; skipped, with the reason, where there is none
	$(BIN)/python -m pytest -m gpu -rs tests/gpu

test-slurm: .venv/installed  ## sweeps, kills and preemption on a real Slurm, which it starts on this machine (docs/clusters.md)
	$(BIN)/python -m pytest --run-slurm tests/test_slurm.py

test-browser: .venv/installed  ## MLflow's pages in a real browser; needs Chromium (apt-get install chromium)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation -e ".[browser]"
	$(BIN)/python -m pytest --run-browser -rs tests/browser

bench: .venv/installed  ## training and answering beside TRL and a plain Trainer; half an hour, writes docs/speed.md
	$(BIN)/python -m tests.benchmarks.training

lint: .venv/installed  ## ruff, mypy, snakefmt, and Snakemake's own lint less its advice on containers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile
	$(BIN)/mypy
	$(BIN)/python tests/lint_workflow.py

# -W: a link or an anchor that leads nowhere fails, as does a page that no table of contents has. -E: all of them, each time.
docs: .venv-docs/installed  ## the docs as a site, in site/index.html; fails on a broken link
	.venv-docs/bin/sphinx-build -q -W -E --keep-going -c docs -d site/.doctrees . site
	@cp site/README.html site/index.html
	@! grep -rlE '<(script|link|img)[^>]+(src|href)="(https?:)?//' site --include=*.html  # what a page loads is in the site

explain: .venv/installed  ## what the next run would make, why, and how long it may take: make explain ARGS="--experiment demo"
	@$(BIN)/temper explain $(ARGS)

ui: .venv/installed  ## open the MLflow UI on http://127.0.0.1:5000
	@$(BIN)/temper ui

publish: .venv/installed  ## push a run with a model card to the hub: make publish RUN=best REPOSITORY=me/name ARGS=--merged
	@$(BIN)/temper publish --run "$(RUN)" --repository "$(REPOSITORY)" $(ARGS)

# All of requirements.lock is checked by hash. torch is not in it: pip takes the build that suits the machine
# (CPU, or CUDA with the libraries that torch itself pins).
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# By itself, for the docs need nothing of the rest: seconds to install instead of minutes.
.venv-docs/installed: docs/requirements.lock
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --disable-pip-version-check --quiet --require-hashes --no-deps -r docs/requirements.lock
	@touch $@

TORCH_AND_ITS_CUDA := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti \
	nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver \
	nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx

lock: .venv/installed  ## resolve pyproject.toml anew into requirements.lock, and its docs into docs/requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml --extra test --universal --python-version 3.11 --generate-hashes --quiet \
		--no-header --no-annotate $(addprefix --no-emit-package ,$(TORCH_AND_ITS_CUDA)) -o requirements.lock
	$(BIN)/uv pip compile --group docs --universal --python-version 3.11 --generate-hashes --quiet --no-header --no-annotate \
		-o docs/requirements.lock

clean:  ## delete everything generated (results, raw data, .venv); costs only computing time
	rm -rf .venv .venv-docs site results data/raw .snakemake
