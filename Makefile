# make install    everything into .venv (Python 3.12 and a C++ compiler are all it needs); then source .venv/bin/activate
# make install-gpu   also Transformer Engine, for machines with GPUs
# make demo       Self-Improving Pretraining on this machine; DATA="my/*.jsonl" trains on your own text
# make evidence   the studies of docs/results.md on this machine, hours; ONLY="judge cost" names some (python -m evidence --help)
# make test       unit tests, then the integration tests with real Megatron and real SGLang
# make lint       ruff, clang-format, mypy, shellcheck, uv.lock against pyproject.toml
# make bench      the CPU benchmarks in about 15 minutes, results under build/bench/ (RESULTS=benchmarks/results publishes them)

# The first of these that is a 3.12; make install PYTHON=/path/to/python3.12 names another.
PYTHON ?= $(firstword $(foreach name,python3.12 python3 python,$(shell $(name) -c $(IS_3_12) 2>/dev/null && echo $(name))) python3)
IS_3_12 := 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'
VENV ?= .venv
UV_VERSION := 0.13.9
DATA ?=
ONLY ?=
BENCH_SECONDS ?= 870
RESULTS ?= build/bench
RUN_DIR ?= $(if $(DATA),runs/demo-own-text,runs/demo)
BIN := $(VENV)/bin
KERNELS := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: install install-bench install-gpu demo evidence test test-unit test-integration lint format bench clean

install: $(VENV)/installed

# Names, versions and hashes of uv.lock, without addresses: they install from the index or folder that uv is told of
# (UV_DEFAULT_INDEX, UV_FIND_LINKS), and nothing else does. Bytecode is compiled at once, since servers import thousands of
# modules and some environments never write it.
define install_locked
$(BIN)/uv export --quiet --frozen --no-emit-project --python $(BIN)/python $(1) --output-file $(VENV)/requirements.txt
$(BIN)/uv pip install --quiet --compile-bytecode --require-hashes --python $(BIN)/python $(2) -r $(VENV)/requirements.txt
endef

# The extension module is built against the torch that is then used, so after everything else.
$(VENV)/installed: pyproject.toml uv.lock setup.py $(KERNELS)
	@$(PYTHON) -c $(IS_3_12) || { echo "Python 3.12 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): install python3.12," \
		"or name one with make install PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(call install_locked,--extra dev --group build)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation --no-deps --editable .
	touch $@

demo: install
	PATH="$(abspath $(BIN)):$$PATH" examples/demo.sh --run-dir "$(RUN_DIR)" $(if $(DATA),--data "$(DATA)")

evidence: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m evidence $(if $(ONLY),--only $(ONLY))

DURATIONS = --durations=40 --junitxml=build/$(1)-tests.xml

test: test-unit test-integration

test-unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/unit $(call DURATIONS,unit)

test-integration: install
	$(BIN)/python -m pytest tests/integration $(call DURATIONS,integration)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)
	$(BIN)/mypy
	$(BIN)/uv lock --quiet --check --offline --no-config --default-index https://pypi.org/simple --python $(BIN)/python
	$(BIN)/shellcheck $(wildcard examples/*.sh examples/*.sbatch benchmarks/*.sh) .ci/run

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)

# bench: trl, with datasets, a peer to measure against. gpu: Transformer Engine, built against the torch that is installed.
install-bench install-gpu: install-%: $(VENV)/installed-%

$(VENV)/installed-%: $(VENV)/installed
	$(call install_locked,--extra $*,--no-build-isolation)
	touch $@

# The last one leaves out, and says so, what would not end within BENCH_SECONDS of the start on a slow machine.
bench: install-bench
	started=$$(date +%s); set -e; \
	for script in logprob_op linear_logprob attention; do \
		$(BIN)/python benchmarks/$$script.py --json $(RESULTS)/$${script}_cpu.json; \
	done; \
	$(BIN)/python benchmarks/judge_schedules.py --json $(RESULTS)/judge_schedules.json; \
	$(BIN)/python benchmarks/judge_client.py --json $(RESULTS)/judge_client.json \
		--tokenizer "$$($(BIN)/python tools/fetch_smollm2.py)"; \
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 $(BIN)/python benchmarks/train_step_profile.py dpo_packed \
		--json $(RESULTS)/train_step_profile_cpu.json; \
	$(BIN)/python benchmarks/train_step.py --repeats 1 --json $(RESULTS)/train_step_cpu.json \
		--seconds $$((started + $(BENCH_SECONDS) - $$(date +%s)))

clean:
	rm -rf build *.egg-info megatron_sip/*.so
