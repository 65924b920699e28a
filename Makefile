# Two commands for everybody:
#   make qualify    set up what is missing, then start a server and judge it (results in out/)
#   make test       set up what is missing, then run this project's own tests
#   make test-all   the same and what proves it again: cold and warm beside each other, every
#                   version of SGLang, each way to run a server
# and one for a machine with a GPU, which needs neither Docker nor a network:
#   make gpu-check  what only a GPU can show; exit code 3 where not everything ran
#                   (ARGS='--device cpu' rehearses it without a GPU)
#   make gpu-kit    an archive with all of it for such a machine; 'sglang-harness kit --help'
#
# GPU_PYTHON                    a Python with the harness's dependencies and torch, for gpu-check
# ARGS                          more options, such as ARGS='--model tiny -k weights'
# PYTHON                        the Python to make .venv with
# SGLANG_HARNESS_INSTALL=never  never install or start anything outside .venv and the cache
#
# Where no Docker engine can be had both go on without containers, and say so.
# SGLANG_HARNESS_CACHE          where models and wheels are kept
.PHONY: qualify test test-all fast lint types unit integration integration-all gpu-check gpu-kit bench clean
HARNESS = .venv/bin/sglang-harness
PYTEST = .venv/bin/python -m pytest
SLOWEST = --durations=25 --durations-min=1

qualify:
	@scripts/environment.sh qualify
	@docker/engine.sh || [ $$? -eq 3 ]
	@$(HARNESS) qualify $(ARGS)

# Fast ones first: a slip of the pen should not wait for a server.
test: fast integration

test-all: fast integration-all

# Side by side, each with its output in one piece.
fast:
	@scripts/environment.sh test
	@$(MAKE) --no-print-directory -j3 --output-sync=target lint types unit

lint:
	@scripts/environment.sh test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types:
	@scripts/environment.sh test
	.venv/bin/mypy

unit:
	@scripts/environment.sh test
	$(PYTEST) tests/unit -n logical --maxprocesses 4 --dist worksteal $(SLOWEST) $(ARGS)

integration:
	@scripts/environment.sh test
	@docker/engine.sh || [ $$? -eq 3 ]
	$(PYTEST) tests/integration -m 'not nightly' $(SLOWEST) $(ARGS)

integration-all:
	@scripts/environment.sh test
	@docker/engine.sh || [ $$? -eq 3 ]
	$(PYTEST) tests/integration $(SLOWEST) $(ARGS)

GPU_PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

gpu-check:
	@PYTHONPATH=harness $(GPU_PYTHON) -m sglang_harness gpu-check $(ARGS)

gpu-kit:
	@scripts/environment.sh qualify
	@$(HARNESS) kit $(ARGS)

bench:
	@scripts/environment.sh test
	@docker/engine.sh
	.venv/bin/python bench/readiness.py $(ARGS)
	.venv/bin/python bench/plugin.py
	.venv/bin/python bench/starts.py
	.venv/bin/python bench/weights.py
	.venv/bin/python bench/memory.py
	.venv/bin/python bench/checksums.py

clean:
	rm -rf .venv out dist
