#!/usr/bin/env bash
# The whole pipeline at tiny scale, from nothing to a report: `bash speedrun.sh`. Some 45 minutes on
# 2 CPU cores without other work; a slower machine takes longer, which is no error. `bash speedrun.sh
# 0.1` shortens every stage to a tenth. Run again, it goes on where it was stopped. What each phase
# cost is kept in out/tiny/costs.txt, of a run from nothing.
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
# One thread each: at this size a second one costs a core, and makes training only 1.5 times as fast,
# sampling 1.2 times. Where two commands can run side by side, they do.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

from_nothing=yes
[ ! -e "out/$run" ] || from_nothing=
names=() took=() cpu=() planned=()
phase() {  # NAME PLANNED_SECONDS COMMAND…
    local started=$SECONDS used_before
    count_cpu
    used_before=$used
    printf '\n=== %s: %s\n' "$1" "${*:3}"
    "${@:3}"
    count_cpu
    names+=("$1") planned+=("$2") took+=($((SECONDS - started))) cpu+=($((used - used_before)))
}
count_cpu() {  # used: user and system seconds of all commands so far; the last line of bash's `times`
    times > "$clock"  # to a file, since in a pipe it is a subshell that is asked, which ran nothing
    used=$(tail -n 1 "$clock" | awk -F '[ms ]+' '{ printf "%d", $1 * 60 + $2 + $3 * 60 + $4 }')
}
clock=$(mktemp)
trap 'rm -f "$clock"; kill $(jobs -p) 2> /dev/null || true' EXIT
phase corpus 15 python -m data.text.corpus configs/tiny.py --run="$run"
phase pre-training 440 python pretrain.py configs/tiny.py --run="$run" --scale="$scale" "${shorter[@]}"
# Code problems made by machine, which all runs share, beside what the teacher learns from.
practice() {
    python refine.py configs/tiny.py --run="$run" --scale="$scale" --practice &
    if [ "$scale" = 1 ] || [ ! -e out/synthetic/counts.json ]; then
        python -m data.sets.synthesize configs/tiny.py --run="$run" "${fewer[@]}"
    fi
    python -m data.verify.transcripts configs/tiny.py --run="$run" --scale="$scale"
    wait $!
}
# Who writes in the refinement and is distilled later; and beside it the verifier of RL's rewards.
teacher() {
    python sft.py configs/tiny_verifier.py --run="$run/verifier" --init_from="out/$run/pretrain" \
        --scale="$scale" --sft.data="out/$run/verifier_data" > "out/$run/verifier.log" &
    python sft.py configs/tiny_teacher.py --run="$run/teacher" --init_from="out/$run/pretrain" \
        --scale="$scale" --sft.data="out/$run/practice" "${shorter[@]}"
    wait $! || { cat "out/$run/verifier.log"; return 1; }
}
phase practice 70 practice
phase teacher 300 teacher
phase refine 140 python refine.py configs/tiny.py --run="$run" --scale="$scale" "${rougher[@]}"
phase SFT 160 python sft.py configs/tiny.py --run="$run" --scale="$scale" "${shorter[@]}"
phase DPD 210 python distill.py configs/tiny.py --run="$run" --scale="$scale" "${shorter[@]}" \
    "${easier[@]}"
phase reward 65 python reward.py configs/tiny.py --run="$run" --scale="$scale"
phase RL 780 python rl.py configs/tiny.py --run="$run" --scale="$scale" "${shorter[@]}" \
    "${anything[@]}"
phase report 10 python -m report configs/tiny.py --run="$run"
phase sample 5 python generate.py "out/$run/rl" --chat --temperature=0 \
    'Mia has 12 apples. She buys 7 more. How many apples does Mia have now?'

printf '\n%-14s%10s%10s%10s\n' phase planned took CPU
slow=""
for i in "${!names[@]}"; do
    printf '%-14s%8s s%8s s%8s s\n' "${names[i]}" "${planned[i]}" "${took[i]}" "${cpu[i]}"
    # A run that is shortened has no plan; one that goes on where it was stopped is quicker.
    [ "$scale" != 1 ] || [ $((took[i] * 2)) -le $((planned[i] * 3)) ] || slow="$slow ${names[i]}"
    [ -z "$from_nothing" ] || echo "${took[i]} ${cpu[i]} ${names[i]}" >> "out/$run/costs.txt"
done
if [ -n "$slow" ]; then  # no error: the results are right, whatever time they took
    load=$(cut -d ' ' -f 1 /proc/loadavg 2> /dev/null || uptime)
    cores=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
    echo "took more than 1.5 times the planned time:$slow. Is this machine slower than the plan's 2 cores," \
        "or busy? $cores cores (nproc), load average $load, OMP_NUM_THREADS=${OMP_NUM_THREADS:-not set}"
fi
echo "open out/$run/report.html: all of it on one page"
