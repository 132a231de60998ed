#!/usr/bin/env bash
# Lint, types, import contracts, the docs' sentences, tests: what `make test` and CI run.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
# one process a core: threads inside would only wait for each other
export OMP_NUM_THREADS=1

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
"$bin/python" scripts/prose.py
"$bin/pytest" -n "${WORKERS:-2}" "$@"
