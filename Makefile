# make demo [VIDEOS=folder]   the whole job on a tiny base: videos -> shards -> LoRA -> pictures and a video
# make test                   format, lint, types, tests
# make gpu                    the tests that need a GPU, on one
# make faults                 kill, cut, flip, fill and attack, in full: one line a test, and runs/faults.json
# make setup                  what both need, once: .venv from the lock file
# make lock                   renew requirements.lock from the newest versions that setup.py allows
# Without a GPU, PyTorch's CPU build saves gigabytes; name its index to pip (PIP_EXTRA_INDEX_URL) before the first call.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
PIP = .venv/bin/python -m pip install --disable-pip-version-check
EXTRAS = dev$(if $(shell command -v nvidia-smi),$(comma)gpu)
comma := ,

.PHONY: demo test gpu faults setup lock
demo: setup
	@.venv/bin/python launch/demo.py $(if $(VIDEOS),--videos "$(VIDEOS)")

test: .venv/ready
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/python -m pytest $(ARGS)

gpu: .venv/ready
	@FRAMER_GPU=1 .venv/bin/python -m pytest -m gpu $(ARGS)

faults: .venv/ready
	@.venv/bin/python -m pytest tests/faults --long $(ARGS)

setup: .venv/ready

.venv/ready: requirements.lock setup.py
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "setting up .venv with $(PYTHON): some minutes, once"
	@$(PYTHON) -m venv .venv || { echo "this Python has no venv; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(PIP) --quiet --constraint requirements.lock --editable ".[$(EXTRAS)]"
	@touch $@

lock: .venv/ready
	@$(PIP) --quiet --upgrade ".[dev]"
	@{ sed -n '/^#/p' requirements.lock; \
	   .venv/bin/python -m pip freeze --exclude-editable --exclude framer-toolkit | sed 's/+cpu$$//'; \
	   sed -n '/^xformers/p' requirements.lock; } > requirements.new && mv requirements.new requirements.lock
