#!/usr/bin/env bash
# Every check of the kernels that needs a GPU, and their benchmark, in about eight minutes.
#
#     benchmarks/kernels/gpu_check.sh FOLDER [PYTHON]
#
# FOLDER receives checks.jsonl (one line a check), resources.json, kernels.csv, kernels.svg, measured.txt, parts.csv,
# parts.txt, retrieval/ (the same of exact retrieval and of the contrastive losses) and summary.txt (and
# memory_checker.txt where compute-sanitizer is there). PYTHON needs torch and Triton alone; torchscale is measured
# beside them where it is there. Without a GPU it rehearses what it can: the checks in Triton's interpreter and the
# benchmarks at sizes whose figures mean nothing. The exit status is 0 when all checks pass and the benchmark runs.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:?usage: gpu_check.sh FOLDER [PYTHON]}
python=${2:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$root"
export PYTHONPATH="$root/kernels:$root/tests/kernels:$root/benchmarks/kernels"
unset TRITON_INTERPRET MMD2V_KERNELS
status=0
tiny=()
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device: a rehearsal"
    tiny=(--tiny)
fi
step() { # name, seconds, file for its output, command: say how it went, and go on
    local name=$1 limit=$2 output=$3 begin=$SECONDS
    shift 3
    if timeout "$limit" "$@" > "$output"; then
        echo "$name: passed in $((SECONDS - begin)) s" | tee -a "$folder/summary.txt"
    else
        echo "$name: FAILED (status $?) after $((SECONDS - begin)) s" | tee -a "$folder/summary.txt"
        status=1
    fi
}
: > "$folder/summary.txt"
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__,
    torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")' | tee -a "$folder/summary.txt"
interpreter=()
if ((${#tiny[@]})); then interpreter=(env TRITON_INTERPRET=1); fi
# Compiling takes most of the time: a process a dtype.
step checks 200 "$folder/checks.jsonl" bash -c 'for dtype in float32 float16 bfloat16; do
    "$@" "" $dtype & pids+=" $!"; done; status=0; for pid in $pids; do wait $pid || status=1; done; exit $status' \
    checks "${interpreter[@]}" "$python" tests/kernels/device_checks.py
"$python" - "$folder/checks.jsonl" <<'COUNT' | tee -a "$folder/summary.txt"
import json, sys
found = [json.loads(line) for line in open(sys.argv[1]) if line.startswith("{")]
failed = [one for one in found if one["problem"]]
print(f"{len(found)} checks, {len(failed)} failed")
for one in failed:
    print(one["check"], one["problem"].strip().splitlines()[-1][:200])
COUNT
step parts 120 "$folder/parts.log" "${interpreter[@]}" \
    "$python" benchmarks/kernels/parts.py --out "$folder" --seconds 70 "${tiny[@]}"
step benchmark 250 "$folder/benchmark.txt" \
    "$python" benchmarks/kernels/gpu.py --out "$folder" --seconds 100 "${tiny[@]}"
mkdir -p "$folder/retrieval"
step retrieval 100 "$folder/retrieval/benchmark.txt" "${interpreter[@]}" \
    "$python" benchmarks/retrieval/gpu.py --out "$folder/retrieval" --seconds 60 "${tiny[@]}"
step contrastive 60 "$folder/retrieval/contrastive.txt" "${interpreter[@]}" \
    "$python" benchmarks/retrieval/contrastive_gpu.py --out "$folder/retrieval" --seconds 25 "${tiny[@]}"
step resources 40 "$folder/resources.json" "$python" tests/kernels/ahead_of_time.py 90
if ((!${#tiny[@]})) && command -v compute-sanitizer > /dev/null; then
    step "memory checker" 40 "$folder/memory_checker.txt" compute-sanitizer --error-exitcode 1 \
        "$python" tests/kernels/device_checks.py expert_mlp/two
fi
cat "$folder/benchmark.txt" "$folder/retrieval/benchmark.txt" "$folder/retrieval/contrastive.txt" >> "$folder/summary.txt"
cat "$folder/summary.txt"
exit $status
