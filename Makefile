# make quickstart   set up .venv and run the whole example      make test        set up and pass every test
# make serve        serve the finished quickstart               make test-fast   without the slow tests
# make lint         ruff and mypy                               make clean       remove .venv and caches
# make reference    write docs/configuration-reference.md anew
#
# Variables: PYTHON (an interpreter >= 3.11), CONFIG (what quickstart and serve run), TORCH_INDEX_URL.

CONFIG ?= examples/quickstart.yaml
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# The first interpreter that runs and is new enough (a name on PATH may be there and still not run).
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$name; break; fi; done)

.PHONY: quickstart serve test test-fast lint reference clean setup setup-dev

quickstart: setup
	$(BIN)/mahalo run $(CONFIG)
	@echo "Serve the result with: make serve"

serve: setup
	$(BIN)/mahalo serve $(CONFIG)

# Processes share the tests, file by file, in the order and as many as tests/conftest.py says. One that crashes ends
# the suite: with a new one in its place the others would wait for ever.
# The variables are those of pipeline/cluster.py, for the tests that start a Ray themselves.
QUICK := OMP_NUM_THREADS=1 MAHALO_GC_THRESHOLD=10000 RAY_preload_python_modules=mahalo_ray
PYTEST := $(QUICK) $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: lint
	$(PYTEST)

test-fast: setup-dev
	$(PYTEST) -m "not slow"

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

reference: setup
	$(BIN)/python -c "from mahalo_ray.config.describe import reference_page; print(reference_page(), end='')" \
	  > docs/configuration-reference.md

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "No Python 3.11 or newer found. Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is not Python 3.11 or newer" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Torch goes in first: DeepSpeed's build looks for it and would otherwise bring a build of its own choosing.
# Without an NVIDIA GPU, and where pip is not set up for an index of its own, it is the CPU build from
# PyTorch's index; set TORCH_INDEX_URL= (empty) for pip's usual index, or to any other index.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@$(if $(filter undefined,$(origin TORCH_INDEX_URL)),\
	  index=; if [ "$$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1 && ! $(PIP) config list | grep -q index-url; \
	  then index=https://download.pytorch.org/whl/cpu; fi,index='$(TORCH_INDEX_URL)'); \
	set -x; $(PIP) install $${index:+--extra-index-url $$index} $(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
