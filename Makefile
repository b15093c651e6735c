# Everything one does with this repository. Needs Python 3.11 or later and make; the rest goes into .venv.
PYTHON ?= $(firstword $(shell command -v python3.11 python3))
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := .demo
SAMPLES := sample_checkpoints

.PHONY: help demo test lint figures peers slow fuzz zoo speed mutants bench many samples clean
help:  ## This list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(VENV)/.package  ## Convert a sample checkpoint, verify it on real images, time it; the results are in .demo
	rm -rf $(DEMO) && mkdir $(DEMO)
	$(BIN)/repfuse convert $(SAMPLES)/repvgg_digits.pt $(DEMO)/fused.pt
	$(BIN)/repfuse verify $(SAMPLES)/repvgg_digits.pt $(DEMO)/fused.pt --data $(SAMPLES)/digits_heldout.safetensors
	$(BIN)/repfuse bench $(SAMPLES)/repvgg_digits.pt $(DEMO)/fused.pt --batch-size 1 --batch-size 64 --threads 1
	@ls -l $(DEMO)

test: $(VENV)/.dev  ## The tests, in minutes
	$(BIN)/pytest -n auto --maxprocesses 4

lint: $(VENV)/.dev  ## Ruff (lint and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: $(VENV)/.dev  ## What a newcomer has to read: files, lines, imports, circles, modules loaded
	$(BIN)/python tests/figures.py

peers: $(VENV)/.peers  ## Whole networks against other tools, and in the libraries that made them
	$(BIN)/pytest -m peers

slow: $(VENV)/.dev  ## The exhaustive suites, and the laws on many more examples
	HYPOTHESIS_PROFILE=many $(BIN)/pytest -m 'slow or hypothesis' -n auto --maxprocesses 4

fuzz: $(VENV)/.dev  ## Damaged files of each format, new ones each time; minutes on two cores
	$(BIN)/pytest tests/test_fuzz.py -m slow -n auto --maxprocesses 4

# Some networks alone: make zoo ZOO='timm:vgg11 torchvision:resnet18'
zoo: $(VENV)/.dev  ## Convert and prove a network of every timm family and torchvision's; about an hour
	$(BIN)/python -W ignore -m tests.zoo $(ZOO)

speed: $(VENV)/.dev  ## Time each network of the zoo beside its fused form and timm's own; about an hour
	PYTHONPATH=tests $(BIN)/python -W ignore -m tests.bench_zoo $(ZOO)

# All mutants, and not the usual sample of the blunt ones: make mutants MUTANTS='--blunt-one-in 1'. Some files: MUTANTS=FILE
mutants: $(VENV)/.mutants  ## What no test of the algebra and the operator tables notices; an hour on two cores, resumable
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(MUTANTS)

bench: $(VENV)/.dev  ## Time conversion, verification and inference; writes the README's table
	$(BIN)/python tests/bench_rewrite.py
	$(BIN)/python tests/bench_verify.py
	$(BIN)/python tests/bench_onnx_memory.py
	$(BIN)/repfuse bench --notebook
	$(BIN)/python tests/bench_readme.py

many: $(VENV)/.dev  ## Time 200 checkpoints by one command, also killed and on a cluster; half an hour
	$(BIN)/python tests/bench_many.py

samples: $(VENV)/.dev  ## Train and write the sample checkpoints again
	$(BIN)/python $(SAMPLES)/make_samples.py

clean:  ## Remove the environment and all that was made
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .mutants

# Two environments in one folder: the demo needs the package alone, the rest needs the development tools too.
$(VENV)/.package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.package
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.peers: $(VENV)/.dev
	$(PIP) --editable '.[peers]'
	touch $@

$(VENV)/.mutants: $(VENV)/.dev
	$(PIP) --editable '.[mutants]'
	touch $@
