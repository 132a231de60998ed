#!/usr/bin/env bash
# Runs tests under another version of transformers, in an environment of its own: test_with.sh VERSION|oldest|newest TESTS...
set -euo pipefail
cd "$(dirname "$0")/.."
version=$1
shift
if [ "$version" = oldest ]; then
    version=$(sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
fi
env=.venv-with-$version
"${PYTHON:-python3}" -m venv "$env"
if [ "$version" = newest ]; then
    # no lock: what a user's `pip install sala` takes today
    "$env/bin/pip" install --quiet --disable-pip-version-check -e '.[dev]'
else
    # these follow the version of transformers
    grep -vE '^(transformers|tokenizers|huggingface-hub|hf-xet)==' constraints.txt > "$env/constraints.txt"
    "$env/bin/pip" install --quiet --disable-pip-version-check --constraint "$env/constraints.txt" \
        "transformers==$version" -e '.[dev]'
fi
"$env/bin/python" -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'
# one process a core: threads inside would only wait for each other
OMP_NUM_THREADS=1 "$env/bin/pytest" -n "${WORKERS:-2}" "$@"
