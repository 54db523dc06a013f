#!/usr/bin/env bash
# Every test and benchmark that a GPU has something to say about, in at most 8 minutes: benchmarks/on_gpu.sh
#
# Nothing is installed: `python3` (or $PYTHON) has torch, transformers and pytest. Results go to $OUT (default: out/on_gpu),
# a file for each step and `summary.txt`. A step that hangs is ended at its limit, and the next one begins. With --dry-run
# everything runs on the CPU and is as small as possible, which tells whether the script works, and nothing else.
set -uo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$ROOT/out/on_gpu}
SECONDS_IN_ALL=470
PATIENCE=1
DEVICE=cuda
MEMORY_COST=(--rows 1000000 --batch 8 --length 2048 --new-tokens 128)
ROW_IDS=() TABLES_MODEL=()
case ${1:-} in
"") ;;
--dry-run)
    DEVICE=cpu
    SECONDS_IN_ALL=4700 PATIENCE=10 # a CPU may be busy with other things
    MEMORY_COST=(--rows 5000 --batch 1 --length 8 --new-tokens 2 --repeats 1)
    ROW_IDS=(--repeats 1)
    TABLES_MODEL=(--gigabytes 0.01 --tokens 2 --repeats 1)
    ;;
*)
    echo "usage: $0 [--dry-run]" >&2
    exit 2
    ;;
esac

# The folder of a checkout has any name; Python finds the package through these two links.
PACKAGES=$(mktemp -d)
trap 'rm -rf "$PACKAGES"' EXIT
ln -s "$ROOT" "$PACKAGES/engram_hf"
ln -s "$ROOT/cli" "$PACKAGES/engram_cli"
export PYTHONPATH=$PACKAGES${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

mkdir -p "$OUT"
cd "$ROOT" || exit 1
printf '%-22s %-10s %s\n' step result seconds >"$OUT/summary.txt"
FAILED=0

# step NAME LIMIT COMMAND...: run the command for at most LIMIT seconds, its output in NAME.txt.
step() {
    local name=$1 limit=$(($2 * PATIENCE)) begun=$SECONDS left=$((SECONDS_IN_ALL - SECONDS)) code result
    shift 2
    if ((left < limit)); then limit=$left; fi
    if ((limit < 1)); then
        code=124
        echo "not begun: no time was left" >"$OUT/$name.txt"
    else
        timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.txt" 2>&1
        code=$?
    fi
    case $code in 0) result=ok ;; 124 | 137) result=timeout ;; *) result="exit $code" ;; esac
    if ((code)); then FAILED=1; fi
    printf '%-22s %-10s %s\n' "$name" "$result" "$((SECONDS - begun))" >>"$OUT/summary.txt"
}

describe() {
    nvidia-smi 2>&1
    "$PYTHON" - <<'END'
import accelerate, peft, torch, transformers

for library in (torch, transformers, accelerate, peft):
    print(library.__name__, library.__version__)
print("CUDA", torch.version.cuda, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
END
}
export -f describe
export PYTHON

mapfile -t TESTS < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
step environment 60 bash -c describe
step tests 200 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider "${TESTS[@]}"
step memory_cost_paper 60 "$PYTHON" benchmarks/memory_cost.py --device "$DEVICE" --variant paper "${MEMORY_COST[@]}"
step memory_cost_v41 60 "$PYTHON" benchmarks/memory_cost.py --device "$DEVICE" --variant v4.1 "${MEMORY_COST[@]}"
step row_ids 40 "$PYTHON" benchmarks/row_ids.py --device "$DEVICE" "${ROW_IDS[@]}"
step tables_model 90 "$PYTHON" benchmarks/tables_model.py --device "$DEVICE" "${TABLES_MODEL[@]}"
cat "$OUT/summary.txt"
exit $FAILED
