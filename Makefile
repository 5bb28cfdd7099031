# Everything runs in $(VENV), which the first target that needs it sets up. Nothing is installed elsewhere, but the
# kernel library goes to the user's cache folder: `keras-das info` says where, `keras-das build --clean` removes it.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# On a machine with an NVIDIA GPU: make demo TENSORFLOW='tensorflow[and-cuda]'
TENSORFLOW ?= tensorflow
# An ordinary install of torch brings several GB of CUDA; `make test-torch TORCH=...` takes another build.
TORCH ?= torch==2.13.0
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help demo demo-none test lint suite sanitize test-torch wheel clean
.NOTPARALLEL: # one set-up at a time; what takes long brings its own parallelism
.DEFAULT_GOAL := help

help: ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo $(VENV)/.kernels ## Train a ResNet-50 with DAS gates on aerial photographs, save it, export it, draw figures
	$(RUN) examples/classify.py $(DEMO) --attention das --identity-init on --output runs/demo --export runs/demo/saved_model

demo-none: $(VENV)/.demo $(VENV)/.kernels ## The same without gates, to compare
	$(RUN) examples/classify.py $(DEMO) --attention none --output runs/demo-none

DEMO := --backbone resnet50 --data trees --image-size 64 --epochs 6 --progress bar $(DEMO_ARGS)

test: lint suite ## Lint, type-check and test

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

suite: $(VENV)/.test $(VENV)/.all-kernels
	$(RUN) -m pytest

sanitize: $(VENV)/.test ## The kernels' random cases under the address, undefined-behaviour and thread sanitizers
	$(RUN) -m tests.ops.sanitize

test-torch: $(VENV)-torch/.test ## The op on Keras' torch backend, in an environment without TensorFlow
	KERAS_BACKEND=torch $(VENV)-torch/bin/python -m pytest tests/ops/test_backends.py

wheel: $(VENV)/.test ## Build into dist/: source distribution, pure wheel, wheel with the kernels for this TensorFlow
	$(RUN) -m build
	rm -rf build/platform build/prebuilt
	$(RUN) -m keras_das build --framework tensorflow --output build/prebuilt
	KERAS_DAS_PREBUILT=$(CURDIR)/build/prebuilt $(RUN) -m build --wheel

clean: ## Remove environments, caches and build results; runs/ is kept
	rm -rf $(VENV) $(VENV)-torch build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'keras_das needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet '$(TENSORFLOW)' -e '.[tf,examples]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet '$(TENSORFLOW)' -e '.[tf,hub,cv,jax,viz,export,examples,dev]'
	touch $@ $(VENV)/.demo

# Without a compiler (exit status 1) the reference implementation serves. A build that fails stops the tests, and
# not the demonstration. There is no stamp then, so that the next run tries again.
NO_KERNELS := echo 'No fused kernels (see above): going on with the reference implementation.'
KERNEL_SOURCES := $(wildcard keras_das/csrc/*) keras_das/ops/library.py
demo demo-none: after_failure := $(NO_KERNELS)
define build_kernels
@$(RUN) -m keras_das build --framework $(1); status=$$?; \
case $$status in 0) touch $@;; 1) $(NO_KERNELS);; *) $(or $(after_failure),exit $$status);; esac
endef

$(VENV)/.kernels: $(VENV)/.demo $(KERNEL_SOURCES)
	$(call build_kernels,tensorflow)

$(VENV)/.all-kernels: $(VENV)/.test $(KERNEL_SOURCES)
	$(call build_kernels,all)

$(VENV)-torch/.test: pyproject.toml
	$(PYTHON) -m venv $(VENV)-torch
	$(VENV)-torch/bin/python -m pip install --quiet '$(TORCH)' -e . pytest hypothesis ml_dtypes
	touch $@
