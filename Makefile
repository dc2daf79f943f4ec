# make train: set everything up, and train the embedded default.
# make test:  set everything up, and run the tests; make test-slow: the long ones.

PYTHON ?= python3
PROCESSES ?= 2
ENV := .venv/.made
PY := .venv/bin/python
# Tests start many processes and wait for them, so that two at a time are done sooner on two cores.
PYTEST := $(PY) -m pytest -q --numprocesses=2 --dist=loadfile
TORCHRUN := .venv/bin/torchrun --nproc_per_node=$(PROCESSES)

.PHONY: train test test-slow lint bench bench-layouts bench-scaling bench-gpu clean

train: $(ENV)
	$(TORCHRUN) -m alexnet_dist.train $(ARGS)

test: $(ENV) lint
	$(PYTEST) -m "not slow and not slurm" $(ARGS)

test-slow: $(ENV)
	$(PYTEST) -m "slow or slurm" $(ARGS)

lint: $(ENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The measurement in the README. DATA is a folder of JPEGs in train/CLASS/.
bench: $(ENV)
	$(PY) -m alexnet_dist.bench --baseline --config configs/fast.yaml --data.root $(DATA) $(ARGS)

# What layouts send, on network namespaces as hosts; as root.
bench-layouts: $(ENV)
	$(PY) -m benchmarks.communication --bytes --speed

# Steps on 1 to 1,024 GPUs by a model, and the model against steps on namespaces; as root.
bench-scaling: $(ENV)
	$(PY) -m benchmarks.scaling --check $(ARGS)

# The tests and the measurements that want an NVIDIA GPU; DATA as above.
BENCH_GPU := $(PY) -m alexnet_dist.bench --config configs/fast.yaml --data.batch_size 512
PIXELS ?= build/pixels
bench-gpu: $(ENV)
	$(PY) -m pytest -q -m gpu
	$(PY) -m benchmarks.lrn
	$(BENCH_GPU) --baseline --data.root $(DATA) --out benchmarks/results/bench-gpu-torchvision.json
	$(BENCH_GPU) --each --model.arch paper --data.root $(DATA) --out benchmarks/results/bench-gpu-paper.json
	$(PY) -m alexnet_dist.prepare $(DATA) --out $(PIXELS) --format pixels --crop center
	$(BENCH_GPU) --model.arch paper --data.train_crop paper --data.root $(PIXELS) --out benchmarks/results/bench-gpu-resident.json

$(ENV): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
