# Two commands need no other before them: `make demo` and `make test`.
# On a machine without a CUDA GPU, PyTorch's CPU build saves gigabytes:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
JOBS ?= 2
OLDEST := $(addprefix tests/,contract test_gradients.py test_lora.py test_head.py test_models.py \
	test_resume.py test_engine.py test_attention.py test_other_loops.py test_several_processes.py)

.PHONY: demo test test-slow test-oldest bench check format clean

demo: $(VENV)/.installed
	$(BIN)/qft demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

# llama.cpp, the judge of GGUF files, is compiled once: several minutes.
test-slow: $(VENV)/.installed-slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

# The contract on the oldest versions that pyproject.toml allows, in an environment of its own.
test-oldest:
	$(MAKE) .venv-oldest/.installed-dev VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(JOBS) -m "not slow" $(OLDEST)

# Measures on this CPU (QFT_ASSETS names the data), then draws the README's tables from the results.
# Cases that have rows of this commit are left out, so that an interrupted run goes on.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.peers --missing
	if test -f benchmarks/feature_cache.py; then $(BIN)/python benchmarks/feature_cache.py "$$QFT_ASSETS"; fi
	$(BIN)/python benchmarks/redraw.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info

# A marker file remembers the installation; it is made again only when the requirements change.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e ".[dev]"
	@touch $(VENV)/.installed $@

$(VENV)/.installed-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e ".[dev,gguf-test]"
	@touch $@
