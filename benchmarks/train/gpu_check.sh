#!/usr/bin/env bash
# Every check of the product that needs a GPU but the kernels' own (benchmarks/kernels/gpu_check.sh), in about 150 seconds
# and what the throughput takes, at most 180.
#
#     [PEER_PYTHON=…] benchmarks/train/gpu_check.sh FOLDER [PYTHON]
#
# FOLDER receives summary.txt (one line a step, then what the runs measured), logs.txt (what every step printed),
# metrics.jsonl (every run's own stream), gpu_tests.xml, doctor.json and throughput.{csv,json,svg}. With PEER_PYTHON, of
# benchmarks/data/peer_environment.sh, open_clip is trained beside the ViT-B/16. PYTHON needs what setup.py asks for, with the
# extra `gpu` and pytest; nothing is downloaded. Without a GPU it rehearses every step on the CPU at sizes whose figures
# mean nothing. The exit status is 0 when all steps pass.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:?usage: gpu_check.sh FOLDER [PYTHON]}
python=${2:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset MMD2V_KERNELS TRITON_INTERPRET DS_ACCELERATOR
export DEMO_DIR=$work HF_HUB_OFFLINE=1
device=cuda steps=60 more=100 scenes=2048 large=512 size=224 width=768 heads=12 depth=5 blocks=12 batch=256 workers=12 bank=65536
windows='--steps 78 --rounds 3 --uncounted 5'
vit='{}' mixed=bf16_autocast half=fp16 patience=1
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device: a rehearsal"
    device=cpu steps=4 more=6 scenes=256 large=16 size=32 width=64 heads=4 depth=1 blocks=1 batch=8 workers=2 bank=64
    vit='{img_size: 32, depth: 2, embed_dim: 64, num_heads: 4}' half=bf16 # fp16 needs CUDA
    windows='--steps 9 --rounds 2 --uncounted 1'
    patience=6 # one step after the other, on few cores
fi
: > "$folder/summary.txt"

step() { # name, seconds, command: say how it went, and go on
    local name=$1 limit=$2 begin=$SECONDS status word=passed
    shift 2
    timeout --kill-after 5 $((limit * patience)) "$@" > "$work/$name.log" 2>&1
    status=$?
    ((status == 0)) || word="FAILED (status $status)"
    # In one write: steps that run side by side share the file.
    printf '%s: %s after %s s\n' "$name" "$word" $((SECONDS - begin)) | tee -a "$folder/summary.txt"
    if ((status)); then tail -n 6 "$work/$name.log" | cut -c1-300 | sed 's/^/    /' >> "$folder/summary.txt"; fi
    return $status
}
both() { # commands to run side by side: a GPU has room for the small ones, a rehearsal's cores have not
    local one
    for one in "$@"; do
        if [ $device = cuda ]; then $one & else $one; fi
    done
    wait
}
train() { # name, seconds, config and options: a run of that name
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" -m mmd2v train "$@" --engine.device $device --name "$name" --run_dir "$work/runs/$name"
}
student() { # name, then options
    local name=$1
    shift
    train "$name" 90 configs/demo/student.yaml --steps $steps --evaluation.every $steps "$@"
}

"$python" -c 'import torch, triton, deepspeed; print("torch", torch.__version__, "triton", triton.__version__, "deepspeed",
    deepspeed.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")' 2> /dev/null |
    tail -n 1 | tee -a "$folder/summary.txt"

# ------------------------------------------------------------------------------- data, tests, the demo's teacher

synth() { step "$1" 60 "$python" -m mmd2v data synth --out "$work/shards/$2" --split "$3" --count "$4" --size "$5" --shard-size "$6"; }
small_scenes() { synth scenes_train train train $scenes 64 128; }
test_scenes() { synth scenes_test test test $((scenes / 4)) 64 128; }
large_scenes() { synth scenes_large large train $large $size $(((large + workers - 1) / workers)); }
random_weights() {
    step random_vit 60 "$python" - "$work/vit.safetensors" "$vit" <<'WEIGHTS'
import sys, timm, torch, yaml
from safetensors.torch import save_file
torch.manual_seed(0)
model = timm.create_model("vit_base_patch16_224", **yaml.safe_load(sys.argv[2]))
save_file(model.state_dict(), sys.argv[1])
WEIGHTS
}
both small_scenes test_scenes large_scenes random_weights
step tokenizer 30 "$python" -m mmd2v data tokenizer "$work/shards/train" --out "$work/tokenizer.json" --kind wordlevel

tests=$(grep -rl 'pytest\.mark\.gpu' tests --include='test_*.py' | grep -v '^tests/kernels/')
gpu_tests() {
    # shellcheck disable=SC2086 # a list of files
    step gpu_tests 90 "$python" -m pytest -q -m gpu -p no:cacheprovider --timeout 60 --junitxml "$folder/gpu_tests.xml" $tests
}
doctor() { step doctor 60 "$python" -m mmd2v doctor --config configs/demo/student.yaml --json "$folder/doctor.json"; }
teacher() {
    train teacher 60 configs/demo/teacher.yaml --engine.batch_size 64 &&
        step teacher_export 40 "$python" -m mmd2v export "$work/runs/teacher" --out "$work/teacher"
}
both teacher gpu_tests doctor

# ------------------------------------------------------------------------- the student in every mode of the engine

autocast_0() { student autocast_zero_0 --engine.precision $mixed --engine.zero_stage 0; }
bf16_0() { student bf16_zero_0 --engine.precision bf16 --engine.zero_stage 0; }
bf16_1() { student bf16_zero_1 --engine.precision bf16 --engine.zero_stage 1; }
bf16_2() { student bf16_zero_2 --engine.precision bf16 --engine.zero_stage 2; }
half_1() { student half_zero_1 --engine.precision $half --engine.zero_stage 1; }
fp32_3() { student fp32_zero_3 --engine.precision fp32 --engine.zero_stage 3; }
# Leaving a step out has its own vote on the device.
skip_0() { student skip_zero_0 --engine.precision $mixed --engine.zero_stage 0 --stability.non_finite skip; }
# Saved beside the training, then continued: the second part must say from where.
resumed() {
    local options=(--engine.precision $mixed --engine.zero_stage 2 --checkpoint.every $((steps / 2)))
    student resumed "${options[@]}" || return
    mv "$work/resumed.log" "$work/resumed_before.log"
    student resumed "${options[@]}" --steps $more --resume auto || return
    step resumed_says_so 5 grep "continuing from .* at step $steps" "$work/resumed.log"
    step export 40 "$python" -m mmd2v export "$work/runs/resumed" --out "$work/student" &&
        step eval_retrieval 60 "$python" -m mmd2v eval retrieval "$work/student" --shards "$work/shards/test" --device $device \
            --precision bf16
}
both autocast_0 bf16_0 bf16_1 bf16_2 half_1 fp32_3 skip_0 resumed

# ----------------------------------------------------------------- base size: alone on the device, as it is measured

cat > "$work/vit.yaml" <<CONFIG
name: vit
run_dir: "$work/runs/vit"
steps: $steps
data:
  train: {shards: "$work/shards/large"}
  image: {size: $size, crop_scale: [0.6, 1.0]}
  tokenizer: {kind: hf, path: "$work/tokenizer.json", max_length: 64}
  workers: $workers
model:
  width: $width
  heads: $heads
  encoders:
    image: {kind: patch, patch_size: 16, positions: sincos, norm: true, norm_eps: 1.0e-6, frozen: true}
    text: {kind: tokens, norm: true, frozen: true}
  layers:
    - {kind: separate, count: $depth, norm: post, eps: {image: 1.0e-6, text: 1.0e-5}}
    - {kind: shared, count: 1, norm: post, eps: 1.0e-6}
  final_norm: false
  projection: {kind: none}
teachers:
  image: {name: "timm:vit_base_patch16_224@$work/vit.safetensors", kwargs: $vit}
objectives:
  - {kind: cls_regression, teacher: image, head: none}
optimizer: {lr: 5.0e-4, betas: [0.9, 0.98], eps: 1.0e-6, weight_decay: 0.01, warmup: 0.1}
engine: {batch_size: $batch, precision: $mixed, zero_stage: 1}
logging: {every: $((steps / 4)), tensorboard: false}
CONFIG
# The multimodal stage of the source, then what came after it: a contrastive loss beside the regression, and a memory bank.
more_objectives="[{kind: contrastive}, {kind: contrastive_target, teacher: image, bank_size: $bank},
    {kind: cls_regression, teacher: image, head: norm_linear, normalize: layer_norm, weight: 0.5}]"
train vit_regression 70 "$work/vit.yaml"
train vit_contrastive 70 "$work/vit.yaml" --objectives "$more_objectives" --data.decode device
train vit_half 70 "$work/vit.yaml" --engine.precision $half

# Throughput: a ViT-B/16 and as large a text tower under the contrastive loss, with and without a live ViT-B/16 teacher.
cat > "$work/distilled.yaml" <<CONFIG
base: "$root/configs/throughput/contrastive.yaml"
name: throughput-distilled
teachers:
  image: {name: "timm:vit_base_patch16_224@$work/vit.safetensors", kwargs: $vit, image_size: $size}
objectives:
  - {kind: contrastive}
  - {kind: cls_regression, teacher: image, head: norm_linear, normalize: layer_norm}
CONFIG
peer=()
if [ -n "${PEER_PYTHON:-}" ]; then peer=(--peer-python "$PEER_PYTHON"); fi
export FLICKR8K_SHARDS="$work/shards" MMD2V_TEACHERS="$work" # the config names them, and the options below replace both
# shellcheck disable=SC2086 # a list of options
step throughput 180 "$python" benchmarks/train/throughput.py configs/throughput/contrastive.yaml "$work/distilled.yaml" \
    --out "$folder/throughput" $windows "${peer[@]}" --data.train.shards "$work/shards/large" \
    --data.eval.shards "$work/shards/test" --data.image.size $size --data.tokenizer.path "$work/tokenizer.json" \
    --data.tokenizer.max_length 64 --data.workers $workers --model.width $width --model.heads $heads \
    --model.layers.0.count $blocks --engine.device $device --engine.precision $mixed --engine.batch_size $batch

# ---------------------------------------------------------------------------------------------------- the results

for run in "$work"/runs/*/; do
    if [ -f "$run/metrics.jsonl" ]; then
        sed "s/^{/{\"run\": \"$(basename "$run")\", /" "$run/metrics.jsonl" >> "$folder/metrics.jsonl"
    fi
done
for log in "$work"/*.log; do
    printf '\n===== %s\n' "$(basename "$log" .log)"
    cat "$log"
done > "$folder/logs.txt"
{
    echo
    grep -h -E '^[0-9]+ (passed|skipped|failed)|^=+ .*(passed|failed|skipped)' "$work/gpu_tests.log" | tail -n 1
    for log in "$work"/*.log; do
        # The last line of a run has its throughput, the share of it spent waiting for data, and the peak memory.
        grep -h 'samples/s' "$log" | tail -n 1 | sed "s/^/$(basename "$log" .log): /"
    done
    grep -h 'samples/s (' "$work/throughput.log"
    grep -h -i -E 'R@1|median rank' "$work/eval_retrieval.log" 2> /dev/null | tail -n 3
    grep -h -i -E 'warning' "$work"/*.log | sort | uniq -c | sort -rn | head -n 25 | cut -c1-250
} >> "$folder/summary.txt"
cat "$folder/summary.txt"
! grep -q FAILED "$folder/summary.txt"
