# SPDX-License-Identifier: Apache-2.0
#
# make test      everything, from a bare machine: sets up .venv, lints, C tests, Python tests
# make setup     .venv with the versions of constraints.txt and this tree as an editable install
# make pytest    the Python tests alone          make lint / make format
# make ctest     the C tests under asan+ubsan, under tsan, and plain       make fuzz    make cexample
# make asan      the Python tests and leak scripts on a sanitized build    make bench
# make demo      three methods on generated volumes, 6 minutes: semisam-demo/report.html
# make notebooks strips the notebooks of what they printed, and runs them
# make lib       build/lib/libsemisam.{a,so}, no Python needed
# make install   PREFIX=/usr/local DESTDIR=
# make gpu       what needs a GPU: its tests, compute-sanitizer, benchmark: results in build/gpu or $OUT
# make sanitize-cuda   compute-sanitizer over a part of tests/test_cuda.py
#
# Everything is built in build/. PIP_FLAGS goes to pip: an index with CPU builds of torch, named
# there, saves gigabytes of CUDA packages.

PYTHON ?= python3
PREFIX ?= /usr/local
PIP_FLAGS ?=
FUZZ_SECONDS ?= 10
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
VERSION := $(shell cat semisam/VERSION)
SO_MAJOR := $(firstword $(subst ., ,$(VERSION)))

include csrc/flags.mk

VENV := .venv
PY := $(VENV)/bin/python
BUILD := build

.DEFAULT_GOAL := help
.PHONY: help
help:
	@sed -n 's/^# \{0,1\}//; 3,17p' Makefile

# ---- the library, with and without sanitizers -----------------------------------------------------

KERNELS := $(sort $(filter-out $(SS_ONCE),$(wildcard csrc/cpu/*.c)))
HEADERS := $(wildcard csrc/*.h csrc/*.def csrc/cpu/*.h) csrc/flags.mk Makefile
ISAS ?= $(if $(filter x86_64 amd64,$(shell uname -m)),$(if $(filter Darwin,$(shell uname -s)),v3,v3 v4))
DEFINES = -DSEMISAM_VERSION='"$(VERSION)"' $(patsubst v%,-DSS_WITH_V%,$(ISAS))

# Variants differ in flags alone; each has its own folder of objects.
VARIANT ?= plain
VARIANT_FLAGS_asan := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
VARIANT_FLAGS_fuzz := -O1 -g -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all
VARIANT_FLAGS_tsan := -O1 -g -fno-omit-frame-pointer -fsanitize=thread
OBJ := $(BUILD)/c/$(VARIANT)
ALL_CFLAGS = $(SS_FLAGS) $(VARIANT_FLAGS_$(VARIANT)) $(CFLAGS)

OBJECTS := $(SS_ONCE:%.c=$(OBJ)/base/%.o) $(foreach isa,base $(ISAS),$(KERNELS:%.c=$(OBJ)/$(isa)/%.o))

$(OBJ)/base/%.o: %.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(DEFINES) -DSS_ISA=base -c $< -o $@
$(OBJ)/v3/%.o: %.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(SS_FLAGS_v3) $(DEFINES) -DSS_ISA=v3 -c $< -o $@
$(OBJ)/v4/%.o: %.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(SS_FLAGS_v4) $(DEFINES) -DSS_ISA=v4 -c $< -o $@

LIB := $(BUILD)/lib
SONAME := libsemisam.so.$(SO_MAJOR)

$(LIB)/libsemisam.a: $(OBJECTS)
	@mkdir -p $(@D)
	rm -f $@
	$(AR) rcs $@ $^
$(LIB)/libsemisam.so.$(VERSION): $(OBJECTS)
	@mkdir -p $(@D)
	$(CC) -shared -Wl,-soname,$(SONAME) $(ALL_CFLAGS) $(LDFLAGS) -o $@ $^ -pthread -lm
$(LIB)/semisam.pc: Makefile semisam/VERSION
	@mkdir -p $(@D)
	@printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' 'libdir=$${prefix}/lib' '' \
	  'Name: semisam' 'Description: Operators for semi-supervised segmentation: prompts, losses, metrics' \
	  'Version: $(VERSION)' 'Cflags: -I$${includedir}' 'Libs: -L$${libdir} -lsemisam' \
	  'Libs.private: -lm -pthread' > $@

.PHONY: lib install
lib:
	@$(MAKE) --no-print-directory -j$(JOBS) VARIANT=plain $(LIB)/libsemisam.a $(LIB)/libsemisam.so.$(VERSION)
install: lib
	@rm -f $(LIB)/semisam.pc
	@$(MAKE) --no-print-directory $(LIB)/semisam.pc
	install -d $(DESTDIR)$(PREFIX)/include/semisam $(DESTDIR)$(PREFIX)/lib/pkgconfig
	install -m 644 csrc/semisam.h csrc/ops.def $(DESTDIR)$(PREFIX)/include/semisam
	install -m 644 $(LIB)/libsemisam.a $(DESTDIR)$(PREFIX)/lib
	install -m 755 $(LIB)/libsemisam.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib
	ln -sf libsemisam.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(PREFIX)/lib/libsemisam.so
	install -m 644 $(LIB)/semisam.pc $(DESTDIR)$(PREFIX)/lib/pkgconfig

# ---- C tests ----------------------------------------------------------------------------------------

CTESTS := $(patsubst tests/core/%.c,%,$(wildcard tests/core/test_*.c))
# These two make system calls fail on purpose.
$(OBJ)/tests/test_memory $(OBJ)/tests/test_runtime: WRAP := -Wl,--wrap=posix_memalign,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=pthread_create
export ASAN_OPTIONS ?= detect_leaks=1
export UBSAN_OPTIONS ?= print_stacktrace=1

$(OBJ)/tests/%: tests/core/%.c tests/core/check.h $(wildcard tests/core/*.h) $(OBJECTS)
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(DEFINES) -Wconversion -Werror -Icsrc -o $@ $< $(OBJECTS) $(WRAP) -pthread -lm

.PHONY: ctest ctest-one
ctest-one: $(CTESTS:%=$(OBJ)/tests/%)
	@set -e; for t in $(CTESTS); do echo "$(VARIANT) $$t"; $(OBJ)/tests/$$t; done
ctest:
	@$(MAKE) --no-print-directory -j$(JOBS) VARIANT=asan ctest-one
	@$(MAKE) --no-print-directory -j$(JOBS) VARIANT=tsan ISAS= ctest-one
	@$(MAKE) --no-print-directory -j$(JOBS) VARIANT=plain ctest-one

# libFuzzer where clang has it, else a driver that feeds random bytes to the same function.
FUZZERS := $(patsubst tests/fuzz/fuzz_%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
CLANG ?= clang
HAS_LIBFUZZER := $(shell printf 'int LLVMFuzzerTestOneInput(const char*d,unsigned long n){return n?d[0]&0:0;}' \
  | $(CLANG) -x c - -fsanitize=fuzzer,address -o /dev/null 2>/dev/null && echo yes)

.PHONY: fuzz fuzz-one objects
objects: $(OBJECTS)
ifeq ($(HAS_LIBFUZZER),yes)
fuzz:
	@$(MAKE) --no-print-directory -j$(JOBS) VARIANT=fuzz ISAS= CC=$(CLANG) CFLAGS=-Wno-pass-failed objects
	@$(MAKE) --no-print-directory VARIANT=fuzz ISAS= CC=$(CLANG) fuzz-one
else
fuzz:
	@echo "fuzz: $(CLANG) has no libFuzzer here: random bytes instead"
	@$(MAKE) --no-print-directory -j$(JOBS) VARIANT=asan objects
	@$(MAKE) --no-print-directory VARIANT=asan fuzz-one
endif
FUZZ_LINK = $(if $(filter fuzz,$(VARIANT)),-fsanitize=fuzzer,tests/fuzz/driver.c)
FUZZ_RUN = $(if $(filter fuzz,$(VARIANT)),-max_total_time=$(FUZZ_SECONDS) -max_len=512 \
  -print_final_stats=1 -artifact_prefix=$(BUILD)/fuzz/$$f- $(BUILD)/fuzz/corpus-$$f,$(FUZZ_SECONDS))
fuzz-one:
	@set -e; for f in $(FUZZERS); do \
	  mkdir -p $(BUILD)/fuzz/corpus-$$f; \
	  $(CC) $(ALL_CFLAGS) $(DEFINES) -Icsrc -Itests/fuzz -o $(BUILD)/fuzz/$$f tests/fuzz/fuzz_$$f.c \
	    $(FUZZ_LINK) $(OBJECTS) -pthread -lm; \
	  echo "fuzz $$f: $(FUZZ_SECONDS) s"; \
	  $(BUILD)/fuzz/$$f $(FUZZ_RUN) >$(BUILD)/fuzz/$$f.log 2>&1 \
	    || { tail -n 40 $(BUILD)/fuzz/$$f.log; exit 1; }; \
	  sed -n 's/stat::number_of_executed_units:/  inputs:/p; s/ inputs$$/ inputs/p' $(BUILD)/fuzz/$$f.log; \
	done

# The example, built as a user would: against the installed library, through pkg-config.
.PHONY: cexample
cexample:
	@rm -rf $(BUILD)/stage
	@$(MAKE) --no-print-directory install PREFIX=$(CURDIR)/$(BUILD)/stage DESTDIR= >/dev/null
	export PKG_CONFIG_PATH=$(BUILD)/stage/lib/pkgconfig; \
	$(CC) -std=c11 -O2 -Wall -Wextra -Werror -pedantic -o $(BUILD)/segment examples/c/segment.c \
	  $$(pkg-config --cflags --libs semisam) -Wl,-rpath,$(CURDIR)/$(BUILD)/stage/lib
	examples/c/check.sh $(BUILD)/segment

# ---- Python -----------------------------------------------------------------------------------------

INSTALL = $(PY) -m pip install -q -c constraints.txt $(PIP_FLAGS)
STAMP := $(VENV)/.semisam-stamp
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) pip setuptools wheel numpy
	$(INSTALL) --no-build-isolation -e ".[test,dev]"
	@touch $@ $(VENV)/.semisam-train-stamp

# Less than `setup`: what the commands need, without tests and tools.
TRAIN_STAMP := $(VENV)/.semisam-train-stamp
$(TRAIN_STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) pip setuptools wheel numpy
	$(INSTALL) --no-build-isolation -e ".[train]"
	@touch $@

# DEMO="--minutes 2" or DEMO="--data DIR"; a demo that was stopped goes on.
DEMO ?=
.PHONY: demo notebooks
demo: $(TRAIN_STAMP)
	SEMISAM_CFLAGS="$(SEMISAM_CFLAGS)" $(PY) setup.py -q build_ext --inplace
	$(PY) -m semisam demo $(if $(wildcard semisam-demo/runs),--resume) $(DEMO)

notebooks: build
	$(PY) notebooks/strip.py
	$(PY) -m pytest tests/test_notebooks.py

.PHONY: setup build lint format pytest asan bench test
setup: $(STAMP)
build: setup
	SEMISAM_CFLAGS="$(SEMISAM_CFLAGS)" $(PY) setup.py -q build_ext --inplace

C_FILES = $(wildcard csrc/*.[ch] csrc/*/*.[ch] csrc/cuda/*.cu csrc/cuda/*.cuh tests/core/*.[ch] tests/fuzz/*.[ch] \
  tests/cuda_emulation/*.h tests/cuda_emulation/*.c* examples/c/*.c)
lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(C_FILES)
format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(C_FILES)

pytest: build
	$(PY) -m pytest -n 2 -m ""

# The Python tests once more on a core with address and undefined-behaviour checks.
asan: build
	$(PY) tests/sanitized.py
	$(PY) tests/leaks/run.py

bench: build
	$(PY) -m benchmarks.run

# No setup: a machine with a GPU may have no network; .ci/gpu takes the Python whose torch sees the GPU.
.PHONY: gpu sanitize-cuda
gpu:
	sh .ci/gpu
sanitize-cuda:
	sh .ci/sanitize-cuda $(if $(wildcard $(PY)),$(PY),$(PYTHON))

# Ends with pytest's closing line.
test: setup
	$(MAKE) lint
	$(MAKE) ctest
	$(MAKE) fuzz
	$(MAKE) cexample
	$(MAKE) asan
	$(MAKE) pytest

.PHONY: clean
clean:
	rm -rf $(BUILD) semisam/*.so
