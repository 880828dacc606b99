# The commands of the project. `make` alone lists them. Each installs what it needs when that is missing.
BUILD ?= build
JOBS ?= $(shell nproc)
PREFIX ?= /usr/local
FUZZ_SECONDS ?= 60
CUDA ?= 0
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help build test demo format check bench counts fuzz wheel install clean configure

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Configures once; afterwards CMake itself notices what changed. CUDA=1 adds the code for GPUs, into a folder of its own.
ifeq ($(CUDA),1)
BUILD := $(BUILD)-cuda
configure: options := -DFOURMOE_CUDA=ON
endif
configure:
	@scripts/install_deps.sh build test
	@test -f $(BUILD)/build.ninja || { python=$$(scripts/find_python.sh) && \
	  cmake -S . -B $(BUILD) -G Ninja --log-level=WARNING $(options) -DFOURMOE_PYTHON="$$python" > /dev/null; }

build: configure ## build the command (build/fourmoe) and the library; CUDA=1: for GPUs too, in build-cuda
	@cmake --build $(BUILD) -j $(JOBS) --target product

test: configure ## build and run all tests
	@cmake --build $(BUILD) -j $(JOBS)
	@ctest --test-dir $(BUILD) -j $(JOBS) --output-on-failure $(CTEST_ARGS)

demo: build ## run real layers of the small checkpoint in examples/tiny-moe
	@scripts/demo.sh $(BUILD)/fourmoe

format: ## lay out all sources with clang-format 14
	@scripts/install_deps.sh check
	@scripts/format.sh

check: ## check the layout and the rules of the house
	@scripts/install_deps.sh check
	@scripts/format.sh --check
	@python3 tests/house_test.py

bench: build ## measure a Qwen3-30B layer on this CPU; the record goes to $(BUILD)/bench.json
	@$(BUILD)/fourmoe bench --shape qwen3-30b --tokens 1,4,16,128,512 --output $(BUILD)/bench.json

counts: configure ## count the instructions of the CPU kernels' inner loops anew and record them
	@cmake --build $(BUILD) -j $(JOBS) --target counts

fuzz: ## fuzz each parser for FUZZ_SECONDS (60)
	@scripts/install_deps.sh build clang
	@scripts/fuzz.sh $(FUZZ_SECONDS)

wheel: ## build the Python package as a wheel in dist/ and try it in an empty environment
	@scripts/install_deps.sh build
	@scripts/wheel.sh "$$(scripts/find_python.sh)" $(if $(filter 1,$(CUDA)),cuda)

install: build ## install the library and the command under PREFIX (/usr/local)
	@cmake --install $(BUILD) --prefix $(PREFIX)

clean: ## remove all build folders
	@rm -rf $(BUILD) build-*
