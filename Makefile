# All targets run in $(VENV), which is set up on first use. Nothing is installed elsewhere except the kernel library, which
# is in the user's cache folder: `keras-das info` prints its path, `keras-das build --clean` removes it.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# On a machine with an NVIDIA GPU: make demo TENSORFLOW='tensorflow[and-cuda]'
TENSORFLOW ?= tensorflow
# By default, torch installs several GB of CUDA; `make test-torch TORCH=...` selects another build.
TORCH ?= torch==2.13.0
export TF_CPP_MIN_LOG_LEVEL ?= 2
# Containers often set this variable. uv does not compile Python files, so every process would compile TensorFlow's again.
unexport PYTHONDONTWRITEBYTECODE
CSRC := $(wildcard keras_das/csrc/*.* keras_das/csrc/*/*)
KERNEL_SOURCES := $(CSRC) keras_das/kernels/targets.py
DEMO_MODEL := runs/demo/model.keras

.PHONY: help demo demo-none demo-detect explore test test-all test-fast test-slow lint sanitize cuda test-gpu gpu-report test-torch test-matrix \
	docs docs-serve wheel clean
.NOTPARALLEL: # one set-up at a time; long commands are parallel themselves
.DEFAULT_GOAL := help

help: ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# Enables TensorFlow's fast CPU convolutions, which are enabled by default only with AVX-512.
demo demo-none demo-detect test-all test-fast test-slow: export TF_ENABLE_ONEDNN_OPTS ?= 1

demo: demo-none ## Train a ResNet-18 on aerial photographs without and with DAS gates; save, export and draw the latter
	$(RUN) examples/classify.py $(DEMO) --attention das $(FAST_OFFSETS) --output runs/demo --export runs/demo/saved_model --baseline runs/demo-none

demo-none: $(VENV)/.demo $(VENV)/.kernels ## Train the same network without gates, for comparison
	$(RUN) examples/classify.py $(DEMO) --attention none --output runs/demo-none

demo-detect: $(VENV)/.demo-detect $(VENV)/.kernels ## Train a RetinaNet with DAS gates to detect tree crowns, and draw the detections
	$(RUN) examples/detect.py $(DEMO_DETECT) --attention das --output runs/demo-detect --export runs/demo-detect/saved_model

explore: $(DEMO_MODEL) $(VENV)/.explore $(VENV)/.kernels ## Serve a page that shows where the gates of `make demo` sample; includes demo-none if trained
	$(RUN) examples/explore.py $(DEMO_MODEL) $(addprefix --compare ,$(wildcard runs/demo-none/model.keras)) $(EXPLORE_ARGS)

$(DEMO_MODEL):
	@echo '$@ does not exist yet; training it with `make demo`.'
	$(MAKE) demo

# The slow offsets of attach_das hardly move in three epochs.
FAST_OFFSETS := --das dilation_rate=1 --das offset_scale=1
DEMO := --backbone resnet18 --data trees --image-size 64 --batch-size 32 --epochs 3 --progress bar $(DEMO_ARGS)
DEMO_DETECT := --backbone resnet18 --data trees --image-size 256 --head-layers 1 --batch-size 4 --epochs 9 --progress bar $(DEMO_ARGS)

test: lint test-fast ## Lint, type-check, and run the fast tests: every behavior of the package, in minutes

test-all: lint $(VENV)/.all-kernels ## Lint, type-check, and run all tests
	$(call pytest)

test-fast: $(VENV)/.all-kernels ## The fast tests alone; for a part of them, and of the other targets' tests: TESTS=tests/layers
	$(call pytest,-m "not slow")

test-slow: $(VENV)/.all-kernels ## The tests that `make test` leaves out: whole trainings, servers, browsers, wheels
	$(call pytest,-m slow)

# In the order of the folders: the longest files come first. A part given by TESTS may hold no test of a tier, which
# pytest reports by its exit status 5.
pytest = $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(1) $(TESTS) $(if $(TESTS),|| [ $$? = 5 ])

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CSRC) $(wildcard tests/csrc/* tests/exporters/*.cc)
	$(RUN) -m mypy

sanitize: $(VENV)/.test ## Run random cases of the kernels under the address, undefined-behavior and thread sanitizers
	$(RUN) -m tests.ops.sanitize

cuda: $(VENV)/.test ## Compile and link the CUDA kernels; needs nvcc, but no GPU
	$(RUN) -m tests.ops.cuda_build build/cuda

# Matrix products in TF32 are beyond the oracle's bounds; see tests/conftest.py, too.
test-gpu: export NVIDIA_TF32_OVERRIDE := 0
test-gpu: export TF_FORCE_GPU_ALLOW_GROWTH := true
test-gpu: $(VENV)/.test ## The kernels on an NVIDIA GPU: the oracle's cases, training, and compute-sanitizer
	$(RUN) -c 'import sys, tensorflow as tf; sys.exit(not tf.config.list_physical_devices("GPU") and "TensorFlow sees no GPU")'
	$(RUN) -m tests.ops.cuda_on_gpu build build/cuda_on_gpu.so
	$(RUN) -m tests.ops.cuda_on_gpu run build/cuda_on_gpu.so
	for tool in memcheck racecheck synccheck initcheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 9 \
			$(RUN) -m tests.ops.cuda_on_gpu run build/cuda_on_gpu.so --count 40 || exit 1; \
	done
	$(RUN) -m keras_das build --framework tensorflow --cuda
	$(RUN) -m pytest tests/gpu
	TF_DETERMINISTIC_OPS=1 $(RUN) -m pytest tests/ops tests/layers # they compare bits

gpu-report: DEVICE ?= gpu
gpu-report: BUDGET ?= 540
gpu-report: OUTPUT ?= runs/$(DEVICE)
gpu-report: $(VENV)/.test $(if $(filter cpu,$(DEVICE)),$(VENV)/.all-kernels) ## Verify and measure on an NVIDIA GPU: BUDGET=540 (seconds) DATA=woof:FOLDER; DEVICE=cpu rehearses it
	$(if $(filter cpu,$(DEVICE)),,$(RUN) -m keras_das build --framework all --cuda)
	$(RUN) benchmarks/gpu_report.py --device $(DEVICE) --budget $(BUDGET) $(addprefix --data ,$(DATA)) --output $(OUTPUT)

test-torch: $(VENV)-torch/.test ## The op on Keras' torch backend, in an environment without TensorFlow
	KERAS_BACKEND=torch $(VENV)-torch/bin/python -m pytest tests/ops/test_backends.py

# Part of the cells: MATRIX='3.13/2.21.0 3.11/2.18.1/3.15.1'
test-matrix: $(VENV)/.test ## Test a wheel with several versions of Python, TensorFlow and Keras, each in its own environment
	rm -rf build/pure
	$(RUN) -m build --wheel --outdir build/pure
	$(RUN) -m tests.matrix build/pure/*.whl build/matrix $(if $(MATRIX),--cells $(MATRIX))

docs: $(VENV)/.docs ## Build the documentation into site/; a warning or a broken link is an error
	$(MKDOCS) build --strict

docs-serve: $(VENV)/.docs ## Serve the documentation on this machine, and rebuild it when a page changes
	$(MKDOCS) serve --dev-addr 127.0.0.1:8000

MKDOCS := NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs

# The versions of TensorFlow whose kernels the platform wheel includes.
WHEEL_TENSORFLOW ?= 2.18.1 2.19.1 2.20.0 2.21.0

wheel: $(VENV)/.test $(WHEEL_TENSORFLOW:%=build/prebuilt/.tensorflow-%) ## Build the source distribution, a pure wheel, and a wheel with kernels for several versions of TensorFlow into dist/
	rm -rf dist build/platform build/wheel
	$(RUN) -m build
	KERAS_DAS_PREBUILT=$(CURDIR)/build/prebuilt $(RUN) -m build --wheel --outdir build/wheel
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH $(RUN) -m auditwheel repair --exclude 'libtensorflow*' --wheel-dir dist build/wheel/*.whl

build/prebuilt/.tensorflow-%: $(KERNEL_SOURCES) | $(VENV)/.test
	$(RUN) -m uv venv --quiet --clear --python $(RUN) build/tensorflow-$*
	$(RUN) -m uv pip install --quiet --python build/tensorflow-$*/bin/python tensorflow==$* .
	build/tensorflow-$*/bin/python -m keras_das build --framework tensorflow --output build/prebuilt
	touch $@

clean: ## Remove environments, caches and build results, but not runs/
	rm -rf $(VENV) $(VENV)-torch build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

OF_DEMO := '$(TENSORFLOW)' -e '.[tf,examples]'
OF_DEMO_DETECT := '$(TENSORFLOW)' -e '.[tf,hub,examples]'
OF_EXPLORE := '$(TENSORFLOW)' -e '.[tf,examples,explore]'
OF_TEST := '$(TENSORFLOW)' -e '.[tf,hub,cv,jax,viz,export,examples,explore,dev]'

# Installs $(2) into $(VENV). uv takes a third of pip's time. pip runs if uv fails, which does not read pip's configuration.
define install
@echo 'Installing $(1) into $(VENV); this takes a minute or more'
@$(RUN) -m uv pip install --quiet --python $(RUN) $(2) || $(RUN) -m pip install --quiet --quiet $(2)
endef

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'keras_das requires Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --quiet --upgrade pip uv

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(call install,TensorFlow and the packages of the examples,$(OF_DEMO))
	touch $@

$(VENV)/.demo-detect: $(VENV)/.demo
	$(call install,KerasHub,$(OF_DEMO_DETECT))
	touch $@

$(VENV)/.explore: $(VENV)/.demo
	$(call install,Gradio,$(OF_EXPLORE))
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(call install,TensorFlow and the test tools,$(OF_TEST))
	touch $@ $(VENV)/.demo $(VENV)/.demo-detect $(VENV)/.explore

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(call install,the documentation tools,-e '.[docs]')
	touch $@

# Without a compiler (exit status 1), the reference implementation runs. A failed build stops the tests, but not the
# demonstration. It leaves no stamp, so the next run tries again.
NO_KERNELS := echo 'No fused kernels (see above): using the reference implementation.'
demo demo-none demo-detect explore: after_failure := $(NO_KERNELS)
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
	$(VENV)-torch/bin/python -m pip install --quiet --quiet '$(TORCH)' -e . pytest hypothesis ml_dtypes
	touch $@
