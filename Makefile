# Every target sets up what it needs. Python 3.11 and make are enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(wildcard protos/gradwire_protocol/v1/*.proto)

.PHONY: train test test-benchmarks test-examples test-models test-faults test-deploy test-docker compose-up compose-train compose-down lint protos dashboards bench examples fuzz soak clean help
.DEFAULT_GOAL := help

help:
	@echo "make train   train the reference job on a local cluster"
	@echo "make test    run the whole test suite"
	@echo "make test-benchmarks  run each benchmark in a short form"
	@echo "make test-examples  run each example in a short form, and verify it"
	@echo "make test-models    train models of many kinds, on many grids, beside one process"
	@echo "make test-faults    kill, stop, stall and starve processes, and cut networks"
	@echo "make test-deploy    run the chart's pods, and Prometheus with rules and dashboards, for real"
	@echo "make test-docker    build the images, and run the compose file in a Docker engine"
	@echo "make compose-up     build the images and start a cluster with dashboards: Grafana at 127.0.0.1:3000"
	@echo "make compose-train  train the reference job on it"
	@echo "make compose-down   stop it; VOLUMES=1 removes its checkpoints, runs and certificates, too"
	@echo "make lint    ruff, mypy, buf, generated stubs"
	@echo "make examples  run every example in full, beside its single-process script"
	@echo "make bench   run the benchmarks and check their claims"
	@echo "make fuzz    fuzz the frame decoder for FUZZ_SECONDS (300)"
	@echo "make soak    a day's messages in minutes: does anything grow?"
	@echo "make dashboards  rebuild Grafana's dashboards from docker/grafana/gradwire_dashboards"
	@echo "make protos  regenerate the stubs from the .proto files"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: $(STAMP)
	$(BIN)/gradwire train

# Three at a time: much of the time goes into starting servers and waiting for them. Files stay whole, so that they share
# their clusters, and in their order: integration tests first, so that no long file of few tests is left for the end.
# One thread each: more would only get into each other's way.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Each benchmark once, as short as it goes: does it run, and say what it measures?
test-benchmarks: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m benchmark

# Each example a few steps long, as its user starts it, and one step of it beside one process.
test-examples: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m example

# The zoo, and grids with every transport, each beside one process.
test-models: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m model -n 3 --dist loadfile --no-loadscope-reorder

# Processes and networks that die, stall or are stopped: waiting is most of it.
test-faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fault -n 3 --dist loadfile --no-loadscope-reorder

# The chart's pods in network namespaces, and a real Prometheus beside a cluster.
test-deploy: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m deploy -n 2 --dist loadfile

# Where no Docker engine runs, root on Debian 12 gets one for the test, with stand-ins for the images that it cannot pull.
test-docker: $(STAMP)
	$(BIN)/python -m pytest -m docker

# The cluster of docker/compose.yaml; needs Docker with its Compose plugin, and nothing else of this file.
COMPOSE := docker compose --file docker/compose.yaml
compose-up:
	$(COMPOSE) --profile trainer build
	$(COMPOSE) up --detach --wait

compose-train:
	$(COMPOSE) run --rm trainer

compose-down:
	$(COMPOSE) --profile trainer down $(if $(VOLUMES),--volumes)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	@# The contract may change freely until its first release; after that only in ways that old peers understand.
	@tag=$$(git describe --tags --abbrev=0 2>/dev/null); if [ -n "$$tag" ]; then $(BIN)/buf breaking --against ".git#tag=$$tag"; fi

# Comments and whitespace aside, the same files on every machine: the tools are pinned.
protos: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=protos --pyi_out=protos --grpc_python_out=protos $(PROTOS)
	@# Files without a service give empty service stubs.
	@for stub in protos/gradwire_protocol/v1/*_pb2_grpc.py; do grep -q '^class' $$stub || rm $$stub; done

# The same files on every machine: the builder is pinned.
dashboards: $(STAMP)
	$(BIN)/python docker/grafana/build_dashboards.py

bench: $(STAMP)
	$(BIN)/python benchmarks/pipeline.py --check
	$(BIN)/python benchmarks/checkpoint.py --rounds 3 --check

# Findings are written to the working directory as crash-*.
FUZZ_SECONDS ?= 300
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python tests/fuzz/frame_decoder.py -max_total_time=$(FUZZ_SECONDS)

# A day's messages, and the reference job to its end, once for each codec.
SOAK ?=
CODEC_LOSS ?=
soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py --check $(SOAK)
	$(BIN)/python benchmarks/codec_loss.py --check $(CODEC_LOSS)

# Sorted, so that each script stands beside the one for a single process.
examples: $(STAMP)
	@for script in $(sort $(wildcard examples/*.py)); do echo "== $$script"; HF_HUB_OFFLINE=1 $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
