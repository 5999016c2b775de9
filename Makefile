# Two commands: `make demo` and `make test`. Both need python3 (3.11 or newer), pip, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The GPU machines' version of Python and jax; `make test-all` uses it where it is present.
PYTHON_NEXT ?= $(shell for p in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3.12; do \
  $$p -c 'import venv' 2>/dev/null && echo $$p && break; done)
JAX_NEXT ?= 0.11.2
TESTS ?= tests
# Tests run in this many processes, file by file. A process whose test hangs says where each thread is and
# ends; xdist then tries that test once more in another.
JOBS ?= 2
RUN_TESTS := -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 1 \
  -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true
OUT ?= kv_policies.jsonl

# `make kernels-aot AOT_JAX=0.11.2` compiles under the GPU machines' version, which wants Python 3.12;
# `make kernels-aot-all` under both, side by side, or the older one only where there is no such Python.
AOT_JAX ?= 0.10.2
AOT_PYTHON ?= $(if $(filter 0.10.2,$(AOT_JAX)),$(PYTHON),$(PYTHON_NEXT))

.PHONY: demo test test-all lint bench kernels-aot test-kernels kv-policies parity lm-eval prove \
  prove-structured train docs clean

demo: $(VENV)/.installed
	@$(BIN)/python -m jaxserve.demo

test: $(VENV)/.installed-dev
	$(BIN)/python $(RUN_TESTS) $(TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

test-all: test
ifeq ($(PYTHON_NEXT),)
	@echo "no Python 3.12 here: tested on $(PYTHON) only"
else
	@test -f $(VENV)-next/.installed || { $(PYTHON_NEXT) -m venv $(VENV)-next && \
	  $(VENV)-next/bin/python -m pip install --disable-pip-version-check -q -e '.[test]' \
	    'jax==$(JAX_NEXT)' && touch $(VENV)-next/.installed; }
	$(VENV)-next/bin/python $(RUN_TESTS) $(TESTS)
endif

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench.host_overhead
	$(BIN)/python -m bench.peers_cpu

# Every part of the GPU suite, tiny and interpreted (`make test` runs four of them).
# What a GPU machine without a network lacks; `bench/gpu/suite.sh` there takes it from bench/gpu/.wheels.
.PHONY: gpu-wheels kernels-aot-all test-gpu-suite
test-gpu-suite: $(VENV)/.installed-dev
	GPU_SUITE_IN_FULL=1 $(BIN)/python -m pytest tests/bench/test_gpu_suite.py

gpu-wheels: $(VENV)/.installed-dev
	$(BIN)/python -m bench.gpu.wheels collect --peers

# Compiles the kernels for an H200 and for TPUs; needs neither. ARGS: see tests/aot/run.py.
kernels-aot:
	$(AOT_PYTHON) -m tests.aot --jax $(AOT_JAX) $(ARGS)

kernels-aot-all: $(if $(PYTHON_NEXT),kernels-aot-$(JAX_NEXT)) kernels-aot-0.10.2

kernels-aot-%:
	@$(MAKE) --no-print-directory kernels-aot AOT_JAX=$*

# TRACE=conversation_trace.jsonl (Mooncake's) also holds the simulator to its published figures.
kv-policies: $(VENV)/.installed-dev
	$(if $(TRACE),$(BIN)/python -m bench.kv_policies --check $(TRACE))
	$(BIN)/python -m bench.kv_policies $(addprefix --trace ,$(TRACE)) --out $(OUT)

# Every attention backend in interpret mode, over a few hundred random cases.
test-kernels: $(VENV)/.installed-dev
	KERNELS_IN_FULL=1 $(BIN)/python -m pytest -n 2 tests/pallas_kernels/test_backends.py \
	  tests/pallas_kernels/test_mosaic_gpu.py

parity: $(VENV)/.installed-dev
	$(BIN)/python -m tests.parity.run

# lm_eval over the endpoints, with tasks of our own; it gets an environment of its own (with torch).
lm-eval: $(VENV)/.installed-dev
	$(BIN)/python -m tests.lm_eval.run $(ARGS)

# The KV tiers' proofs at full count: 500 requests over every combination of tiers; kills, mutations.
prove: $(VENV)/.installed-dev
	PROVE_IN_FULL=1 $(BIN)/python -m pytest tests/engine/test_tiers.py
	$(BIN)/python -m tests.kv.faults_full

# 1,000 random JSON schemas and 200 regular expressions on the embedded model: every answer fits.
prove-structured: $(VENV)/.installed-dev
	$(BIN)/python -m tests.structured.proof $(ARGS)

# 10,000 bad requests, 10 times 1,000 streams broken off, 64 slow readers, run-batch killed 100 times, all
# against a server of the embedded model. schemathesis gets an environment of its own.
.PHONY: prove-server
prove-server: $(VENV)/.installed-dev
	$(BIN)/python -m tests.server.proof $(ARGS)

train: $(VENV)/.installed-dev
	$(BIN)/python -m jaxserve.embedded.train

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_performance.py
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_api.py

$(VENV)/.created:
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxserve needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "Installing jaxserve into $(VENV) (a few hundred MB, once)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml
	@echo "Installing jaxserve with its test and lint tools into $(VENV) (once)"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[test,lint]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) $(VENV)-next build *.egg-info .pytest_cache .ruff_cache
