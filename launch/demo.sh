#!/usr/bin/env bash
# The whole road on generated data and the CPU: shards, tokenizer, teacher, student, export, recall, picture.
# What is finished is not repeated; delete the folder to start over. Usage: launch/demo.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
DEMO_DIR="${1:-${DEMO_DIR:-runs/demo}}"
export DEMO_DIR

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
once() { local made="$1"; shift; if [ -e "$made" ]; then echo "$made is there already"; else run "$@"; fi; }

# Two ranks of one half of the cores each: beside its loader, one rank on all of two cores would wait for itself.
ranks=(deepspeed --num_accelerators 2 --module mmd2v)
export DS_ACCELERATOR=cpu

begin=$SECONDS
say "1/6  a world of scenes, as WebDataset shards"
once "$DEMO_DIR/shards/train" mmd2v data synth --out "$DEMO_DIR/shards/train" --split train --count 22000 --size 64 --seed 0
once "$DEMO_DIR/shards/test" mmd2v data synth --out "$DEMO_DIR/shards/test" --split test --count 1000 --size 64 --seed 1

say "2/6  a tokenizer from its captions"
once "$DEMO_DIR/tokenizer.json" mmd2v data tokenizer "$DEMO_DIR/shards/train" --out "$DEMO_DIR/tokenizer.json" --kind wordlevel

say "3/6  a teacher, trained on the known attributes of the scenes"
run "${ranks[@]}" train configs/demo/teacher.yaml --resume auto
once "$DEMO_DIR/teacher" mmd2v export "$DEMO_DIR/runs/teacher" --out "$DEMO_DIR/teacher"

say "4/6  the student, distilled from the teacher (recall rises as it learns)"
run "${ranks[@]}" train configs/demo/student.yaml --resume auto
once "$DEMO_DIR/student" mmd2v export "$DEMO_DIR/runs/student" --out "$DEMO_DIR/student"

say "5/6  recall of the export on 1,000 scenes of unseen combinations"
run mmd2v eval retrieval "$DEMO_DIR/student" --shards "$DEMO_DIR/shards/test" --json "$DEMO_DIR/recall.json"

say "6/6  the result"
python -m mmd2v.report.demo --run "$DEMO_DIR/runs/student" --export "$DEMO_DIR/student" \
    --shards "$DEMO_DIR/shards/test" --out "$DEMO_DIR/report"
echo "took $((SECONDS - begin)) s"
