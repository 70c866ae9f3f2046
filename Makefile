# Each target does all of its own set-up (scripts/setup.sh); a second run reuses the environment.
VENV := .venv
BIN := $(VENV)/bin
SOAK_SEED ?= 1

.PHONY: help demo test check soak lab hardware bench setup clean

help:
	@echo "make demo      the whole path on handwritten digits, no network beyond installation"
	@echo "make test      style, types, every test"
	@echo "make soak      the long trials (kills, fuzzing); SOAK_SEED=N repeats one"
	@echo "make lab       the whole path on an emulated arm64 machine: needs root, qemu, debootstrap; about 20 minutes"
	@echo "make hardware  the CUDA and TensorRT providers, on a machine with an NVIDIA GPU"
	@echo "make bench     the ratios quoted in docs/measuring.md, measured here"

setup:
	@sh scripts/setup.sh demo

demo: setup
	@$(BIN)/edgevit demo

check:
	@sh scripts/setup.sh test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python scripts/pythons.py
	$(BIN)/pytest -n 2

soak:
	@sh scripts/setup.sh test
	$(BIN)/python -m tests.soak --seed $(SOAK_SEED)

lab:
	@sh scripts/setup.sh test
	$(BIN)/python -m tests.lab

hardware:
	@sh scripts/setup.sh test
	$(BIN)/python -m tests.hardware

bench:
	@sh scripts/setup.sh test
	$(BIN)/python benchmarks/honesty.py
	$(BIN)/python benchmarks/upload_vs_scp.py
	$(BIN)/python benchmarks/cli_start.py
	$(BIN)/python benchmarks/study_again.py
	$(BIN)/python benchmarks/page.py

clean:
	rm -rf $(VENV) .cache
