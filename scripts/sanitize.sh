#!/usr/bin/env bash
# The native operators at random shapes, built under the address and undefined-behaviour sanitizers: what reads or writes
# past a tensor, or overflows, ends the run.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
export OMP_NUM_THREADS=2
export SALA_CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
# Python itself is not built with them, so their library must come first; what Python never frees is not ours to report
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONMALLOC=malloc

PYTHONPATH=${PYTHONPATH:-src}:tests "$bin/python" tests/ops/sanitize.py "${ROUNDS:-2}"
