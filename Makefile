# make train   a GPT with experts from real text to samples and a plot      make test    everything CI checks
# make build   compile what changed     make bench   the benchmark tables    make lint    ruff
# make test-torch VERSION=2.14.1   the Python tests with another torch, in a copy of the tree under build/ (docs/torch.md)
# make test-lowered   the kernels of instruction sets that this CPU lacks, compiled for AVX2; a part of make test
# make proof   every mesh of 1, 2, 4 and 8 ranks against one process, in fp64: the whole table (moe_ext/proof.py)
# make compare   a dense, a capacity and a dropless GPT beside each other: docs/compare.md, in 15 minutes on two quiet cores
# make gpu     prove everything on one GPU and time it (tests/gpu/run.py): PART=build,conformance,.. runs some parts,
#              LIMIT=600 ends in so many seconds and says what it left out, BEFORE=folder of an earlier commit, built
# make sanitize   the core and the ops under ASan + UBSan, the core under TSan        make clean
#
# The first run creates .venv. Options: PYTHON=python3.12, MOE_TORCH="torch==2.11.0" (any pip arguments), TEXT=file or folder,
# RECIPE=file with RANKS, the size of its mesh.
PYTHON    ?= python3
MOE_TORCH ?= torch==2.13.0
RECIPE    ?= recipes/tiny.toml
RANKS     ?= 2
BIN       := .venv/bin
PY        := $(BIN)/python
PYTEST    := $(PY) -m pytest -n auto --dist loadfile
comma     := ,
SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

# ---- environment -----------------------------------------------------------------------------------------------------
# torch first and by exact version: the build compiles against the one that it finds.
.venv/installed: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(MOE_TORCH) -r requirements-dev.txt
	$(BIN)/pip install -q --no-build-isolation -e ".[plot,hf]"
	touch $@

.venv/parity: requirements-parity.txt .venv/installed
	$(BIN)/pip install -q --no-deps --no-build-isolation -r $<
	touch $@

.PHONY: build train test proof bench compare lint sanitize clean
build: .venv/installed
	$(PY) setup.py -q build_ext --inplace

# ---- the two commands ------------------------------------------------------------------------------------------------
train: build
	$(PY) -m moe_ext.data prepare --overwrite --out data/tiny $(if $(TEXT),--text $(TEXT),--max-mb 24 --cut-kb 0)
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m moe_ext.train $(RECIPE) --resume auto

test: build lint test-c .venv/parity
	$(PYTEST)
	$(MAKE) test-lowered
	$(MAKE) test-simt

# ---- another torch: a copy of the tree, with an environment and a build of its own -------------------------------------
# Left out is what no torch changes: lint, the C tests, cuda/ (libmoe_cuda.so knows no torch) and its host harness; and
# MegaBlocks, whose Triton is pinned. What is copied are the files that git knows or would add.
COPY = build/torch-$(VERSION)-$(notdir $(PYTHON))
.PHONY: test-torch test-python
test-torch:
	$(if $(VERSION),,$(error which torch? Type: make test-torch VERSION=2.14.1))
	mkdir -p $(COPY)
	find $(COPY) -mindepth 1 -maxdepth 1 ! -name .venv ! -name build -exec rm -r {} +
	git ls-files -z --cached --others --exclude-standard | tar c --ignore-failed-read --null -T - | tar x -C $(COPY)
	$(MAKE) -C $(COPY) test-python MOE_TORCH="torch==$(VERSION)" MOE_CUDA=0
test-python: build
	$(PY) -m moe_ext
	$(PYTEST) -rfEs --ignore=tests/simt --ignore=tests/test_megablocks.py

# ---- C tests: each under every instruction set of this CPU -----------------------------------------------------------
C_FLAGS := -std=c11 -O1 -g -Wall -Wextra -Werror -D_GNU_SOURCE -ffp-contract=off -Icsrc
C_TESTS := $(basename $(notdir $(wildcard tests/c/test_*.c)))
CPUINFO_avx2 = avx2
CPUINFO_avx512 = avx512dq
CPUINFO_avx512bf16 = avx512_bf16
CPUINFO_amx = amx_bf16
ISAS    := base $(foreach isa,avx2 avx512 avx512bf16 amx,$(if $(shell grep -m1 -ow $(CPUINFO_$(isa)) /proc/cpuinfo),$(isa)))
# $(call run-c-tests,build folder,extra flags,instruction sets,tests)
define run-c-tests
	@mkdir -p $(1)/tests
	@for t in $(4); do \
	    gcc $(C_FLAGS) $(2) -o $(1)/tests/$$t tests/c/$$t.c $$(ls $(1)/csrc/*.o | grep -v -e /ops.o -e /wires.o -e /module.o -e /cuda.o) -lm -lpthread -ldl; \
	    for isa in $(3); do echo "$$t $$isa $(2)"; MOE_ISA=$$isa $(1)/tests/$$t; done; \
	done
endef
.PHONY: test-c
test-c: build
	$(call run-c-tests,build/release,,$(ISAS),$(C_TESTS))

# ---- the kernels of wider instruction sets than this CPU's, lowered to AVX2 in a second build; of bf16, products alone ---
# Not test_count: the instructions of lowered kernels are others. Bits of several threads are compared by the C tests.
LOWERED      := $(if $(filter avx2,$(ISAS)),$(filter-out $(ISAS),avx512 avx512bf16 amx))
LOWERED_BF16 := $(filter-out avx512,$(LOWERED))
LOWERED_TESTS := tests/test_gemm.py tests/test_expert.py tests/test_mutants.py
KERNEL_TESTS  := $(addprefix test_,gemm norm permute random route xent)
.PHONY: test-lowered
test-lowered: build
ifneq ($(LOWERED),)
	MOE_LOWERED=1 $(PY) setup.py -q build_ext
	$(if $(filter avx512,$(LOWERED)),$(call run-c-tests,build/lowered,,avx512,$(KERNEL_TESTS)))
	$(call run-c-tests,build/lowered,,$(LOWERED_BF16),test_gemm test_expert)
	@for isa in $(LOWERED_BF16); do \
	    MOE_BINARY=build/lowered/moe_ext MOE_ISA=$$isa $(PY) -m pytest $(LOWERED_TESTS) -k "bfloat16 and (gemm or expert)"; \
	done
endif

# ---- the CUDA kernels on the host: the op tests again, served by cuda/; then with every access under ASan ----------------
SIMT       := $(if $(filter x86_64,$(shell uname -m)),plain asan)
SIMT_TESTS := $(addprefix tests/test_,$(addsuffix .py,random index permute gemm hopper expert route head norm errors exchange links cublas))
# What Hopper computes in its own way: products of halves. One of the two types; fp16 differs in one letter of one instruction.
SM90       := bfloat16 or hopper or errors
SM90_TESTS := $(addprefix tests/test_,$(addsuffix .py,hopper gemm expert errors))
.PHONY: test-simt $(SIMT:%=simt-%)
test-simt: $(SIMT:%=simt-%)
simt-plain: build
	$(MAKE) -sj2 -f tests/simt/Makefile VARIANT=plain
	$(PYTEST) --simt=build/simt/plain/libmoe_simt.so $(SIMT_TESTS)
	SIMT_SM=90 $(PYTEST) --simt=build/simt/plain/libmoe_simt.so -k "$(SM90)" $(SM90_TESTS)
simt-asan: build
	$(MAKE) -sj2 -f tests/simt/Makefile VARIANT=asan
	LD_PRELOAD="$(ASAN_PRELOAD)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	    $(PYTEST) --simt=build/simt/asan/libmoe_simt.so $(SIMT_TESTS)

# ---- the same under sanitizers: a second build in build/address and build/thread -----------------------------------
ASAN_PRELOAD := $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libstdc++.so.6)
OP_TESTS     := $(addprefix tests/test_,$(addsuffix .py,index permute gemm expert route head random))
sanitize: build
	MOE_SANITIZE=address $(PY) setup.py -q build_ext
	$(call run-c-tests,build/address,-fsanitize=address$(comma)undefined,$(ISAS),$(C_TESTS))
	MOE_BINARY=build/address/moe_ext LD_PRELOAD="$(ASAN_PRELOAD)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	    $(PY) -m pytest $(OP_TESTS)
	MOE_SANITIZE=thread $(PY) setup.py -q build_ext
	$(call run-c-tests,build/thread,-fsanitize=thread,$(lastword $(ISAS)),$(C_TESTS))

# ---- the rest --------------------------------------------------------------------------------------------------------
proof: build
	$(PY) -m moe_ext.proof --path benchmarks/results/proof.json

bench: build
	$(PY) -m benchmarks.ops
	$(PY) -m benchmarks.step

compare: build
	$(PY) -m moe_ext.data prepare --overwrite --out data/compare --max-mb 12 --vocab-size 8192
	$(PY) -m benchmarks.compare recipes/compare.toml

# With the Python at hand where there is no .venv: a GPU machine may have no network. COMMIT: its name without git.
.PHONY: gpu
gpu:
	COMMIT=$(COMMIT) $(if $(wildcard .venv/installed),$(PY),$(PYTHON)) tests/gpu/run.py $(PART) $(LIMIT:%=--limit %) \
	    $(BEFORE:%=--before %)

lint: .venv/installed
	$(BIN)/ruff check .

clean:
	rm -rf build moe_ext/*.so *.egg-info compile_commands.json
