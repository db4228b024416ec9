# make demo: train both stages on the built-in digits and draw some.   make test: the whole test suite.
# VENV=path uses another virtual environment; STAGE1=, STAGE2= and SAMPLE= add settings to the demo's three commands.
VENV ?= .venv
PYTHON ?= python3
RUN ?= runs/demo
LAUNCH = $(VENV)/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
INSTALLED = $(VENV)/installed

.PHONY: demo test lint

# On two quiet cores the steps take about one minute in stage 1 and two in stage 2. A busy machine takes longer
# for the same model. After max_seconds a stage ends early, and says so.
demo: $(INSTALLED)
	$(LAUNCH) stage1/train.py run_dir=$(RUN)/stage1 train.max_steps=1200 train.max_seconds=900 $(STAGE1)
	$(LAUNCH) stage2/train.py run_dir=$(RUN)/stage2 stage1=$(RUN)/stage1 train.max_steps=1000 train.max_seconds=900 $(STAGE2)
	$(VENV)/bin/python stage2/sample.py $(RUN)/stage2 num_images=100 out=$(RUN) $(SAMPLE)

# Three files at a time, as each test runs on one thread, and those of two processes wait for each other at times; the
# longest first (tests/conftest.py), or a core would wait at the end.
test: $(INSTALLED)
	$(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

# torch-fidelity is a test's oracle. It wants torchvision, and torchmetrics would import it if it were installed: so aside.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/oracles torch-fidelity
	touch $@
