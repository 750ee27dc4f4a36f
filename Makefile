# The commands of this project. Each sets up what it needs and says what it does while it does it.
#
#   make demo            a fine-tuning job loses its node and finishes on another one; DEMO_ARGS="..." is passed on
#   make demo-scaling    a small fleet follows a real day of demand in seven minutes; DEMO_ARGS likewise
#   make test            everything that must hold (what .ci/run runs)
#   make check           the fast subset: format, lint, types, import rules, contract, tidy, fast tests
#   make bench           the comparisons, short versions; BENCH_ARGS="..." is passed on
#   make gpu             on a machine with a card, all that needs one, in half an hour; GPU_ARGS="..." is passed on
#   make sim SEEDS=5000  both shells under faults in virtual time, with more seeds than `make test`
#   make week            the same for a week, with a fault every five minutes (half an hour of CPU)
#   make torture         a thousand kill -9 of the coordinator, of a checkpoint's writer, a thousand faults of agents
#   make stalls          tests on a machine that is slow here and there; STALLS_ARGS="--seed 2 tests/agent" is passed on
#   make soak            an hour of ordinary work, and whether the programs' memory grows
#   make deb             the Debian package of both programs (DEB_VERSION=... for another version), in build/deb
#   make systemd-test    boot a minimal Debian, install the package, start and upgrade it there (needs root)
#   make vm-test         emulate a machine with a kernel of its own: memory, processor, devices really limited (needs root)
#   make protos          generate the Python code of protos/ again
#   make clean           remove the virtual environment, caches and builds
#
# Variables
#   PYTHON=python3.12    the interpreter to build .venv with (default: the first of 3.11, 3.12, 3.13, python3)
#   TORCH_INDEX_URL=...  where torch comes from instead of the default index. torch's ordinary wheel for Linux brings
#                        some gigabytes of CUDA libraries; a machine without a GPU can do with the CPU build, for example
#                        make demo TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#
# GNU make and bash; nothing here needs root.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?=
TORCH_INDEX_URL ?=
SEEDS ?= 5000
DEMO_ARGS ?=
BENCH_ARGS ?= --quick
GPU_ARGS ?=
STALLS_ARGS ?= tests/agent tests/fakenvml tests/shell tests/wire
DEB_VERSION ?=
BUF_VERSION := 1.75.0

VENV := .venv
BIN := $(VENV)/bin
BUF := build/buf/node_modules/.bin/buf
# A new pyproject.toml or constraints.txt is a new name, and so a new installation.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)

# One thread per trainer and per test process: on two cores, more of them only fight.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tests start our programs hundreds of times; each would compile its sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo demo-scaling test check gates fast-tests bench gpu sim week torture stalls soak deb systemd-test vm-test protos clean

help:
	@sed -n '3,19s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@packages=""
	command -v gcc >/dev/null || packages="$$packages gcc"
	[ -e /usr/include/stdlib.h ] || packages="$$packages libc6-dev"
	if [ -n "$$packages" ]; then
	  echo "A C compiler is missing (the stand-in for NVML is built with it). Run: sudo apt-get install$$packages" >&2
	  exit 1
	fi
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then
	  chosen="" without_venv=""
	  for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do
	    "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
	    if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then chosen="$$candidate"; break; fi
	    [ -n "$$without_venv" ] || without_venv="$$candidate"
	  done
	  if [ -z "$$chosen" ] && [ -n "$$without_venv" ]; then
	    version="$$("$$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
	    echo "$$without_venv has no venv module. Run: sudo apt-get install python$$version-venv" >&2
	    exit 1
	  fi
	  if [ -z "$$chosen" ]; then
	    echo "No Python of 3.11 or later found. Debian 12, Ubuntu 24.04 or later: sudo apt-get install python3 python3-venv." >&2
	    echo "Elsewhere install one and name it: make PYTHON=/path/to/python3.12" >&2
	    exit 1
	  fi
	  echo "setup: creating $(VENV) with $$("$$chosen" --version)"
	  "$$chosen" -m venv --clear $(VENV)
	fi
	if [ -n "$(TORCH_INDEX_URL)" ]; then
	  torch="$$(grep '^torch==' constraints.txt)"
	  echo "setup: installing $$torch from $(TORCH_INDEX_URL)"
	  $(BIN)/python -m pip install --quiet --index-url "$(TORCH_INDEX_URL)" "$$torch"
	elif ! command -v nvidia-smi >/dev/null && ! $(BIN)/python -c 'import torch' 2>/dev/null; then
	  echo "setup: there is no NVIDIA driver here. If torch is about to bring its CUDA libraries (gigabytes), stop"
	  echo "       with Ctrl-C and name an index with CPU builds: see TORCH_INDEX_URL in the Makefile"
	fi
	echo "setup: installing Baton with its trainers and tools into $(VENV) (some minutes the first time)"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev,trainers]'
	# 15,000 modules, a minute of the one processor that pip would take. What cannot be compiled, as examples in other
	# people's packages, is left as it is.
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	rm -f $(VENV)/.installed-*
	touch $@
	echo "setup: done"

# Development only, and never part of the product: the linter for the contract is an npm package with a binary in it.
$(BUF): Makefile
	@if command -v npm >/dev/null && command -v node >/dev/null; then
	  echo "setup: installing buf $(BUF_VERSION) into build/buf"
	  mkdir -p build/buf
	  npm install --no-save --no-package-lock --no-audit --no-fund --silent --prefix build/buf @bufbuild/buf@$(BUF_VERSION)
	  touch $@
	fi

# exec: Ctrl-C reaches the program itself, which ends what it started, and make has nothing left to kill.
demo: $(STAMP)
	@exec $(BIN)/python -m tests.e2e.demo $(DEMO_ARGS)

demo-scaling: $(STAMP)
	@exec $(BIN)/python -m tests.e2e.demo_scaling $(DEMO_ARGS)

gates: $(STAMP) $(BUF)
	@run() { echo "check: $$1"; shift; "$$@"; }
	run "format" $(BIN)/ruff format --check --quiet .
	run "lint" $(BIN)/ruff check --quiet .
	run "import rules" $(BIN)/lint-imports --no-logo
	run "generated code" $(BIN)/python -m protos.generate --check
	if [ -x $(BUF) ]; then
	  run "contract (buf lint)" $(BUF) lint protos
	else
	  echo "check: contract (buf lint) SKIPPED: npm and node are not installed here (sudo apt-get install npm)"
	fi
	run "types" $(BIN)/mypy --no-error-summary -n 2

fast-tests: $(STAMP)
	@echo "check: fast tests"
	exec $(BIN)/python -m pytest tests/core tests/tidy tests/wire tests/store -m "not long" -x -q -n 2 --dist loadgroup

check: gates
	@$(MAKE) fast-tests

# Four on two cores: those that start real processes wait as long as they compute, and with three the
# processor idled.
test: gates
	@echo "test: everything, four at a time"
	exec $(BIN)/python -m pytest tests -n 4 --dist loadgroup

bench: $(STAMP)
	@for path in bench/[a-z]*.py; do
	  name="$$(basename "$$path" .py)"
	  grep -q '__main__' "$$path" || continue
	  echo "bench: $$name"
	  $(BIN)/python -m "bench.$$name" $(BENCH_ARGS)
	done

# Not one thread: beside a card, batches are made by all of a machine's processors.
gpu: $(STAMP)
	@exec env -u OMP_NUM_THREADS $(BIN)/python -m bench.gpu $(GPU_ARGS)

sim: $(STAMP)
	@exec $(BIN)/python -m tests.sim --seeds $(SEEDS)

week: $(STAMP)
	@exec $(BIN)/python -m tests.sim.week

torture: $(STAMP)
	@$(BIN)/python -m tests.trainers.torture
	exec $(BIN)/python -m tests.e2e.torture

stalls: $(STAMP)
	@exec $(BIN)/python -m tests.stalls $(STALLS_ARGS)

soak: $(STAMP)
	@exec $(BIN)/python -m bench.soak

deb: $(STAMP)
	@exec systemd/debian/build.sh build/deb $(DEB_VERSION)

systemd-test: $(STAMP)
	@exec $(BIN)/python -m pytest tests/systemd -m boot

vm-test: $(STAMP)
	@echo "vm-test: building the package and, the first time, a Debian with a kernel; then emulating it (some minutes)"
	exec $(BIN)/python -m pytest tests/systemd -m vm

protos: $(STAMP)
	@exec $(BIN)/python -m protos.generate

clean:
	@echo "clean: removing $(VENV), build/, caches and what the demo left"
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .demo .bench
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
