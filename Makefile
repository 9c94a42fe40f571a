# make demo | make test | make bench | make lint | make clean
# Everything is installed into .venv; only python3 and a network to the package index are needed.

PYTHON ?= python3
# Installed before anything else and then held, so that no dependency brings another.
# With a GPU any torch >= 2.10 will do: make demo TORCH="torch==2.12.0"
TORCH ?= torch==2.13.0
# Where `make demo` writes its pictures, and further options for it: make demo DEMO_ARGS="--model facebook/dinov2-base"
OUT ?= demo_out
DEMO_ARGS ?=
# For example BENCH_ARGS="--json benchmarks/results/bench-cpu.json"
BENCH_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test bench lint clean

VENV := .venv
PY := $(VENV)/bin/python
# Errors alone are shown.
PIP := $(PY) -m pip --disable-pip-version-check -qq
VISION_LIBS := .vision-libs
VISION_TESTS := tests/test_encoders*.py tests/test_lora*.py tests/test_preprocess*.py

# Stamps are named after the content they were made from, so that a changed requirement installs anew and a mere
# checkout does not.
KEY := $(shell { echo '$(TORCH) $(CURDIR)'; cat pyproject.toml setup.py; } | cksum | cut -d' ' -f1)
VISION_KEY := $(shell cksum < requirements/vision.txt | cut -d' ' -f1)
DEMO_STAMP := $(VENV)/.demo-$(KEY)
DEV_STAMP := $(VENV)/.dev-$(KEY)
VISION_STAMP := $(VISION_LIBS)/.stamp-$(VISION_KEY)

help:
	@sed -n '1,2s/^# //p' Makefile

$(PY):
	$(PYTHON) -m venv $(VENV)

$(DEMO_STAMP): | $(PY)
	@rm -f $(VENV)/.demo-* $(VENV)/.dev-*
	@echo "installing $(TORCH), latemax and what its demo needs into $(VENV) (minutes, once)"
	@$(PIP) install '$(TORCH)'
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	@$(PIP) install -c $(VENV)/constraints.txt -e '.[demo]'
	@touch $@

$(DEV_STAMP): $(DEMO_STAMP)
	@echo "installing the test tools into $(VENV)"
	@$(PIP) install -c $(VENV)/constraints.txt -e '.[demo,dev]'
	@touch $@

$(VISION_STAMP): | $(DEV_STAMP)
	@echo "installing torchvision, timm and open_clip into $(VISION_LIBS)"
	@rm -rf $(VISION_LIBS)
	@$(PIP) install --no-deps --target $(VISION_LIBS) -r requirements/vision.txt
	@touch $@

demo: $(DEMO_STAMP)
	$(VENV)/bin/latemax demo --out '$(OUT)' $(DEMO_ARGS)

# Twice: all tests where torchvision, timm and open_clip are absent, then the tests that concern them where they are not.
test: $(DEV_STAMP) $(VISION_STAMP)
	$(PY) -m pytest
	PYTHONPATH=$(VISION_LIBS) $(PY) -m pytest $(VISION_TESTS)

# Any machine: CPU rows on a CPU, CUDA rows and peers (where installed) on a GPU.
bench: $(DEV_STAMP)
	$(PY) -m benchmarks.suites.maxsim $(BENCH_ARGS)

lint: $(DEV_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) $(VISION_LIBS) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .benchmarks demo_out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
