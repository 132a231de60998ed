#!/usr/bin/env bash
# The device tests and all measurements on one GPU, the most important first, within a budget of time.
#
#   benchmarks/gpu.sh [FOLDER]     JSON and a log into FOLDER, else benchmarks/results
#
#   PYTHON=python3     an interpreter with the package's dependencies; the package is taken from src/, nothing is installed
#   BUDGET=540         seconds for everything
#   PARTS="..."        only these parts, in this order
#   DRY=1              every part at tiny sizes, without a GPU too: a rehearsal, whose figures mean nothing
#   SALA_COMMIT=...    the commit, where this is a copy of the files without their repository
#
# Each part has a limit of its own. A part that fails or is stopped takes nothing from the others and keeps what it has
# measured; gpu.json says of each what became of it. flash-linear-attention is timed where it is installed.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-540}
DRY=${DRY:-}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

# else every part would begin, and say so in the log
if ! missing=$("$PYTHON" -c 'import pytest, hypothesis, sala.bench, sala.cli.bench' 2>&1); then
    echo "$PYTHON cannot run the measurements: ${missing##*$'\n'}" >&2
    exit 2
fi
if [ -z "$DRY" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "torch sees no GPU: this is a rehearsal (DRY=1), whose figures mean nothing" >&2
    DRY=1
fi
if [ -n "$DRY" ]; then
    out=${1:-$(mktemp -d)}
else
    out=${1:-benchmarks/results}
    # what memory is foretold by would otherwise build the C++ operators first, half a minute that nothing here needs
    export SALA_CPU_LEVEL=none
fi
mkdir -p "$out" || exit
log=$out/gpu.log
: >"$log"

# one name, seconds at most, and what runs; a rehearsal runs the second command
# (a test's result at once, for it may be stopped; what this torch and Triton warn of is no failure of a kernel)
tests=(120 -m pytest -m gpu -p no:cacheprovider -vv --tb=short -W default tests/ops tests/engine tests/model)
lightning=(100 bench ops --op lightning --phase prefill --phase training --length 8K --length 32K --length 128K
    --backend triton --backend fla)
infllm=(100 bench ops --op infllm --phase prefill --phase training --phase selection
    --length 32K --length 64K --length 128K --backend triton)
latency=(300 bench latency --shape minicpm-sala-9b --length 4K --length 64K --length 128K --length 256K --length 1M
    --chunk 8192 --new-tokens 64 --repeats 3 --once 8 --limit 100)
train=(150 bench train --shape sala-1b)
steps=(50 bench ops --op lightning --op infllm --phase step --length 4K --length 64K --length 1M --backend triton)
eager=(60 bench ops --op lightning --op infllm --phase prefill --length 16K --repeats 2 --limit 5)
million=(60 bench ops --op infllm --phase prefill --phase selection --length 1M --backend triton --repeats 2)
latency_512k=(260 bench latency --shape minicpm-sala-9b --length 512K --chunk 8192 --new-tokens 16 --repeats 1)
if [ -n "$DRY" ]; then
    # the first to need the C++ operators builds them
    small=(--shape small-64x4 --length 2K --dtype float32 --repeats 1)
    lightning=(120 bench ops --op lightning --phase prefill --phase training "${small[@]}")
    infllm=(120 bench ops --op infllm --phase prefill --phase training --phase selection "${small[@]}")
    latency=(120 bench latency --shape sala-10m --length 64 --length 256 --dtype float32 --chunk 128 --new-tokens 2 --repeats 1)
    train=(120 bench train --shape sala-10m --length 128 --tokens 256 --steps 1 --warm-up 1 --topk 4 --blocks-length 256
        --compile off)
    steps=(120 bench ops --phase step "${small[@]}")
    eager=(120 bench ops --op lightning --phase prefill "${small[@]}" --limit 5)
    million=(120 bench ops --op infllm --phase selection "${small[@]}")
    latency_512k=(120 bench latency --shape sala-10m --length 64 --dtype float32 --repeats 1 --new-tokens 1 --only baseline)
fi
# the last ones only where time is left
PARTS=${PARTS:-tests latency lightning infllm train steps eager million latency_512k}
# with less than this left nothing is begun
LEAST=20

rows=()
failed=0
row() {  # name, status, seconds, command
    rows+=("  {\"part\": \"$1\", \"status\": \"$2\", \"seconds\": $3, \"command\": \"${4//\"/\\\"}\"}")
    printf '%-14s %5s s  %s\n' "$1" "$3" "$2"
    local IFS=$'\n'
    printf '{\n "kind": "gpu suite",\n "rehearsal": %s,\n "budget_s": %s,\n "parts": [\n%s\n ]\n}\n' \
        "$([ -n "$DRY" ] && echo true || echo false)" "$BUDGET" "$(paste -sd, - <<<"${rows[*]}" | sed 's/},  {/},\n  {/g')" \
        >"$out/gpu.json"
}

for part in $PARTS; do
    if ! declare -p "$part" 2>/dev/null | grep -q '^declare -a'; then
        echo "no part $part; there are tests lightning infllm latency train steps eager million latency_512k" >&2
        exit 2
    fi
    declare -n plan=$part
    limit=${plan[0]} command=("${plan[@]:1}")
    if [ "$part" = tests ]; then
        # one process a test compiles one kernel at a time
        "$PYTHON" -c 'import xdist' 2>/dev/null && command+=(-n "$([ -n "$DRY" ] && echo 1 || echo 12)")
    else
        command=(-m sala.cli "${command[@]}" --out "$out/gpu-$part.json")
    fi
    left=$((BUDGET - SECONDS))
    if [ "$left" -lt "$LEAST" ]; then
        row "$part" "not run: $left s of the budget were left" 0 "${command[*]}"
        continue
    fi
    [ "$left" -lt "$limit" ] && limit=$left
    began=$SECONDS
    printf '\n== %s: %s\n' "$part" "${command[*]}" >>"$log"
    # tables here and into the log, of the tests the end; progress into the log alone
    timeout -k 5 "$limit" "$PYTHON" "${command[@]}" 2>>"$log" | tee -a "$log" | if [ "$part" = tests ]; then tail -n 20; else cat; fi
    code=${PIPESTATUS[0]}
    case $code in
    0) status=ran ;;
    124 | 137) status="stopped at its limit of $limit s" failed=1 ;;
    *) status="failed with exit code $code" failed=1 ;;
    esac
    row "$part" "$status" $((SECONDS - began)) "${command[*]}"
done
echo "results and log: $out"
exit $failed
