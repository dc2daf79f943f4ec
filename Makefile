# make train: set everything up, and train the embedded default.
# make test:  set everything up, and run the tests; make test-slow: the long ones;
#             make test-oldest: the tests under the oldest torch that pyproject.toml allows.

PYTHON ?= python3
PROCESSES ?= 2
ENV := .venv/.made
PY := .venv/bin/python
# Tests start many processes and wait for them, so that two at a time are done sooner on two cores.
PYTEST := $(PY) -m pytest -q --numprocesses=2 --dist=loadfile
# torchrun would set OMP_NUM_THREADS, with a warning; the trainer sets its threads itself.
TORCHRUN := OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc_per_node=$(PROCESSES)

.PHONY: train test test-slow test-oldest lint bench bench-layouts bench-scaling bench-gpu chaos clean

train: $(ENV)
	$(TORCHRUN) -m alexnet_dist.train $(ARGS)

test: $(ENV) lint
	$(PYTEST) -m "not slow and not slurm" $(ARGS)

test-slow: $(ENV)
	$(PYTEST) -m "slow or slurm" $(ARGS)

test-oldest:
	test -x build/oldest/bin/python || $(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet "torch==2.11.*" "torchvision==0.26.*" --editable ".[dev]"
	build/oldest/bin/python -m pytest -q --numprocesses=2 --dist=loadfile -m "not slow and not slurm" $(ARGS)

lint: $(ENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# This trainer against PyTorch's example. DATA is a folder of JPEGs in train/CLASS/.
bench: $(ENV)
	$(PY) -m benchmarks.vs_pytorch_example --data $(DATA) $(ARGS)

# What layouts send, on network namespaces as hosts; as root.
bench-layouts: $(ENV)
	$(PY) -m benchmarks.communication --bytes --speed

# Training on four hosts (network namespaces) under FAULTS faults drawn from SEED; as root. A fault
# takes half a minute.
FAULTS ?= 40
SEED ?= 2012
chaos: $(ENV)
	$(PY) -m benchmarks.chaos --faults $(FAULTS) --seed $(SEED) $(ARGS)

# Steps on 1 to 1,024 GPUs by a model, and the model against steps on namespaces; as root.
bench-scaling: $(ENV)
	$(PY) -m benchmarks.scaling --check $(ARGS)

# The tests and benchmarks that need an NVIDIA GPU, with python3 as it is installed: nothing is
# downloaded. DATA as above. A step that fails does not stop the others; all that failed are named.
PIXELS ?= build/pixels
RESULTS := benchmarks/results
BENCH_GPU := $(PYTHON) -m alexnet_dist.bench --config configs/fast.yaml --data.batch_size 512
bench-gpu:
	@failed=; step() { echo "== $$*"; "$$@" || failed="$$failed\n  $$*"; }; \
	step $(PYTHON) -m pytest -q -m gpu; \
	step $(PYTHON) -m benchmarks.lrn; \
	step $(PYTHON) -m benchmarks.vs_pytorch_example --data $(DATA) --data.batch_size 512 --out $(RESULTS)/gpu-vs-pytorch-example.json; \
	step $(BENCH_GPU) --data.root $(DATA) --out $(RESULTS)/gpu-torchvision.json; \
	step $(BENCH_GPU) --model.arch paper --data.root $(DATA) --out $(RESULTS)/gpu-paper.json; \
	step $(PYTHON) -m alexnet_dist.prepare $(DATA) --out $(PIXELS) --format pixels --crop center; \
	step $(BENCH_GPU) --model.arch paper --data.train_crop paper --data.root $(PIXELS) --out $(RESULTS)/gpu-cache.json; \
	if [ -n "$$failed" ]; then printf "These failed:$$failed\n"; exit 1; fi

$(ENV): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
