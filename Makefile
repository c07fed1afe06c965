# Two commands from a bare clone: `make demo` and `make test`. Both set everything up.
.PHONY: demo test lint clean

BIN := .venv/bin

# All cores for everyone compared; by itself vLLM leaves one to its engine process.
export VLLM_CPU_OMP_THREADS_BIND ?= 0-$(shell echo $$(($$(nproc) - 1)))
export VLLM_NO_USAGE_STATS = 1

.venv/installed: .ci/install.sh .ci/requirements-cpu.txt pyproject.toml
	.ci/install.sh

# make demo MODEL=path-or-name runs it on another model; ARGS="-o FILE" saves the figures.
demo: .venv/installed
	$(BIN)/vllm-selfspec demo $(MODEL) $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .cache
