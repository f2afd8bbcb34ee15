#!/usr/bin/env bash
# The whole pipeline at tiny scale, from nothing to a report: `bash speedrun.sh`. Half an hour
# to an hour on 2 CPU cores; a slower machine takes longer, which is no error. `bash speedrun.sh 0.1`
# shortens every stage to a tenth. Run again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")"
scale=${1:-1}
run=tiny shorter=() rougher=() easier=() anything=() fewer=()
if [ "$scale" != 1 ]; then  # models that can nearly nothing: all is run, little comes out
    run=tiny-$scale shorter=(--evaluate.n_problems=4) rougher=(--refine.retries=0 --refine.completer=)
    easier=(--distill.min_positive_score=0 --distill.gap=0) anything=(--rl.filter_samples=0)
    fewer=(--synthesize.n=90)
fi
source setup.sh requirements.txt

names=(); took=(); planned=()
phase() {  # NAME PLANNED_SECONDS COMMAND…
    local started=$SECONDS
    printf '\n=== %s: %s\n' "$1" "${*:3}"
    "${@:3}"
    names+=("$1"); planned+=("$2"); took+=($((SECONDS - started)))
}
phase corpus 30 python -m data.text.corpus configs/tiny.py --run="$run"
phase pre-training 300 python pretrain.py configs/tiny.py --run="$run" --scale="$scale" "${shorter[@]}"
# Two that draft, judge and revise, side by side with a thread each; then one that completes chains of
# thought, beside the verifier of RL's rewards.
writers() {
    local options=(--scale="$scale" --sft.data="out/$run/practice") pids=() failed=0
    python refine.py configs/tiny.py --run="$run" --scale="$scale" --practice
    python -m data.verify.transcripts configs/tiny.py --run="$run" --scale="$scale"
    for writer in ann bob; do
        OMP_NUM_THREADS=1 python sft.py configs/tiny_writer.py --run="$run/$writer" \
            --init_from="out/$run/pretrain" --sft.seed="${#pids[@]}" "${options[@]}" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    [ $failed = 0 ] || return 1
    OMP_NUM_THREADS=1 python sft.py configs/tiny_verifier.py --run="$run/verifier" \
        --init_from="out/$run/ann/sft" --scale="$scale" --sft.data="out/$run/verifier_data" \
        > "out/$run/verifier.log" &
    OMP_NUM_THREADS=1 python sft.py configs/tiny_completer.py --run="$run/completer" \
        --init_from="out/$run/ann/sft" "${options[@]}"
    wait $! || { cat "out/$run/verifier.log"; return 1; }
}
refine() {  # and beside it, on the other core, the teacher of the distillation
    OMP_NUM_THREADS=1 python sft.py configs/tiny_teacher.py --run="$run/teacher" \
        --init_from="out/$run/pretrain" --scale="$scale" --sft.data="out/$run/practice/worked" \
        "${shorter[@]}" > "out/$run/teacher.log" &
    OMP_NUM_THREADS=1 python refine.py configs/tiny.py --run="$run" --scale="$scale" "${rougher[@]}"
    wait $! || { cat "out/$run/teacher.log"; return 1; }
}
if [ "$scale" = 1 ] || [ ! -e out/synthetic/counts.json ]; then  # all runs share them
    phase problems 45 python -m data.sets.synthesize configs/tiny.py --run="$run" "${fewer[@]}"
fi
phase writers 150 writers
phase refine 220 refine
phase SFT 150 python sft.py configs/tiny.py --run="$run" --scale="$scale" "${shorter[@]}"
phase DPD 120 python distill.py configs/tiny.py --run="$run" --scale="$scale" "${shorter[@]}" \
    "${easier[@]}"
phase reward 30 python reward.py configs/tiny.py --run="$run" --scale="$scale"
phase RL 200 python rl.py configs/tiny.py --run="$run" --scale="$scale" "${shorter[@]}" \
    "${anything[@]}"
phase report 20 python -m report configs/tiny.py --run="$run"
phase sample 20 python generate.py "out/$run/rl" --chat --temperature=0 \
    'Mia has 12 apples. She buys 7 more. How many apples does Mia have now?'

printf '\n%-14s%10s%10s\n' phase planned took
slow=""
for i in "${!names[@]}"; do
    printf '%-14s%8s s%8s s\n' "${names[i]}" "${planned[i]}" "${took[i]}"
    # A run that is shortened has no plan; one that goes on where it was stopped is quicker.
    [ "$scale" != 1 ] || [ $((took[i] * 2)) -le $((planned[i] * 3)) ] || slow="$slow ${names[i]}"
done
if [ -n "$slow" ]; then  # no error: the results are right, whatever time they took
    load=$(cut -d ' ' -f 1 /proc/loadavg 2> /dev/null || uptime)
    cores=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
    echo "took more than 1.5 times the planned time:$slow. Is this machine slower than the plan's 2 cores," \
        "or busy? $cores cores (nproc), load average $load, OMP_NUM_THREADS=${OMP_NUM_THREADS:-not set}"
fi
echo "open out/$run/report.html: all of it on one page"
