PYTHON ?= python
WORKERS ?= 2
SCALE ?= nano
DATA ?= ../shared/data
export HF_HUB_OFFLINE := 1
# One thread a test worker: with more, workers wait for each other.
test quick: export OMP_NUM_THREADS := 1

.PHONY: help install lint test quick sweep evals demo

help:
	@echo "make install   torch, then this package with its development tools, at the tested versions"
	@echo "make test      lint, types and every test"
	@echo "make quick     the tests that start no other process"
	@echo "make sweep     every check on every RoPE architecture of transformers (CI does a third): evals/results/architectures"
	@echo "make evals     every claim measured again, and evals/README.md from the results (DATA=, SCALE=nano; resumable)"
	@echo "make demo      the whole loop on a CPU: pretrain, modify, fine-tune four arms, compare (MODEL=, TEXT= for yours)"

install:
	$(PYTHON) -m pip install torch==2.13.0
	$(PYTHON) -m pip install --constraint constraints.txt --editable '.[dev]'

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test: lint
	$(PYTHON) -m pytest --numprocesses $(WORKERS) -m 'not slow'
	$(PYTHON) -m pytest -m slow

quick:
	$(PYTHON) -m pytest --numprocesses $(WORKERS) -m 'not slow'

sweep:
	$(PYTHON) -m evals.architectures --workers $(WORKERS)

evals:
	$(PYTHON) -m evals run --scale $(SCALE) --data $(DATA) --workers $(WORKERS)
	$(PYTHON) -m evals page

demo:
	$(PYTHON) recipes/demo.py $(if $(MODEL),--model $(MODEL)) $(if $(TEXT),--text $(TEXT))
