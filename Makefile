# make demo | make test | make test-hosts | make test-ray | make docs | make bench | make soak | make lint | make wheel | make clean
# Everything is installed into .venv; only python3 and access to a package index are needed.

PYTHON ?= python3
# Installed first and then pinned, so that no dependency replaces it.
# With a GPU any torch >= 2.10 works: make demo TORCH="torch==2.12.0"
TORCH ?= torch==2.13.0
# Output folder of `make demo`, and more options for it: make demo DEMO_ARGS="--model facebook/dinov2-base"
OUT ?= demo_out
DEMO_ARGS ?=
# For example BENCH_ARGS="--json benchmarks/results/bench-cpu.json"
BENCH_ARGS ?=
# Worker processes of `make test`: make test JOBS=4
JOBS ?= auto

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test test-hosts test-ray docs bench soak lint wheel clean

VENV := .venv
PY := $(VENV)/bin/python
# Only errors are shown.
PIP := $(PY) -m pip --disable-pip-version-check -qq
VISION_LIBS := .vision-libs
HOSTS := .hosts
RAY := .ray-libs
DOCS_VENV := .docs-venv
VISION_TESTS := tests/test_encoders*.py tests/test_lora*.py tests/test_preprocess*.py tests/test_retriever.py

# Stamps are named after the content they were made from: a changed requirement installs again, a fresh checkout does
# not.
KEY := $(shell { echo '$(TORCH) $(CURDIR)'; cat pyproject.toml setup.py; } | cksum | cut -d' ' -f1)
VISION_KEY := $(shell cksum < requirements/vision.txt | cut -d' ' -f1)
RAY_KEY := $(shell cksum < requirements/ray.txt | cut -d' ' -f1)
DOCS_KEY := $(shell cksum < requirements/docs.txt | cut -d' ' -f1)
HOSTS_KEY := $(shell cksum < requirements/hosts.txt | cut -d' ' -f1)
DEMO_STAMP := $(VENV)/.demo-$(KEY)
DEV_STAMP := $(VENV)/.dev-$(KEY)
RELEASE_STAMP := $(VENV)/.release-$(KEY)
VISION_STAMP := $(VISION_LIBS)/.stamp-$(VISION_KEY)
RAY_STAMP := $(RAY)/.stamp-$(RAY_KEY)
DOCS_STAMP := $(DOCS_VENV)/.stamp-$(DOCS_KEY)
HOSTS_STAMP := $(HOSTS)/.stamp-$(HOSTS_KEY)
# A whole file goes to one worker, so that its fixtures are built once; files start in the order of tests/conftest.py.
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

help:
	@sed -n '1,2s/^# //p' Makefile

$(PY):
	$(PYTHON) -m venv $(VENV)

$(DEMO_STAMP): | $(PY)
	@rm -f $(VENV)/.demo-* $(VENV)/.dev-* $(VENV)/.release-*
	@echo "installing $(TORCH), latemax and the requirements of its demo into $(VENV) (minutes, once)"
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

# Two runs: all tests without torchvision, timm and open_clip, then the tests of encoders and retrievers with them. Encoders of
# transformers use none of the three and are tested in the first run only.
test: lint $(DEV_STAMP) $(VISION_STAMP)
	$(PYTEST)
	PYTHONPATH=$(VISION_LIBS) $(PYTEST) $(VISION_TESTS) -k 'not transformers-'

$(HOSTS_STAMP): requirements/hosts.txt | $(DEV_STAMP)
	@echo "installing host libraries into $(HOSTS), a folder each"
	@rm -rf $(HOSTS)
	@grep -v '^#' $< | while read -r folder requirements; do \
		$(PIP) install --no-deps --target "$(HOSTS)/$$folder" $$requirements; done
	@touch $@

# latemax.compat next to the functions of the hosts, and their losses with and without it.
test-hosts: $(HOSTS_STAMP) $(VISION_STAMP)
	LATEMAX_HOSTS=$(HOSTS) LATEMAX_HOST_CASES=200 PYTHONPATH=$(VISION_LIBS) $(PY) -m pytest -n $(JOBS) tests/test_hosts.py

$(RAY_STAMP): requirements/ray.txt | $(DEV_STAMP)
	@echo "installing Ray into $(RAY)"
	@rm -rf $(RAY)
	@$(PIP) install --no-deps --target $(RAY) -r requirements/ray.txt
	@touch $@

# latemax.ray on a local cluster of two cores, whose workers are killed.
test-ray: $(RAY_STAMP)
	PYTHONPATH=$(CURDIR)/$(RAY) $(PY) -m pytest tests/test_ray.py

# A virtual environment without torch: the reference is read from the sources, not imported.
$(DOCS_STAMP): requirements/docs.txt
	@echo "installing mkdocs into $(DOCS_VENV)"
	@rm -rf $(DOCS_VENV)
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check -qq install -r $<
	@touch $@

# Strict: a broken link, a page outside the navigation or a name that does not exist ends it.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

# Any machine: CPU rows on a CPU, CUDA rows and peers (if installed) on a GPU.
bench: $(DEV_STAMP)
	$(PY) -m benchmarks.suites.maxsim $(BENCH_ARGS)

# Half an hour of threads that score, search, encode and write.
soak: $(DEV_STAMP)
	$(PY) -m benchmarks.suites.soak

lint: $(DEV_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(RELEASE_STAMP): $(DEV_STAMP)
	@echo "installing the release tools into $(VENV)"
	@$(PIP) install -c $(VENV)/constraints.txt -e '.[demo,dev,release]'
	@touch $@

# `build` makes the wheel from the sdist, unpacked in an empty folder. The wheel is then imported in a folder that is
# not the checkout. auditwheel reads the platform tag, which a wheel without native kernels does not have.
wheel: $(RELEASE_STAMP)
	rm -rf dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*
	case "$$(ls dist/*.whl)" in *-any.whl) ;; *) $(PY) -m auditwheel show dist/*.whl;; esac
	site=$$(mktemp -d); trap 'rm -rf "$$site"' EXIT; \
	$(PIP) install --no-deps --no-index --target "$$site" dist/*.whl; \
	python=$$PWD/$(PY) program=$$PWD/tests/programs/installed.py; cd "$$site"; PYTHONPATH="$$site" "$$python" "$$program"

clean:
	rm -rf $(VENV) $(VISION_LIBS) $(HOSTS) $(RAY) $(DOCS_VENV) site build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache .benchmarks \
		demo_out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
