# diyc: everything there is to do with the source tree. `make help` lists it.

BIN    := .venv/bin
C      := $(sort $(wildcard csrc/*.c csrc/*.h))
# The files without Python.h, which can be compiled for a machine whose Python is not here.
PURE_C := $(filter-out csrc/plan.c csrc/module.c,$(filter %.c,$(C)))
PY     := setup.py diyc tests $(wildcard benchmarks examples)

# Root where it is needed: containers, cgroups, mounts. Without root and sudo, privileged tests are skipped.
SUDO     := $(if $(filter-out 0,$(shell id -u)),$(shell command -v sudo))
AS_ROOT  := $(SUDO) env PYTHONDONTWRITEBYTECODE=1
# What runs as root through sudo leaves no files of root's in the tree.
PYTEST   := $(AS_ROOT) $(if $(SUDO),HYPOTHESIS_STORAGE_DIRECTORY=/var/cache/diyc-hypothesis) $(BIN)/pytest $(if $(SUDO),-p no:cacheprovider)
TESTS    ?= tests

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo build ready test check unit lint format bench soak wheel sanitize clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON=/path/to/python3 (3.11 or later), TESTS=tests/unit/test_config.py, ARGS='more for pytest'"

demo: build ## install what is needed, run examples/jobs.toml, check every verdict (as root, or as who you are)
	@examples/prepare
	$(BIN)/python examples/check-demo.py

build: ## .venv with diyc and its C extension in it (installs gcc, python3-venv, busybox-static if missing)
	@scripts/setup.sh demo

ready: # build, and the tools of the tests
	@scripts/setup.sh test

test: ready ## install what is needed, then lint and the whole test suite (as root)
	$(MAKE) --no-print-directory check-lint
	$(PYTEST) $(TESTS) $(ARGS)

unit: ready ## the tests that need neither root nor a container
	$(BIN)/pytest tests/unit -m "not privileged and not vm" $(ARGS)

lint: ready check-lint ## ruff, mypy, clang-format, warnings as errors, compile for aarch64

.PHONY: check-lint check-ruff check-types check-format check-warnings check-aarch64
check-lint: check-ruff check-types check-format check-warnings check-aarch64

check-ruff:
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)

check-types:
	$(BIN)/mypy

check-format:
	clang-format --dry-run -Werror $(C)

check-warnings:
	DIYC_WERROR=1 $(BIN)/python setup.py --quiet build_ext --build-temp build/werror --build-lib build/werror

check-aarch64:
	@mkdir -p build/aarch64
	@for file in $(PURE_C); do \
	    echo "aarch64-linux-gnu-gcc -c $$file"; \
	    aarch64-linux-gnu-gcc -std=gnu17 -D_GNU_SOURCE -O2 -Wall -Wextra -Wshadow -Wvla -Wstrict-prototypes \
	        -Wno-unused-parameter -Werror -c $$file -o build/aarch64/$$(basename $$file .c).o || exit 1; \
	done

format: ready ## put Python and C into the project's form
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	clang-format -i $(C)

bench: ready ## diyc beside its peers, in one run: the ratios and their parts
	$(AS_ROOT) $(BIN)/python benchmarks/peers.py $(ARGS)

soak: ready ## the system tests at full size: each verdict 200 times, 5,000 runs, 200 at once, looking for leaks
	$(AS_ROOT) DIYC_SOAK=1 DIYC_REPEAT=200 $(BIN)/pytest -p no:cacheprovider tests/system $(ARGS)

wheel: ready ## dist/: the wheel and the source archive
	rm -rf diyc.egg-info
	$(BIN)/python -m build --no-isolation --outdir dist .

# The child runs on the parent's memory without a runtime to call: there, undefined behaviour traps (setup.py).
sanitize: ready ## the core's tests with the address and undefined-behaviour sanitizers
	DIYC_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	$(AS_ROOT) PYTHONPATH=build/sanitize/lib PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    $(BIN)/pytest -p no:cacheprovider tests/core $(ARGS)

clean: ## remove everything that is built, .venv too
	rm -rf .venv build dist *.egg-info diyc/_core*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
