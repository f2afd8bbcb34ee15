#!/usr/bin/env bash
# The whole pipeline at tiny scale, from nothing to a report: `bash speedrun.sh`. About six minutes on 2 CPU cores.
# `bash speedrun.sh 0.1` shortens every stage to a tenth. Run again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")"
scale=${1:-1}
run=tiny; [ "$scale" = 1 ] || run=tiny-$scale
source setup.sh requirements.txt

names=(); took=(); planned=()
phase() {  # NAME PLANNED_SECONDS COMMAND…
    local started=$SECONDS
    printf '\n=== %s: %s\n' "$1" "${*:3}"
    "${@:3}"
    names+=("$1"); planned+=("$2"); took+=($((SECONDS - started)))
}
phase corpus 30 python -m data.corpus configs/tiny.py --run="$run"
phase pre-training 300 python pretrain.py configs/tiny.py --run="$run" --scale="$scale"
phase report 20 python report.py configs/tiny.py --run="$run"
phase sample 20 python generate.py "out/$run/pretrain" --temperature=0 \
    $'Problem: Mia has 12 apples. She buys 7 more. How many apples does Mia have now?\nWork:'

printf '\n%-14s%10s%10s\n' phase planned took
slow=""
for i in "${!names[@]}"; do
    printf '%-14s%8s s%8s s\n' "${names[i]}" "${planned[i]}" "${took[i]}"
    [ "$scale" != 1 ] || [ $((took[i] * 2)) -le $((planned[i] * 3)) ] || slow="$slow ${names[i]}"
done
echo "pictures: out/$run/pretrain/loss.png and plan.png; metrics: out/$run/pretrain/metrics.jsonl"
[ -z "$slow" ] || { echo "error: more than 1.5 times the planned time:$slow" >&2; exit 1; }
