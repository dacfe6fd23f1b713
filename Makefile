# Two commands do everything on a fresh machine: `make train` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# Without an NVIDIA GPU a pinned torch, for which a package index may offer the small CPU build; with one, the
# normal CUDA build in the range that pyproject.toml gives.
TORCH := $(shell nvidia-smi -L >/dev/null 2>&1 && echo "torch>=2.10" || echo "torch==2.13.0")
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
RUN ?= runs/default
# Files of tests that run side by side. Each may have two ranks at work: more than one worker for two cores is no help.
WORKERS ?= 2

.PHONY: train test soak goldens mutants lint check-machine clean

train: $(VENV)/.installed
	$(BIN)/bigtrain train run_dir=$(RUN)
	$(BIN)/bigtrain report $(RUN)
	$(BIN)/bigtrain generate $(RUN) --prompt "def read_file(path):" --temperature 0.7 --max-new-tokens 120

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not soak" --durations 25 $(TESTS)

soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m soak $(TESTS)

# Write anew the numbers that tests/goldens holds the code to, after a change that was to change them.
goldens: $(VENV)/.installed-dev
	$(BIN)/python -m tests.goldens $(PARTS)

# Plant bugs, one at a time, and see that the tests fail: MUTANTS="id id", all if empty.
mutants: $(VENV)/.installed-dev
	$(BIN)/python -m tests.mutants $(MUTANTS)

$(VENV)/.installed: pyproject.toml | check-machine
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing bigtrain and its dependencies into $(VENV) (a few minutes the first time)"
	@$(PIP) install "$(TORCH)"
	@$(PIP) install --editable . "$(TORCH)"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(PIP) install --editable ".[dev]" "$(TORCH)"
	@touch $@

check-machine:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	  || { echo "bigtrain: error: $(PYTHON) is missing or not Python 3.10 to 3.13; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "bigtrain: error: $(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv)"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null \
	  || { echo "bigtrain: error: no C++ compiler, which DeepSpeed's native ops need; install one (Debian: apt-get install g++)"; exit 1; }

clean:
	rm -rf $(VENV)
